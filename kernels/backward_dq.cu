// dq and partial sums of q.dq from the chunk states; see sweep.cuh.
//
// dq_DT_small          64 rows (f64: 32) and columns; SmallSweep<DT>::kBytes of shared memory
// dq_DT_{64,128,256}   128 rows (L = 128), that many columns; WideSweep<DT, columns>::kBytes
// 256 threads; grid = num_chunks * NH * ceil(L / rows) * ceil(DHQK / columns), the last
// factor being qk_tiles
#include "sweep.cuh"

MLSTM_ALL_SWEEPS(dq, kDq)
