// The reverse sweep: dC, dn after each chunk and before the first, E per chunk, e_first,
// dc_initial and dn_initial. Needs the forward states (all slots), inv and delta.
//
// dstates_DT      64 x 64 state tiles, 128 threads, SmallStates<T>::kReverseBytes of shared memory
// dstates_DT_big  128 x 128 (f16: 64 x 128) tiles, 256 threads, BigStates<T>::kReverseBytes
//                (16-bit types)
// grid = R * NH * ceil(DHQK / tile) * ceil(DHHV / tile); e_tiles = the last two factors
#include "states.cuh"

using namespace mlstm;

#define GEOMETRY(name, shape) \
  MLSTM_GEOMETRY(name, shape::kM, shape::kN, shape::kThreads, shape::kReverseBytes)

#define SMALL(name, T)                                                      \
  extern "C" __global__ void __launch_bounds__(128, sizeof(T) == 2 ? 4 : 1) \
      name(const __grid_constant__ Args args) {                             \
    run_states<T, SmallStates<T>, true>(args);                              \
  }                                                                         \
  GEOMETRY(name, SmallStates<T>)
#define BIG(name, T)                                                                             \
  extern "C" __global__ void __launch_bounds__(256, 2) name(const __grid_constant__ Args args) { \
    run_states<T, BigStates<T>, true>(args);                                                     \
  }                                                                                              \
  GEOMETRY(name, BigStates<T>)

SMALL(dstates_bf16, bf16)
SMALL(dstates_f16, f16)
SMALL(dstates_f32, float)
SMALL(dstates_f64, double)
BIG(dstates_bf16_big, bf16)
BIG(dstates_f16_big, f16)
