// Forward states: C_c, n_c before each chunk and after the last; c_last, n_last.
//
// states_DT      64 x 64 state tiles, 128 threads, SmallStates<T>::kBytes of shared memory
// states_DT_big  128 x 128 (f16: 64 x 128) tiles, 256 threads, BigStates<T>::kBytes (16-bit types)
// grid = R * NH * ceil(DHQK / tile) * ceil(DHHV / tile)
#include "states.cuh"

using namespace mlstm;

MLSTM_ALL_STATES(states, false)
