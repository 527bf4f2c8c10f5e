// dk from the chunk states, k.dk partials (qk_tiles as in dq); see sweep.cuh.
//
// dk_DT_X: X in {1, 2, 4} blocks of 64 output columns per thread block (f32, f64: 1);
// 256 threads; SweepOf<DT, X>::kBytes of shared memory;
// grid = num_chunks * NH * (L / 64) * ceil(DHQK / (64 X))
#include "sweep.cuh"

MLSTM_SWEEPS(dk, kDk)
