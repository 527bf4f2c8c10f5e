// Per token, from the forward's h and N: inv, delta and dm (params.cuh).
//
// delta_DT: a warp per token, 256 threads, grid = ceil(B * NH * S / 8), no dynamic shared memory
#include "tile.cuh"

namespace mlstm {

template <typename T>
__device__ __forceinline__ void run_delta(const Args& args) {
  using A = Acc<T>;
  int64_t token = static_cast<int64_t>(blockIdx.x) * 8 + (threadIdx.x >> 5);
  if (token >= static_cast<int64_t>(args.b) * args.nh * args.s) return;
  int lane = threadIdx.x & 31;
  int64_t lane_index = token / args.s;
  int64_t t = token - lane_index * args.s;
  int head = static_cast<int>(lane_index % args.nh), b = static_cast<int>(lane_index / args.nh);

  A rho = A(0), inv = A(1), delta = A(0);
  if (args.flags & kNormalize) {
    const T* h = at<T>(args.h, b, head, t);
    const T* dh = at<T>(args.dh, b, head, t);
    constexpr int kVec = 16 / sizeof(T);
    int whole = args.vector_ok ? args.dhhv / kVec * kVec : 0;
#pragma unroll 2
    for (int d = lane * kVec; d < whole; d += 32 * kVec) {
      alignas(16) T x[kVec], y[kVec];
      *reinterpret_cast<uint4*>(x) = *reinterpret_cast<const uint4*>(h + d);
      *reinterpret_cast<uint4*>(y) = *reinterpret_cast<const uint4*>(dh + d);
#pragma unroll
      for (int e = 0; e < kVec; ++e) rho += to_acc(x[e]) * to_acc(y[e]);
    }
    for (int d = whole + lane; d < args.dhhv; d += 32) rho += to_acc(h[d]) * to_acc(dh[d]);
    rho = warp_sum(rho);
    A n = *at<A>(args.n, b, head, t);
    A floor = static_cast<const A*>(args.floor)[token];
    A size = n < A(0) ? -n : n;
    inv = A(1) / ((size < floor ? floor : size) + static_cast<A>(args.eps));
    if (size > floor && !(args.flags & kDetach)) {
      delta = static_cast<A>(args.qk_scale) * (n < A(0) ? rho : -rho) * inv;
    }
  }
  if (lane == 0) {
    bool through_m = (args.flags & kExponential) && !(args.flags & kDetach);
    static_cast<A*>(args.inv)[token] = inv;
    static_cast<A*>(args.delta)[token] = delta;
    static_cast<A*>(args.dm)[token] = through_m ? -rho * static_cast<A>(args.eps) * inv : A(0);
  }
}

}  // namespace mlstm

#define DELTA(name, T)                                                                         \
  extern "C" __global__ void __launch_bounds__(256)                                            \
      name(const __grid_constant__ mlstm::Args args) {                                         \
    mlstm::run_delta<T>(args);                                                                 \
  }

DELTA(delta_bf16, mlstm::bf16)
DELTA(delta_f16, mlstm::f16)
DELTA(delta_f32, float)
DELTA(delta_f64, double)
