// The forward for f16; see forward_sm90.cuh.
#include "forward_sm90.cuh"

MLSTM_HOPPER_SHAPES(MLSTM_FORWARD, hopper_forward_f16, mlstm::f16)
MLSTM_HOPPER_SHAPES(MLSTM_CATCH_UP, hopper_catch_up_f16, mlstm::f16)
MLSTM_HOPPER_SPLIT(MLSTM_FORWARD, hopper_forward_f16, mlstm::f16)
