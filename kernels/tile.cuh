// Tiles in shared memory and the warp products on them.
//
// A tile of R rows is stored as slabs of R rows x 128 bytes; within a slab the 16-byte piece p of
// row r sits at position p ^ (r & 7), which keeps ldmatrix, the element accesses and the fills
// free of bank conflicts. kSlab<T> columns make a slab.
#pragma once

#include "mma.cuh"
#include "params.cuh"

namespace mlstm {

template <typename T>
constexpr int kSlab = 128 / static_cast<int>(sizeof(T));

__host__ __device__ constexpr int div_up(int x, int y) { return (x + y - 1) / y; }

// Hides a value from the optimiser, which would otherwise compute all addresses that depend on it
// ahead of a loop and spill them.
__device__ __forceinline__ int opaque(int x) {
  asm volatile("" : "+r"(x));
  return x;
}

__device__ __forceinline__ float opaque(float x) {
  asm volatile("" : "+f"(x));
  return x;
}
__device__ __forceinline__ double opaque(double x) {
  asm volatile("" : "+d"(x));
  return x;
}

__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// Address of (row, col) in a tile of `rows` rows.
template <typename T>
__device__ __forceinline__ uint32_t tile_address(uint32_t tile, int rows, int row, int col) {
  int slab = col / kSlab<T>;
  int byte = (col % kSlab<T>)*static_cast<int>(sizeof(T));
  return tile + (slab * rows + row) * 128 + (((byte >> 4) ^ (row & 7)) << 4) + (byte & 15);
}

template <typename T>
__device__ __forceinline__ typename Two<T>::Type lds_two(uint32_t address);
template <>
__device__ __forceinline__ float2 lds_two<float>(uint32_t address) {
  float2 v;
  asm volatile("ld.shared.v2.f32 {%0,%1}, [%2];" : "=f"(v.x), "=f"(v.y) : "r"(address));
  return v;
}
template <>
__device__ __forceinline__ double2 lds_two<double>(uint32_t address) {
  double2 v;
  asm volatile("ld.shared.v2.f64 {%0,%1}, [%2];" : "=d"(v.x), "=d"(v.y) : "r"(address));
  return v;
}
template <>
__device__ __forceinline__ uint32_t lds_two<bf16>(uint32_t address) {
  uint32_t v;
  asm volatile("ld.shared.b32 %0, [%1];" : "=r"(v) : "r"(address));
  return v;
}
template <>
__device__ __forceinline__ uint32_t lds_two<f16>(uint32_t address) {
  return lds_two<bf16>(address);
}

__device__ __forceinline__ float lds_one(uint32_t address, float) {
  float v;
  asm volatile("ld.shared.f32 %0, [%1];" : "=f"(v) : "r"(address));
  return v;
}
__device__ __forceinline__ double lds_one(uint32_t address, double) {
  double v;
  asm volatile("ld.shared.f64 %0, [%1];" : "=d"(v) : "r"(address));
  return v;
}

__device__ __forceinline__ void sts_two(uint32_t address, uint32_t v) {
  asm volatile("st.shared.b32 [%0], %1;" ::"r"(address), "r"(v) : "memory");
}
__device__ __forceinline__ void sts_two(uint32_t address, float2 v) {
  asm volatile("st.shared.v2.f32 [%0], {%1,%2};" ::"r"(address), "f"(v.x), "f"(v.y) : "memory");
}
__device__ __forceinline__ void sts_two(uint32_t address, double2 v) {
  asm volatile("st.shared.v2.f64 [%0], {%1,%2};" ::"r"(address), "d"(v.x), "d"(v.y) : "memory");
}

__device__ __forceinline__ void sts_one(uint32_t address, float v) {
  asm volatile("st.shared.f32 [%0], %1;" ::"r"(address), "f"(v) : "memory");
}
__device__ __forceinline__ void sts_one(uint32_t address, double v) {
  asm volatile("st.shared.f64 [%0], %1;" ::"r"(address), "d"(v) : "memory");
}
__device__ __forceinline__ void sts_one(uint32_t address, bf16 v) {
  asm volatile("st.shared.b16 [%0], %1;" ::"r"(address), "h"(__bfloat16_as_ushort(v)) : "memory");
}
__device__ __forceinline__ void sts_one(uint32_t address, f16 v) {
  asm volatile("st.shared.b16 [%0], %1;" ::"r"(address), "h"(__half_as_ushort(v)) : "memory");
}

__device__ __forceinline__ void lds_element(uint32_t address, float& v) {
  v = lds_one(address, 0.0f);
}
__device__ __forceinline__ void lds_element(uint32_t address, double& v) {
  v = lds_one(address, 0.0);
}
__device__ __forceinline__ unsigned short lds_short(uint32_t address) {
  unsigned short v;
  asm volatile("ld.shared.b16 %0, [%1];" : "=h"(v) : "r"(address) : "memory");
  return v;
}
__device__ __forceinline__ void lds_element(uint32_t address, bf16& v) {
  v = __ushort_as_bfloat16(lds_short(address));
}
__device__ __forceinline__ void lds_element(uint32_t address, f16& v) {
  v = __ushort_as_half(lds_short(address));
}

__device__ __forceinline__ uint4 lds_16(uint32_t address) {
  uint4 v;
  asm volatile("ld.shared.v4.b32 {%0,%1,%2,%3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "r"(address));
  return v;
}

// 16 bytes to shared memory, of which `bytes` are read and the rest are zero.
__device__ __forceinline__ void copy_16(uint32_t dst, const void* src, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(dst), "l"(src), "r"(bytes)
               : "memory");
}
__device__ __forceinline__ void copy_16(uint32_t dst, const void* src) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(dst), "l"(src) : "memory");
}
__device__ __forceinline__ void copy_commit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
template <int kPending>
__device__ __forceinline__ void copy_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Fills a tile of kRows x kCols from rows of a tensor; rows and columns beyond the valid ones
// become zero and are not read. `vector`: 16-byte copies are allowed on every row start.
template <typename T, int kRows, int kCols, int kThreads>
__device__ __forceinline__ void load_tile(uint32_t tile, const T* src, int64_t stride, int rows,
                                          int cols, bool vector) {
  constexpr int kVec = 16 / sizeof(T);
  constexpr int kPieces = kCols / kVec;
  constexpr int kStep = kThreads / kPieces;  // rows per pass of the block
  static_assert(kThreads % kPieces == 0 && kRows % kStep == 0, "tile does not fit the block");
  int piece = threadIdx.x % kPieces;
  int row = threadIdx.x / kPieces;
  int left = cols - piece * kVec;
  left = left < 0 ? 0 : (left > kVec ? kVec : left);
  const T* p = src + row * stride + (left > 0 ? piece * kVec : 0);
  constexpr int kCopies = kRows / kStep > 4 ? 4 : kRows / kStep;
  if (vector && rows >= kRows && cols >= kCols) {
#pragma unroll kCopies
    for (int i = 0; i < kRows / kStep; ++i, p += kStep * stride) {
      copy_16(tile_address<T>(tile, kRows, row + i * kStep, piece * kVec), p);
    }
  } else if (vector) {
#pragma unroll 1
    for (int i = 0; i < kRows / kStep; ++i, row += kStep, p += kStep * stride) {
      bool inside = row < rows && left > 0;
      copy_16(tile_address<T>(tile, kRows, row, piece * kVec), inside ? p : src,
              inside ? left * static_cast<int>(sizeof(T)) : 0);
    }
  } else {
    // Rare and slow: kept short, since the code is part of every pipeline.
#pragma unroll 1
    for (int i = threadIdx.x; i < kRows * kCols; i += kThreads) {
      int r = i / kCols, col = i % kCols;
      T value = r < rows && col < cols ? src[r * stride + col] : from_acc<T>(Acc<T>(0));
      sts_one(tile_address<T>(tile, kRows, r, col), value);
    }
  }
}

