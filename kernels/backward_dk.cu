// dk and partial sums of k.dk from the chunk states; see sweep.cuh.
//
// dk_DT_small          64 rows (f64: 32) and columns; SmallSweep<DT>::kBytes of shared memory
// dk_DT_{64,128,256}   128 rows (L = 128), that many columns; WideSweep<DT, columns>::kBytes
// 256 threads; grid = num_chunks * NH * ceil(L / rows) * ceil(DHQK / columns), the last
// factor being qk_tiles
#include "sweep.cuh"

MLSTM_SMALL_SWEEP(dk_bf16_small, mlstm::bf16, kDk)
MLSTM_SMALL_SWEEP(dk_f16_small, mlstm::f16, kDk)
MLSTM_SMALL_SWEEP(dk_f32_small, float, kDk)
MLSTM_SMALL_SWEEP(dk_f64_small, double, kDk)
MLSTM_WIDE_SWEEP(dk_bf16, mlstm::bf16, 64, kDk)
MLSTM_WIDE_SWEEP(dk_bf16, mlstm::bf16, 128, kDk)
MLSTM_WIDE_SWEEP(dk_bf16, mlstm::bf16, 256, kDk)
MLSTM_WIDE_SWEEP(dk_f16, mlstm::f16, 64, kDk)
MLSTM_WIDE_SWEEP(dk_f16, mlstm::f16, 128, kDk)
MLSTM_WIDE_SWEEP(dk_f16, mlstm::f16, 256, kDk)
