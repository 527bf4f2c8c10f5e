// The sweep for dv; see backward_sm90.cuh.
#include "backward_sweep_sm90.cuh"

MLSTM_SWEEPS(backward_dv_bf16, mlstm::bf16, mlstm::Sweep::kDv)
MLSTM_SWEEPS(backward_dv_f16, mlstm::f16, mlstm::Sweep::kDv)
MLSTM_SPLIT_SWEEP(backward_dv_bf16, mlstm::bf16, mlstm::Sweep::kDv)
MLSTM_SPLIT_SWEEP(backward_dv_f16, mlstm::f16, mlstm::Sweep::kDv)
