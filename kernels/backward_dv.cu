// dv from the chunk states; see sweep.cuh.
//
// dv_DT_small          64 rows (f64: 32) and columns; SmallSweep<DT>::kBytes of shared memory
// dv_DT_{64,128,256}   128 rows (L = 128), that many columns; WideSweep<DT, columns>::kBytes
// 256 threads; grid = num_chunks * NH * ceil(L / rows) * ceil(DHHV / columns)
#include "sweep.cuh"

MLSTM_ALL_SWEEPS(dv, kDv)