// Copies a tile out to rows of a tensor, up to the valid rows and columns.
template <typename T, int kRows, int kCols, int kThreads>
__device__ __forceinline__ void store_tile(uint32_t tile, T* dst, int64_t stride, int rows,
                                           int cols, bool vector) {
  constexpr int kVec = 16 / sizeof(T);
  constexpr int kPieces = kCols / kVec;
  constexpr int kStep = kThreads / kPieces;
  int piece = threadIdx.x % kPieces;
  cols = cols < kCols ? cols : kCols;
  int whole = vector ? cols / kVec * kVec : 0;
  if (piece * kVec < whole) {
    int row = threadIdx.x / kPieces;
    T* p = dst + row * stride + piece * kVec;
#pragma unroll 4
    for (; row < rows; row += kStep, p += kStep * stride) {
      *reinterpret_cast<uint4*>(p) = lds_16(tile_address<T>(tile, kRows, row, piece * kVec));
    }
  }
  if (whole < cols) {
    int left = cols - whole;
#pragma unroll 1
    for (int i = threadIdx.x; i < rows * left; i += kThreads) {
      int row = i / left, col = whole + i % left;
      lds_element(tile_address<T>(tile, kRows, row, col), dst[row * stride + col]);
    }
  }
}

template <bool kTranspose>
__device__ __forceinline__ void ldmatrix(uint32_t (&r)[4], uint32_t address) {
  if constexpr (kTranspose) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address));
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address));
  }
}

