// dv from the chunk states; see sweep.cuh.
//
// dv_DT_X: X in {1, 2, 4} blocks of 64 output columns per thread block (f32, f64: 1);
// 256 threads; SweepOf<DT, X>::kBytes of shared memory;
// grid = num_chunks * NH * (L / 64) * ceil(DHHV / (64 X))
#include "sweep.cuh"

MLSTM_SWEEPS(dv, kDv)
