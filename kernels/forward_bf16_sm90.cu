// The forward for bf16; see forward_sm90.cuh.
#include "forward_sm90.cuh"

MLSTM_SMALL_SHAPES(MLSTM_FORWARD, hopper_forward_bf16, mlstm::bf16)
MLSTM_LARGE_SHAPE(MLSTM_FORWARD, hopper_forward_bf16, mlstm::bf16)
MLSTM_SPLIT_SHAPE(MLSTM_FORWARD, hopper_forward_bf16, mlstm::bf16)
MLSTM_SMALL_SHAPES(MLSTM_GATED, hopper_gated_bf16, mlstm::bf16)
MLSTM_SMALL_SHAPES(MLSTM_CATCH_UP, hopper_catch_up_bf16, mlstm::bf16)
MLSTM_LARGE_SHAPE(MLSTM_CATCH_UP, hopper_catch_up_bf16, mlstm::bf16)
