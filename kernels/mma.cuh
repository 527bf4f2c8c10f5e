// Warp-level matrix products for bf16, f16, f32 and f64 behind one fragment layout.
//
// Every data type uses the m16n8k16 layout of the 16-bit instructions. With g = lane / 4 and
// t = lane % 4, a thread holds
//   A (16 x 16): rows g, g + 8;   columns k = 2t, 2t + 1, 2t + 8, 2t + 9
//   B (16 x 8):  column g;        rows    k = 2t, 2t + 1, 2t + 8, 2t + 9
//   accumulator (16 x 8): {row g: columns 2t, 2t + 1}, {row g + 8: the same columns}
// f32 runs as two m16n8k8 steps and f64 as four m8n8k4 steps with the contraction index permuted
// alike in A and B, which leaves the product unchanged.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace mlstm {

using bf16 = __nv_bfloat16;
using f16 = __half;

template <typename T>
struct AccOf {
  using Type = float;
};
template <>
struct AccOf<double> {
  using Type = double;
};
template <typename T>
using Acc = typename AccOf<T>::Type;

__device__ __forceinline__ float to_acc(bf16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_acc(f16 x) { return __half2float(x); }
__device__ __forceinline__ float to_acc(float x) { return x; }
__device__ __forceinline__ double to_acc(double x) { return x; }

// Keeps a float within f16's range; NaN stays.
__device__ __forceinline__ float clamp_f16(float x) {
  return x > 65504.0f ? 65504.0f : (x < -65504.0f ? -65504.0f : x);
}

template <typename T>
__device__ __forceinline__ T from_acc(Acc<T> x) {
  return x;
}
template <>
__device__ __forceinline__ bf16 from_acc<bf16>(float x) {
  return __float2bfloat16_rn(x);
}
template <>
__device__ __forceinline__ f16 from_acc<f16>(float x) {
  return __float2half_rn(clamp_f16(x));
}

// Two neighbouring elements as one aligned word.
template <typename T>
struct Two {
  using Type = uint32_t;
};
template <>
struct Two<float> {
  using Type = float2;
};
template <>
struct Two<double> {
  using Type = double2;
};

template <typename T>
__device__ __forceinline__ typename Two<T>::Type pack(Acc<T> x, Acc<T> y);
template <>
__device__ __forceinline__ uint32_t pack<bf16>(float x, float y) {
  __nv_bfloat162 both = __floats2bfloat162_rn(x, y);
  return *reinterpret_cast<uint32_t*>(&both);
}
template <>
__device__ __forceinline__ uint32_t pack<f16>(float x, float y) {
  __half2 both = __floats2half2_rn(clamp_f16(x), clamp_f16(y));
  return *reinterpret_cast<uint32_t*>(&both);
}
template <>
__device__ __forceinline__ float2 pack<float>(float x, float y) {
  return make_float2(x, y);
}
template <>
__device__ __forceinline__ double2 pack<double>(double x, double y) {
  return make_double2(x, y);
}

template <typename T>
__device__ __forceinline__ void unpack(typename Two<T>::Type both, Acc<T>& x, Acc<T>& y);
template <>
__device__ __forceinline__ void unpack<bf16>(uint32_t both, float& x, float& y) {
  x = __uint_as_float(both << 16);
  y = __uint_as_float(both & 0xffff0000u);
}
template <>
__device__ __forceinline__ void unpack<f16>(uint32_t both, float& x, float& y) {
  float2 wide = __half22float2(*reinterpret_cast<__half2*>(&both));
  x = wide.x;
  y = wide.y;
}
template <>
__device__ __forceinline__ void unpack<float>(float2 both, float& x, float& y) {
  x = both.x;
  y = both.y;
}
template <>
__device__ __forceinline__ void unpack<double>(double2 both, double& x, double& y) {
  x = both.x;
  y = both.y;
}

// Fragments: packed pairs for 16-bit types, x[row * 4 + j] and x[j] for the others.
template <typename T>
struct FragA {
  T x[8];
};
template <typename T>
struct FragB {
  T x[4];
};
template <>
struct FragA<bf16> {
  uint32_t r[4];
};
template <>
struct FragB<bf16> {
  uint32_t r[2];
};
template <>
struct FragA<f16> {
  uint32_t r[4];
};
template <>
struct FragB<f16> {
  uint32_t r[2];
};

// Accumulators += A B; kFast rounds float32 to TF32 and means nothing to the other types.
template <bool kFast>
__device__ __forceinline__ void mma(float (&c)[4], const FragA<bf16>& a, const FragB<bf16>& b) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
      "{%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a.r[0]), "r"(a.r[1]), "r"(a.r[2]), "r"(a.r[3]), "r"(b.r[0]), "r"(b.r[1]));
}

