// Per token, from the forward's h and N: inv, delta and dm (params.cuh).
//
// delta_DT: 8 threads per token, 256 threads, grid = ceil(B * NH * S / 32), no dynamic shared
// memory
#include "tile.cuh"

namespace mlstm {

template <typename T>
__device__ __forceinline__ void run_delta(const Args& args) {
  using A = Acc<T>;
  constexpr int kShare = 8;  // threads per token
  const int64_t tokens = static_cast<int64_t>(args.b) * args.nh * args.s;
  int64_t token = static_cast<int64_t>(blockIdx.x) * (256 / kShare) + threadIdx.x / kShare;
  const bool inside = token < tokens;
  if (!inside) token = tokens - 1;  // the warp stays together for the sums
  int lane = threadIdx.x % kShare;
  int64_t lane_index = token / args.s;
  int64_t t = token - lane_index * args.s;
  int head = static_cast<int>(lane_index % args.nh), b = static_cast<int>(lane_index / args.nh);

  A rho = A(0), inv = A(1), delta = A(0);
  if (args.flags & kNormalize) {
    const T* h = at<T>(args.h, b, head, t);
    const T* dh = at<T>(args.dh, b, head, t);
    constexpr int kVec = 16 / sizeof(T);
    // The same order of sums however the rows are aligned.
#pragma unroll 4
    for (int d = lane * kVec; d < args.dhhv; d += kShare * kVec) {
      alignas(16) T x[kVec], y[kVec];
      if (args.vector_ok && d + kVec <= args.dhhv) {
        *reinterpret_cast<uint4*>(x) = *reinterpret_cast<const uint4*>(h + d);
        *reinterpret_cast<uint4*>(y) = *reinterpret_cast<const uint4*>(dh + d);
      } else {
#pragma unroll
        for (int e = 0; e < kVec; ++e) {
          bool real = d + e < args.dhhv;
          x[e] = real ? h[d + e] : T(0.0f);
          y[e] = real ? dh[d + e] : T(0.0f);
        }
      }
#pragma unroll
      for (int e = 0; e < kVec; ++e) rho += to_acc(x[e]) * to_acc(y[e]);
    }
    rho = quad_sum(rho);
    rho += __shfl_xor_sync(0xffffffffu, rho, 4);
    A n = *at<A>(args.n, b, head, t);
    A floor = static_cast<const A*>(args.floor)[token];
    A size = n < A(0) ? -n : n;
    inv = A(1) / ((size < floor ? floor : size) + static_cast<A>(args.eps));
    if (size > floor && !(args.flags & kDetach)) {
      delta = static_cast<A>(args.qk_scale) * (n < A(0) ? rho : -rho) * inv;
    }
  }
  if (lane == 0 && inside) {
    bool through_m = (args.flags & kExponential) && !(args.flags & kDetach);
    static_cast<A*>(args.inv)[token] = inv;
    static_cast<A*>(args.delta)[token] = delta;
    static_cast<A*>(args.dm)[token] = through_m ? -rho * static_cast<A>(args.eps) * inv : A(0);
  }
}

}  // namespace mlstm

#define DELTA(name, T)                                 \
  extern "C" __global__ void __launch_bounds__(256)    \
      name(const __grid_constant__ mlstm::Args args) { \
    mlstm::run_delta<T>(args);                         \
  }                                                    \
  MLSTM_GEOMETRY(name, 32, 1, 256, 0)

DELTA(delta_bf16, mlstm::bf16)
DELTA(delta_f16, mlstm::f16)
DELTA(delta_f32, float)
DELTA(delta_f64, double)
