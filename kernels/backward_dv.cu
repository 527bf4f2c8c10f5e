// dv from the chunk states; see sweep.cuh.
//
// dv_DT_small          64 rows (f64: 32) and columns; SmallSweep<DT>::kBytes of shared memory
// dv_DT_{64,128,256}   128 rows (L = 128), that many columns; WideSweep<DT, columns>::kBytes
// 256 threads; grid = num_chunks * NH * ceil(L / rows) * ceil(DHHV / columns)
#include "sweep.cuh"

MLSTM_SMALL_SWEEP(dv_bf16_small, mlstm::bf16, kDv)
MLSTM_SMALL_SWEEP(dv_f16_small, mlstm::f16, kDv)
MLSTM_SMALL_SWEEP(dv_f32_small, float, kDv)
MLSTM_SMALL_SWEEP(dv_f64_small, double, kDv)
MLSTM_WIDE_SWEEP(dv_bf16, mlstm::bf16, 64, kDv)
MLSTM_WIDE_SWEEP(dv_bf16, mlstm::bf16, 128, kDv)
MLSTM_WIDE_SWEEP(dv_bf16, mlstm::bf16, 256, kDv)
MLSTM_WIDE_SWEEP(dv_f16, mlstm::f16, 64, kDv)
MLSTM_WIDE_SWEEP(dv_f16, mlstm::f16, 128, kDv)
MLSTM_WIDE_SWEEP(dv_f16, mlstm::f16, 256, kDv)
