// Forward outputs: h and N from the chunk states; see sweep.cuh.
//
// outputs_DT_small          64 rows (f64: 32) and columns; SmallSweep<DT>::kBytes of shared memory
// outputs_DT_{64,128,256}   128 rows (L = 128), that many columns; WideSweep<DT, columns>::kBytes
// 256 threads; grid = num_chunks * NH * ceil(L / rows) * ceil(DHHV / columns)
#include "sweep.cuh"

MLSTM_SMALL_SWEEP(outputs_bf16_small, mlstm::bf16, kH)
MLSTM_SMALL_SWEEP(outputs_f16_small, mlstm::f16, kH)
MLSTM_SMALL_SWEEP(outputs_f32_small, float, kH)
MLSTM_SMALL_SWEEP(outputs_f64_small, double, kH)
MLSTM_WIDE_SWEEP(outputs_bf16, mlstm::bf16, 64, kH)
MLSTM_WIDE_SWEEP(outputs_bf16, mlstm::bf16, 128, kH)
MLSTM_WIDE_SWEEP(outputs_bf16, mlstm::bf16, 256, kH)
MLSTM_WIDE_SWEEP(outputs_f16, mlstm::f16, 64, kH)
MLSTM_WIDE_SWEEP(outputs_f16, mlstm::f16, 128, kH)
MLSTM_WIDE_SWEEP(outputs_f16, mlstm::f16, 256, kH)
