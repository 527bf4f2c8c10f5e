// dq and partial sums of q.dq from the chunk states; see sweep.cuh.
//
// dq_DT_small          64 rows (f64: 32) and columns; SmallSweep<DT>::kBytes of shared memory
// dq_DT_{64,128,256}   128 rows (L = 128), that many columns; WideSweep<DT, columns>::kBytes
// 256 threads; grid = num_chunks * NH * ceil(L / rows) * ceil(DHQK / columns), the last
// factor being qk_tiles
#include "sweep.cuh"

MLSTM_SMALL_SWEEP(dq_bf16_small, mlstm::bf16, kDq)
MLSTM_SMALL_SWEEP(dq_f16_small, mlstm::f16, kDq)
MLSTM_SMALL_SWEEP(dq_f32_small, float, kDq)
MLSTM_SMALL_SWEEP(dq_f64_small, double, kDq)
MLSTM_WIDE_SWEEP(dq_bf16, mlstm::bf16, 64, kDq)
MLSTM_WIDE_SWEEP(dq_bf16, mlstm::bf16, 128, kDq)
MLSTM_WIDE_SWEEP(dq_bf16, mlstm::bf16, 256, kDq)
MLSTM_WIDE_SWEEP(dq_f16, mlstm::f16, 64, kDq)
MLSTM_WIDE_SWEEP(dq_f16, mlstm::f16, 128, kDq)
MLSTM_WIDE_SWEEP(dq_f16, mlstm::f16, 256, kDq)
