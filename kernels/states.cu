// Forward states: C_c, n_c before each chunk and after the last; c_last, n_last.
//
// states_DT      64 x 64 state tiles, 128 threads, SmallStates<T>::kBytes of shared memory
// states_DT_big  128 x 128 (f16: 64 x 128) tiles, 256 threads, BigStates<T>::kBytes (16-bit types)
// grid = R * NH * ceil(DHQK / tile) * ceil(DHHV / tile)
#include "states.cuh"

using namespace mlstm;

#define GEOMETRY(name, shape) \
  MLSTM_GEOMETRY(name, shape::kM, shape::kN, shape::kThreads, shape::kBytes)

#define SMALL(name, T)                                                      \
  extern "C" __global__ void __launch_bounds__(128, sizeof(T) == 2 ? 4 : 1) \
      name(const __grid_constant__ Args args) {                             \
    run_states<T, SmallStates<T>, false>(args);                             \
  }                                                                         \
  GEOMETRY(name, SmallStates<T>)
#define BIG(name, T)                                                                             \
  extern "C" __global__ void __launch_bounds__(256, 2) name(const __grid_constant__ Args args) { \
    run_states<T, BigStates<T>, false>(args);                                                    \
  }                                                                                              \
  GEOMETRY(name, BigStates<T>)

SMALL(states_bf16, bf16)
SMALL(states_f16, f16)
SMALL(states_f32, float)
SMALL(states_f64, double)
BIG(states_bf16_big, bf16)
BIG(states_f16_big, f16)
