// Products of a warpgroup (wgmma): D (64 x N, float) += A (64 x 16) B (16 x N), A from registers or
// shared memory, B from shared memory, for bf16 and f16. N follows from the size of D.
//
// A warp w of the group holds rows 16 w + g and 16 w + g + 8 (g = lane / 4, t = lane % 4) of A and
// D; D in blocks of 8 columns: d[4 j], d[4 j + 1] are columns 8 j + 2 t, + 1 of the first row,
// d[4 j + 2], d[4 j + 3] of the second. Thus d[8 k ... 8 k + 7], packed in pairs, is the A of
// columns 16 k ... 16 k + 15.
//
// Shared memory holds tiles of 128-byte rows, swizzled by 128 bytes (16-byte piece p of row r lies
// at p ^ (r % 8)), each aligned to 1024 bytes.
#pragma once

#include "mma.cuh"

namespace mlstm {

__device__ __forceinline__ void wgmma_fence() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ __forceinline__ void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
// Waits until at most kPending committed groups are in flight.
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// An operand in shared memory. Contraction along the 128-byte rows: `stride` is the distance of
// groups of 8 rows, `lead` is ignored, the next 16 columns are +2. Contraction across the rows
// (transposed): `stride` as before, `lead` is the distance of 64-column slabs, the next 16 rows are
// + 2 * stride / 16. Addresses within a descriptor count 16 bytes.
__device__ __forceinline__ uint64_t operand(uint32_t tile, uint32_t lead, uint32_t stride) {
  return static_cast<uint64_t>((tile & 0x3ffff) >> 4) | static_cast<uint64_t>(lead >> 4) << 16 |
         static_cast<uint64_t>(stride >> 4) << 32 | 1ull << 62;
}

// Two accumulators as operands; f16 stays finite, in one instruction here.
template <typename T>
__device__ __forceinline__ uint32_t pack_operand(float x, float y) {
  return pack<T>(x, y);
}
template <>
__device__ __forceinline__ uint32_t pack_operand<f16>(float x, float y) {
  uint32_t both;
  asm("cvt.rn.satfinite.f16x2.f32 %0, %2, %1;" : "=r"(both) : "f"(x), "f"(y));
  return both;
}

#define MLSTM_NAMES_0                                                                     \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, " \
  "%19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define MLSTM_NAMES_32                                                                    \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, " \
  "%49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define MLSTM_NAMES_64                                                                    \
  "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, " \
  "%81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define MLSTM_NAMES_96                                                                     \
  "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, " \
  "%111, %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, "   \
  "%125, %126, %127"
#define MLSTM_D4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define MLSTM_D32(i)                                                                 \
  MLSTM_D4(i), MLSTM_D4(i + 4), MLSTM_D4(i + 8), MLSTM_D4(i + 12), MLSTM_D4(i + 16), \
      MLSTM_D4(i + 20), MLSTM_D4(i + 24), MLSTM_D4(i + 28)

#define MLSTM_WGMMA_REGISTERS(T, TYPE, N, D_NAMES, D, A_NAMES, B_NAME, ADD_NAME, TRANS_NAME)       \
  template <int kTransB>                                                                           \
  __device__ __forceinline__ void wgmma(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b,     \
                                        bool add, T) {                                             \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " ADD_NAME                                      \
                 ", 0;\nwgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE             \
                 " {" D_NAMES "}, {" A_NAMES "}, " B_NAME ", p, 1, 1, " TRANS_NAME ";\n}\n"        \
                 : D                                                                               \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(add)), \
                   "n"(kTransB));                                                                  \
  }
#define MLSTM_WGMMA_SHARED(T, TYPE, N, D_NAMES, D, A_NAME, B_NAME, ADD_NAME, TRANS_A, TRANS_B)     \
  template <int kTransA, int kTransB>                                                              \
  __device__ __forceinline__ void wgmma(float (&d)[N / 2], uint64_t a, uint64_t b, bool add, T) {  \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " ADD_NAME                                      \
                 ", 0;\nwgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE             \
                 " {" D_NAMES "}, " A_NAME ", " B_NAME ", p, 1, 1, " TRANS_A ", " TRANS_B ";\n}\n" \
                 : D                                                                               \
                 : "l"(a), "l"(b), "r"(static_cast<int>(add)), "n"(kTransA), "n"(kTransB));        \
  }
#define MLSTM_WGMMA(T, TYPE)                                                                       \
  MLSTM_WGMMA_REGISTERS(T, TYPE, 64, MLSTM_NAMES_0, MLSTM_D32(0), "%32, %33, %34, %35", "%36",     \
                        "%37", "%38")                                                              \
  MLSTM_WGMMA_REGISTERS(T, TYPE, 128, MLSTM_NAMES_0 ", " MLSTM_NAMES_32,                           \
                        MLSTM_LIST(MLSTM_D32(0), MLSTM_D32(32)), "%64, %65, %66, %67", "%68",      \
                        "%69", "%70")                                                              \
  MLSTM_WGMMA_REGISTERS(T, TYPE, 256,                                                              \
                        MLSTM_NAMES_0 ", " MLSTM_NAMES_32 ", " MLSTM_NAMES_64 ", " MLSTM_NAMES_96, \
                        MLSTM_LIST(MLSTM_D32(0), MLSTM_D32(32), MLSTM_D32(64), MLSTM_D32(96)),     \
                        "%128, %129, %130, %131", "%132", "%133", "%134")                          \
  MLSTM_WGMMA_SHARED(T, TYPE, 8, "%0, %1, %2, %3", MLSTM_D4(0), "%4", "%5", "%6", "%7", "%8")      \
  MLSTM_WGMMA_SHARED(T, TYPE, 64, MLSTM_NAMES_0, MLSTM_D32(0), "%32", "%33", "%34", "%35", "%36")  \
  MLSTM_WGMMA_SHARED(T, TYPE, 72, MLSTM_NAMES_0 ", %32, %33, %34, %35",                            \
                     MLSTM_LIST(MLSTM_D32(0), MLSTM_D4(32)), "%36", "%37", "%38", "%39", "%40")
#define MLSTM_LIST(...) __VA_ARGS__
MLSTM_WGMMA(bf16, "bf16")
MLSTM_WGMMA(f16, "f16")

}  // namespace mlstm
