// Stands in for CUDA's headers: its words, types and functions, as far as the kernels need them.
#ifndef MLSTM_TESTS_EMULATOR_CUDA_H
#define MLSTM_TESTS_EMULATOR_CUDA_H

#include <bit>
#include <cmath>
#include <cstdint>
#include <type_traits>

#include "barriers.h"
#include "copies.h"
#include "fibers.h"
#include "numbers.h"
#include "races.h"
#include "report.h"
#include "shared.h"
#include "warps.h"
#include "wgmma.h"

#define __CUDACC__ 1
#define __device__
#define __host__
#define __global__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define __cluster_dims__(...)
// Blocks run one after another.
#define __shared__ static

// ---- numbers

using std::isinf;

struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(16) double2 {
  double x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline double2 make_double2(double x, double y) { return {x, y}; }
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }

// As CUDA's: of mixed types too, and a number if either is.
template <typename A, typename B>
constexpr auto min(A a, B b) {
  using C = std::common_type_t<A, B>;
  if constexpr (std::is_floating_point_v<C>) return std::fmin(static_cast<C>(a), static_cast<C>(b));
  return static_cast<C>(a) < static_cast<C>(b) ? static_cast<C>(a) : static_cast<C>(b);
}
template <typename A, typename B>
constexpr auto max(A a, B b) {
  using C = std::common_type_t<A, B>;
  if constexpr (std::is_floating_point_v<C>) return std::fmax(static_cast<C>(a), static_cast<C>(b));
  return static_cast<C>(a) > static_cast<C>(b) ? static_cast<C>(a) : static_cast<C>(b);
}

struct __nv_bfloat16 {
  uint16_t x;
};
struct alignas(4) __nv_bfloat162 {
  __nv_bfloat16 x, y;
};
struct __half {
  uint16_t x;
};
struct alignas(4) __half2 {
  __half x, y;
};
inline float __bfloat162float(__nv_bfloat16 b) { return emu::bf16_float(b.x); }
inline __nv_bfloat16 __float2bfloat16_rn(float f) { return {emu::float_bf16(f)}; }
inline __nv_bfloat16 __double2bfloat16(double d) {
  return __float2bfloat16_rn(static_cast<float>(d));
}
inline uint16_t __bfloat16_as_ushort(__nv_bfloat16 b) { return b.x; }
inline __nv_bfloat16 __ushort_as_bfloat16(uint16_t x) { return {x}; }
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) {
  return {__float2bfloat16_rn(x), __float2bfloat16_rn(y)};
}
inline float __half2float(__half h) { return emu::f16_float(h.x); }
inline __half __float2half_rn(float f) { return {emu::float_f16(f)}; }
inline __half __double2half(double d) { return __float2half_rn(static_cast<float>(d)); }
inline uint16_t __half_as_ushort(__half h) { return h.x; }
inline __half __ushort_as_half(uint16_t x) { return {x}; }
inline __half2 __floats2half2_rn(float x, float y) {
  return {__float2half_rn(x), __float2half_rn(y)};
}
inline float2 __half22float2(__half2 h) { return {__half2float(h.x), __half2float(h.y)}; }

inline float __uint_as_float(uint32_t x) { return std::bit_cast<float>(x); }
inline float __int_as_float(int32_t x) { return std::bit_cast<float>(x); }
inline int32_t __float_as_int(float x) { return std::bit_cast<int32_t>(x); }
inline double __longlong_as_double(long long x) { return std::bit_cast<double>(x); }
inline int __float2int_rd(float x) { return static_cast<int>(std::floor(x)); }
inline int __ffs(unsigned x) { return __builtin_ffs(static_cast<int>(x)); }
template <typename T>
inline T __ldcg(const T* p) {
  return *p;
}

// ---- memory

inline size_t __cvta_generic_to_shared(const void* p) { return emu::to_shared(p); }
inline void* __cvta_shared_to_generic(size_t address) {
  return emu::shared_pointer(static_cast<uint32_t>(address), 1, 1, "__cvta_shared_to_generic");
}

// ---- lanes

inline void __syncthreads() { emu::sync_threads(); }
inline void __syncwarp(unsigned mask = emu::kAllLanes) { emu::sync_warp(mask); }
inline unsigned __ballot_sync(unsigned mask, int predicate) {
  return emu::ballot(mask, predicate != 0);
}
template <typename T>
inline T __shfl_sync(unsigned mask, T value, int from) {
  return emu::exchange("shfl", mask, value, from & 31);
}
template <typename T>
inline T __shfl_up_sync(unsigned mask, T value, int delta) {
  const int lane = emu::current % 32;
  return emu::exchange("shfl.up", mask, value, lane < delta ? lane : lane - delta);
}
template <typename T>
inline T __shfl_down_sync(unsigned mask, T value, int delta) {
  const int lane = emu::current % 32;
  return emu::exchange("shfl.down", mask, value, lane + delta > 31 ? lane : lane + delta);
}
template <typename T>
inline T __shfl_xor_sync(unsigned mask, T value, int bits) {
  return emu::exchange("shfl.xor", mask, value, emu::current % 32 ^ bits);
}

#endif
