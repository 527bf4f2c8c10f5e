// The sweeps for the states of segments; see backward_sm90.cuh.
#include "backward_sweep_sm90.cuh"

MLSTM_SWEEPS(backward_c_bf16, mlstm::bf16, mlstm::Sweep::kC)
MLSTM_SWEEPS(backward_c_f16, mlstm::f16, mlstm::Sweep::kC)
MLSTM_SWEEPS(backward_dc_bf16, mlstm::bf16, mlstm::Sweep::kDc)
MLSTM_SWEEPS(backward_dc_f16, mlstm::f16, mlstm::Sweep::kDc)
