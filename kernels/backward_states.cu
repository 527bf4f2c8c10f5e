// The reverse sweep: dC, dn after each chunk and before the first, E per chunk, e_first,
// dc_initial and dn_initial. Needs the forward states (all slots), inv and delta.
//
// dstates_DT      64 x 64 state tiles, 128 threads, SmallStates<T>::kReverseBytes of shared memory
// dstates_DT_big  128 x 128 (f16: 64 x 128) tiles, 256 threads, BigStates<T>::kReverseBytes
//                (16-bit types)
// grid = R * NH * ceil(DHQK / tile) * ceil(DHHV / tile); e_tiles = the last two factors
#include "states.cuh"

using namespace mlstm;

MLSTM_ALL_STATES(dstates, true)
