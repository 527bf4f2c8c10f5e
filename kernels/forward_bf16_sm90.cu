// The forward for bf16; see forward_sm90.cuh.
#include "forward_sm90.cuh"

MLSTM_HOPPER_SHAPES(MLSTM_FORWARD, hopper_forward_bf16, mlstm::bf16)
MLSTM_HOPPER_SHAPES(MLSTM_CATCH_UP, hopper_catch_up_bf16, mlstm::bf16)
MLSTM_HOPPER_SPLIT(MLSTM_FORWARD, hopper_forward_bf16, mlstm::bf16)
