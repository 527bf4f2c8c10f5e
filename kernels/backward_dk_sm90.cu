// The sweep for dk; see backward_sm90.cuh.
#include "backward_sweep_sm90.cuh"

MLSTM_SWEEPS(backward_dk_bf16, mlstm::bf16, mlstm::Sweep::kDk)
MLSTM_SWEEPS(backward_dk_f16, mlstm::f16, mlstm::Sweep::kDk)
MLSTM_SPLIT_SWEEP(backward_dk_bf16, mlstm::bf16, mlstm::Sweep::kDk)
MLSTM_SPLIT_SWEEP(backward_dk_f16, mlstm::f16, mlstm::Sweep::kDk)
