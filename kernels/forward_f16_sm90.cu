// The forward for f16; see forward_sm90.cuh.
#include "forward_sm90.cuh"

MLSTM_SMALL_SHAPES(MLSTM_FORWARD, hopper_forward_f16, mlstm::f16)
MLSTM_LARGE_SHAPE(MLSTM_FORWARD, hopper_forward_f16, mlstm::f16)
MLSTM_SPLIT_SHAPE(MLSTM_FORWARD, hopper_forward_f16, mlstm::f16)
MLSTM_SMALL_SHAPES(MLSTM_GATED, hopper_gated_f16, mlstm::f16)
MLSTM_SMALL_SHAPES(MLSTM_CATCH_UP, hopper_catch_up_f16, mlstm::f16)
MLSTM_LARGE_SHAPE(MLSTM_CATCH_UP, hopper_catch_up_f16, mlstm::f16)
