// How a backward sweep's state in registers starts and ends: states given and returned, states of
// segments, and the boundaries at which <dC, C> is made.
//
// Registers: c[4 j + 2 half + odd] is row 16 w + g + 8 half, column 8 j + 2 t + odd of a
// warpgroup's 64 x 64 kStateSlabs part of S (w warp, g = lane / 4, t = lane % 4). The rows'
// entries e of n or dn are in shared memory, rows of a warp and theirs alone.
#pragma once

#include "backward_sm90.cuh"

namespace mlstm {

template <typename T, typename Shape>
struct Ends {
  const BackwardBlock<T, Shape>& block;
  int group;

  using State = typename Shape::State;
  static constexpr int kParts = 2 * Shape::kStateSlabs;  // of 16 registers: 32 columns

  // The thread's first row of S, and its first column in a part.
  __device__ __forceinline__ int first_row() const {
    const int thread = opaque(static_cast<int>(threadIdx.x % 128));
    return block.column_of(group) + (thread >> 5) * 16 + (thread >> 2 & 7);
  }
  __device__ __forceinline__ int first_column(int h) const {
    return block.dim_of(group) + h * 32 + opaque(static_cast<int>(threadIdx.x & 3)) * 2;
  }
  // Whether a part lies in the tensor, whose dims are multiples of 64.
  __device__ __forceinline__ bool inside(int h) const {
    const Args& args = block.args;
    return block.column_of(group) < (Shape::kAlongQk ? args.dhqk : args.dhhv) &&
           block.dim_of(group) + h * 32 < (Shape::kAlongQk ? args.dhhv : args.dhqk);
  }
  // Where the thread's first element of a part of a matrix like C is, `stride` between rows of DHQK, and
  // how far from it the element of register x.
  __device__ __forceinline__ int64_t first_element(int h, int64_t stride) const {
    return place(first_row(), first_column(h), stride);
  }
  static __device__ __forceinline__ int64_t distance(int x, int64_t stride) {
    return place((x & 2) * 4, (x >> 2) * 8 + (x & 1), stride);
  }
  static __device__ __forceinline__ int64_t place(int row, int column, int64_t stride) {
    return Shape::kAlongQk ? row * stride + column : column * stride + row;
  }

  // ---- segments' own states (Args::segment_c)

  __device__ __forceinline__ int64_t segment_index(int j) const {
    const Args& args = block.args;
    const int64_t side = Shape::kReverse ? args.rows : 0;
    return ((side + block.row) * args.nh + block.head) * (args.segments - 1) + j;
  }
  __device__ __forceinline__ float* segment_state(int j) const {
    return block.args.segment_c + segment_index(j) * block.args.dhqk * block.args.segment_columns;
  }
  __device__ __forceinline__ float* segment_vector(int j) const {
    return block.args.segment_n + segment_index(j) * block.args.dhqk;
  }

  // Calls f(C or null, its stride, n or null, g) for the state given, if any, and for the states of the
  // segments that the sweep passes before the block's own, in order. Given states are in float.
  template <typename F>
  __device__ __forceinline__ void each_before(F f) const {
    const Args& args = block.args;
    const Tensor& c = Shape::kReverse ? args.dc_last : args.c_initial;
    const Tensor& n = Shape::kReverse ? args.dn_last : args.n_initial;
    const int segments =
        div_up(block.total, chunks_per_segment(args, block.total));  // that are not empty
    const int before = Shape::kReverse ? max(segments - 1 - block.segment, 0) : block.segment;
    const bool given = c.data != nullptr || n.data != nullptr;
#pragma unroll 1
    for (int x = given ? -1 : 0; x < before; ++x) {
      if (x < 0) {
        f(c.data != nullptr ? at<float>(c, block.row, block.head, 0) : nullptr, c.stride_s,
          n.data != nullptr ? at<float>(n, block.row, block.head, 0) : nullptr, 0.0f);
      } else {
        const int j = Shape::kReverse ? segments - 2 - x : x;
        f(segment_state(j), static_cast<int64_t>(args.segment_columns), segment_vector(j),
          args.segment_g[segment_index(j)]);
      }
    }
  }