// A block (row0, k0). kTranspose: the tile holds A^T, its rows being k.
template <typename T, bool kTranspose>
__device__ __forceinline__ void load_a(FragA<T>& a, int lane, uint32_t tile, int rows, int row0,
                                       int k0) {
  if constexpr (sizeof(T) == 2) {
    int low = lane & 7, first = (lane >> 3) & 1, second = lane >> 4;
    int row = kTranspose ? k0 + second * 8 + low : row0 + first * 8 + low;
    int col = kTranspose ? row0 + first * 8 : k0 + second * 8;
    ldmatrix<kTranspose>(a.r, tile_address<T>(tile, rows, row, col));
  } else {
    int g = lane >> 2, t = lane & 3;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        int row = row0 + half * 8 + g, k = k0 + j * 8 + 2 * t;
        T* x = &a.x[half * 4 + j * 2];
        if constexpr (kTranspose) {
          x[0] = lds_one(tile_address<T>(tile, rows, k, row), T());
          x[1] = lds_one(tile_address<T>(tile, rows, k + 1, row), T());
        } else {
          unpack<T>(lds_two<T>(tile_address<T>(tile, rows, row, k)), x[0], x[1]);
        }
      }
    }
  }
}

// Two neighbouring B blocks (k0, n0) and (k0, n0 + 8). kTranspose: the tile's rows are k,
// otherwise its rows are n.
template <typename T, bool kTranspose>
__device__ __forceinline__ void load_b(FragB<T> (&b)[2], int lane, uint32_t tile, int rows, int k0,
                                       int n0) {
  if constexpr (sizeof(T) == 2) {
    int low = lane & 7, first = (lane >> 3) & 1, second = lane >> 4;
    int row = kTranspose ? k0 + first * 8 + low : n0 + second * 8 + low;
    int col = kTranspose ? n0 + second * 8 : k0 + first * 8;
    uint32_t r[4];
    ldmatrix<kTranspose>(r, tile_address<T>(tile, rows, row, col));
    b[0].r[0] = r[0];
    b[0].r[1] = r[1];
    b[1].r[0] = r[2];
    b[1].r[1] = r[3];
  } else {
    int g = lane >> 2, t = lane & 3;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        int n = n0 + i * 8 + g, k = k0 + j * 8 + 2 * t;
        T* x = &b[i].x[j * 2];
        if constexpr (kTranspose) {
          x[0] = lds_one(tile_address<T>(tile, rows, k, n), T());
          x[1] = lds_one(tile_address<T>(tile, rows, k + 1, n), T());
        } else {
          unpack<T>(lds_two<T>(tile_address<T>(tile, rows, n, k)), x[0], x[1]);
        }
      }
    }
  }
}