template <bool kFast>
__device__ __forceinline__ void mma(float (&c)[4], const FragA<f16>& a, const FragB<f16>& b) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
      "{%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a.r[0]), "r"(a.r[1]), "r"(a.r[2]), "r"(a.r[3]), "r"(b.r[0]), "r"(b.r[1]));
}

__device__ __forceinline__ uint32_t round_tf32(float x) {
  uint32_t out;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(out) : "f"(x));
  return out;
}

__device__ __forceinline__ void mma_tf32(float (&c)[4], const uint32_t (&a)[4],
                                         const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
      "{%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// float32 as hi + lo in tf32, without lo * lo (kFast: hi alone). Each block of 16 is summed on its
// own: the tensor core truncates when it adds, which would bias long sums.
template <bool kFast>
__device__ __forceinline__ void mma(float (&c)[4], const FragA<float>& a, const FragB<float>& b) {
  float sum[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
  for (int step = 0; step < 2; ++step) {
    uint32_t a_hi[4], a_lo[4], b_hi[2], b_lo[2];
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      float x = a.x[(r & 1) * 4 + 2 * step + (r >> 1)];
      a_hi[r] = round_tf32(x);
      a_lo[r] = round_tf32(x - __uint_as_float(a_hi[r]));
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float x = b.x[2 * step + r];
      b_hi[r] = round_tf32(x);
      b_lo[r] = round_tf32(x - __uint_as_float(b_hi[r]));
    }
    if constexpr (!kFast) {
      mma_tf32(sum, a_lo, b_hi);
      mma_tf32(sum, a_hi, b_lo);
    }
    mma_tf32(sum, a_hi, b_hi);
  }
#pragma unroll
  for (int e = 0; e < 4; ++e) c[e] += sum[e];
}

template <bool kFast>
__device__ __forceinline__ void mma(double (&c)[4], const FragA<double>& a,
                                    const FragB<double>& b) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      asm volatile("mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64 {%0,%1}, {%2}, {%3}, {%0,%1};"
                   : "+d"(c[2 * half]), "+d"(c[2 * half + 1])
                   : "d"(a.x[half * 4 + j]), "d"(b.x[j]));
    }
  }
}

// Multiplies B's rows k = 2t, 2t + 1, 2t + 8, 2t + 9 by w, rounding once.
template <typename T>
__device__ __forceinline__ void scale_rows(FragB<T>& b, const Acc<T> (&w)[4]) {
  if constexpr (sizeof(T) == 2) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float x, y;
      unpack<T>(b.r[r], x, y);
      b.r[r] = pack<T>(x * w[2 * r], y * w[2 * r + 1]);
    }
  } else {
#pragma unroll
    for (int j = 0; j < 4; ++j) b.x[j] *= w[j];
  }
}

__device__ __forceinline__ float exp2_fast(float x) {
  float out;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(out) : "f"(x));
  return out;
}
__device__ __forceinline__ double exp2_fast(double x) { return exp2(x); }

}  // namespace mlstm