  __device__ __forceinline__ void start(State& c) const {
#pragma unroll
    for (int x = 0; x < 16 * kParts; ++x) c[x] = 0.0f;
    float e[2] = {0.0f, 0.0f};
    if constexpr (Shape::kOutputs) gather(c, e);
    put_entries(e);
  }

  __device__ __forceinline__ void put_entries(const float (&e)[2]) const {
    const uint32_t entry = block.entry(group);
    // Opaque, or the remainder would take a register until the end.
    if ((opaque(static_cast<int>(threadIdx.x)) & 3) == 0) {
      store_shared(entry, e[0]);
      store_shared(entry + 32, e[1]);
    }
    __syncwarp();
  }
  // Of one of the thread's two rows.
  __device__ __forceinline__ float entry(int half) const {
    return load_shared(block.entry(group) + half * 32);
  }

  __device__ __forceinline__ void gather(State& c, float (&e)[2]) const {
    // By slabs, for the loads in flight take registers too.
#pragma unroll
    for (int h = 0; h < kParts; h += 2) {
      if (!inside(h)) continue;
      each_before([&](const float* state, int64_t stride, const float*, float g) {
        float add[32] = {};
        if (state != nullptr) {
          const float* own = state + first_element(h, stride);
#pragma unroll
          for (int x = 0; x < 32; ++x) add[x] = own[distance(x, stride)];
        }
#pragma unroll
        for (int x = 0; x < 32; ++x) {
          c[16 * h + x] = (g == 0.0f ? 0.0f : c[16 * h + x] * g) + add[x];
        }
      });
    }
    if constexpr (Shape::kAlongQk) {
      if (!inside(0)) return;
      each_before([&](const float*, int64_t, const float* n, float g) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const float add = n != nullptr ? n[first_row() + half * 8] : 0.0f;
          e[half] = (g == 0.0f ? 0.0f : e[half] * g) + add;
        }
      });
    }
  }

  __device__ __forceinline__ void keep(const State& c, float* state, int64_t stride) const {
#pragma unroll
    for (int h = 0; h < kParts; ++h) {
      if (!inside(h)) continue;
      float* own = state + first_element(h, stride);
#pragma unroll
      for (int x = 0; x < 16; ++x) own[distance(x, stride)] = c[16 * h + x];
    }
  }
  __device__ __forceinline__ void keep_vector(float* n) const {
    if ((threadIdx.x & 3) != 0 || !inside(0) || (Shape::kSplit && group != 0)) return;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float* to = n + first_row() + half * 8;
      *to = (block.args.parts_before != 0 ? *to : 0.0f) + entry(half);
    }
  }

  // Leaves what the block's segment adds.
  __device__ __forceinline__ void keep_segment(const State& c, float decay) const {
    const int j = block.segment - (Shape::kReverse ? 1 : 0);
    const int64_t stride = block.args.segment_columns;
#pragma unroll
    for (int h = 0; h < kParts; ++h) {
      if (!inside(h)) continue;
      float* own = segment_state(j) + first_element(h, stride);
#pragma unroll
      for (int x = 0; x < 16; x += 2) {
        *reinterpret_cast<float2*>(own + distance(x, stride)) =
            make_float2(c[16 * h + x], c[16 * h + x + 1]);
      }
    }
    if (Shape::kSweep == Sweep::kC && block.key0 == 0) keep_vector(segment_vector(j));
    if (block.slab0 == 0 && block.key0 == 0 && group == 0 && threadIdx.x % 128 == 0) {
      block.args.segment_g[segment_index(j)] = decay;
    }
  }

  // ---- boundaries: C as bf16 in the order of registers, n

  __device__ __forceinline__ int64_t boundary_index(int boundary) const {
    const auto place = block.again();
    return boundary_slot(block.args, place.first - place.from, place.row, boundary) *
               block.args.nh + place.head;
  }
  // Warpgroups of all blocks of the head, and which of them this is.
  __device__ __forceinline__ int units() const {
    return div_up(block.args.dhqk, Shape::kColumns) * Shape::kWgs;
  }
  __device__ __forceinline__ int unit() const {
    return block.again().slab0 * Shape::kWgs / (Shape::kColumns / 64) + group;
  }
  __device__ __forceinline__ uint4* boundary_state(int boundary) const {
    return reinterpret_cast<uint4*>(block.args.boundary_c) +
           (boundary_index(boundary) * units() + unit()) * (2 * kParts * 128) + threadIdx.x % 128;
  }
  __device__ __forceinline__ float* boundary_vector(int boundary) const {
    return block.args.boundary_n + boundary_index(boundary) * (units() * 64) + unit() * 64 +
           (opaque(static_cast<int>(threadIdx.x % 128)) >> 5) * 16 + (threadIdx.x >> 2 & 7);
  }

  // Whether <dC, C> can be other than zero there: not where either state is.
  __device__ __forceinline__ bool counts(int boundary) const {
    const Args& args = block.args;
    if (boundary == 0 && args.c_initial.data == nullptr && args.n_initial.data == nullptr) {
      return false;
    }
    return boundary < div_up(block.total, kGroupChunks) || args.dc_last.data != nullptr ||
           args.dn_last.data != nullptr;
  }

  __device__ __forceinline__ void keep_boundary(const State& c, int boundary) const {
    if (!counts(boundary)) return;
    uint4* to = boundary_state(boundary);
#pragma unroll
    for (int x = 0; x < 2 * kParts; ++x) {
      const float* part = c + 8 * x;
      to[x * 128] = make_uint4(pack<bf16>(part[0], part[1]), pack<bf16>(part[2], part[3]),
                               pack<bf16>(part[4], part[5]), pack<bf16>(part[6], part[7]));
    }
    if ((threadIdx.x & 3) == 0) {
      boundary_vector(boundary)[0] = entry(0);
      boundary_vector(boundary)[8] = entry(1);
    }
  }

  // This warp's part of <dC, C> + <dn, n>.
  __device__ __forceinline__ void meet_boundary(const State& c, int boundary) const {
    float sum = 0.0f;
    if (counts(boundary)) sum = warp_sum(product(c, boundary));
    if ((threadIdx.x & 31) == 0) {
      block.args.boundary_e[boundary_index(boundary) * block.args.boundary_parts + unit() * 4 +
                            (threadIdx.x >> 5 & 3)] = sum;
    }
  }
  // This thread's part of it.
  __device__ __forceinline__ float product(const State& c, int boundary) const {
    const uint4* from = boundary_state(boundary);
    float sum = 0.0f;
    constexpr int kLoads = kParts < 4 ? 2 * kParts : 8;  // in flight
#pragma unroll
    for (int first = 0; first < 2 * kParts; first += kLoads) {
      uint4 part[kLoads];
#pragma unroll
      for (int x = 0; x < kLoads; ++x) part[x] = from[(first + x) * 128];
#pragma unroll
      for (int x = 0; x < kLoads; ++x) {
        const uint32_t words[4] = {part[x].x, part[x].y, part[x].z, part[x].w};
#pragma unroll
        for (int y = 0; y < 4; ++y) {
          const float* own = c + 8 * (first + x) + 2 * y;
          float one, two;
          unpack<bf16>(words[y], one, two);
          sum += one * own[0] + two * own[1];
        }
      }
    }
    if ((threadIdx.x & 3) == 0 && (!Shape::kSplit || group == 0)) {
      sum += boundary_vector(boundary)[0] * entry(0) + boundary_vector(boundary)[8] * entry(1);
    }
    return sum;
  }
};

}  // namespace mlstm
