// The sweep for dq; see backward_sm90.cuh.
#include "backward_sweep_sm90.cuh"

MLSTM_SWEEPS(backward_dq_bf16, mlstm::bf16, mlstm::Sweep::kDq)
MLSTM_SWEEPS(backward_dq_f16, mlstm::f16, mlstm::Sweep::kDq)
MLSTM_SPLIT_SWEEP(backward_dq_bf16, mlstm::bf16, mlstm::Sweep::kDq)
MLSTM_SPLIT_SWEEP(backward_dq_f16, mlstm::f16, mlstm::Sweep::kDq)