// Unrolling of the contraction: as far as registers last.
template <typename T>
constexpr int kUnroll = 1;
template <>
constexpr int kUnroll<bf16> = 2;

// acc += A B over kK contraction steps from column (row) a_k of A and row b_k of B; the warp's
// part starts at row0 of A and n0 of B. acc may have more blocks (kNa) than are used (kN).
template <typename T, bool kFast, int kM, int kN, int kNa, int kK, bool kTransposeB>
__device__ __forceinline__ void warp_product(Acc<T> (&acc)[kM][kNa][4], uint32_t a_tile, int a_rows,
                                             int row0, int a_k, uint32_t b_tile, int b_rows,
                                             int b_k, int n0, int lane) {
  constexpr int kUnrolled = kTransposeB && kN == 8 ? 1 : kUnroll<T>;
#pragma unroll kUnrolled
  for (int k = 0; k < kK; k += 16) {
    FragA<T> a[kM];
#pragma unroll
    for (int m = 0; m < kM; ++m) {
      load_a<T, false>(a[m], lane, a_tile, a_rows, row0 + m * 16, a_k + k);
    }
#pragma unroll
    for (int n = 0; n < kN; n += 2) {
      FragB<T> b[2];
      load_b<T, kTransposeB>(b, lane, b_tile, b_rows, b_k + k, n0 + n * 8);
#pragma unroll
      for (int m = 0; m < kM; ++m) {
        mma<kFast>(acc[m][n], a[m], b[0]);
        mma<kFast>(acc[m][n + 1], a[m], b[1]);
      }
    }
  }
}

template <typename A>
__device__ __forceinline__ A quad_sum(A x) {
  x += __shfl_xor_sync(0xffffffffu, x, 1);
  return x + __shfl_xor_sync(0xffffffffu, x, 2);
}

template <typename A>
__device__ __forceinline__ A warp_sum(A x) {
#pragma unroll
  for (int bit = 16; bit > 0; bit >>= 1) x += __shfl_xor_sync(0xffffffffu, x, bit);
  return x;
}

// cp.async of one accumulator; zero unless `inside`.
template <typename A>
__device__ __forceinline__ void copy_one(uint32_t dst, const A* src, bool inside) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(dst), "l"(src),
               "n"(static_cast<int>(sizeof(A))), "r"(inside ? static_cast<int>(sizeof(A)) : 0)
               : "memory");
}

template <typename A>
__device__ __forceinline__ A load_any(const void* data, int64_t index, int dtype) {
  switch (dtype) {
    case kF32:
      return static_cast<const float*>(data)[index];
    case kF64:
      return static_cast<A>(static_cast<const double*>(data)[index]);
    case kBf16:
      return to_acc(static_cast<const bf16*>(data)[index]);
    default:
      return to_acc(static_cast<const f16*>(data)[index]);
  }
}

template <typename A>
__device__ __forceinline__ void store_any(void* data, int64_t index, int dtype, A value) {
  switch (dtype) {
    case kF32:
      static_cast<float*>(data)[index] = static_cast<float>(value);
      break;
    case kF64:
      static_cast<double*>(data)[index] = value;
      break;
    case kBf16:
      static_cast<bf16*>(data)[index] = from_acc<bf16>(static_cast<float>(value));
      break;
    default:
      static_cast<f16*>(data)[index] = from_acc<f16>(static_cast<float>(value));
  }
}

// Sides of the stored chunk states, padded so that every row takes 16-byte copies and whole tiles.
__device__ __forceinline__ int padded(int dim) { return (dim + 63) & ~63; }

}  // namespace mlstm
