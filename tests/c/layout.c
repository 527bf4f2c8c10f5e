/* The frozen layout of the ABI's structs on 64-bit targets: a struct may grow at its end, in a new
 * release; nothing in it may move. Compiled as C11 and as C++11. */
#include <stddef.h>
#include <mlstm.h>

#ifndef __cplusplus
#define static_assert _Static_assert
#endif

#define SIZE(type, bytes) static_assert(sizeof(type) == (bytes), "sizeof " #type)
#define AT(type, member, bytes) \
  static_assert(offsetof(type, member) == (bytes), "offset of " #type "." #member)

SIZE(mlstm_problem, 112);
AT(mlstm_problem, struct_size, 0);
AT(mlstm_problem, b, 8);
AT(mlstm_problem, nh, 16);
AT(mlstm_problem, s, 24);
AT(mlstm_problem, dhqk, 32);
AT(mlstm_problem, dhhv, 40);
AT(mlstm_problem, num_seqs, 48);
AT(mlstm_problem, num_slots, 56);
AT(mlstm_problem, qk_scale, 64);
AT(mlstm_problem, eps, 72);
AT(mlstm_problem, flags, 80);
AT(mlstm_problem, gate, 84);
AT(mlstm_problem, device, 88);
AT(mlstm_problem, device_index, 92);
AT(mlstm_problem, dtype, 96);
AT(mlstm_problem, gate_dtype, 100);
AT(mlstm_problem, state_dtype, 104);
AT(mlstm_problem, chunk_size, 108);

SIZE(mlstm_requirements, 40);
AT(mlstm_requirements, struct_size, 0);
AT(mlstm_requirements, workspace_size, 8);
AT(mlstm_requirements, workspace_alignment, 16);
AT(mlstm_requirements, chunk_size, 24);
AT(mlstm_requirements, num_chunks, 32);

SIZE(mlstm_tensor, 80);
AT(mlstm_tensor, data, 0);
AT(mlstm_tensor, shape, 8);
AT(mlstm_tensor, stride, 40);
AT(mlstm_tensor, dtype, 72);
AT(mlstm_tensor, rank, 76);

SIZE(mlstm_fw_args, 1240);
AT(mlstm_fw_args, struct_size, 0);
AT(mlstm_fw_args, problem, 8);
AT(mlstm_fw_args, stream, 16);
AT(mlstm_fw_args, workspace, 24);
AT(mlstm_fw_args, workspace_size, 32);
AT(mlstm_fw_args, q, 40);
AT(mlstm_fw_args, k, 120);
AT(mlstm_fw_args, v, 200);
AT(mlstm_fw_args, i, 280);
AT(mlstm_fw_args, f, 360);
AT(mlstm_fw_args, c_initial, 440);
AT(mlstm_fw_args, n_initial, 520);
AT(mlstm_fw_args, m_initial, 600);
AT(mlstm_fw_args, cu_seqlens, 680);
AT(mlstm_fw_args, h, 760);
AT(mlstm_fw_args, n, 840);
AT(mlstm_fw_args, m, 920);
AT(mlstm_fw_args, c_last, 1000);
AT(mlstm_fw_args, n_last, 1080);
AT(mlstm_fw_args, m_last, 1160);

SIZE(mlstm_bw_args, 1960);
AT(mlstm_bw_args, struct_size, 0);
AT(mlstm_bw_args, problem, 8);
AT(mlstm_bw_args, stream, 16);
AT(mlstm_bw_args, workspace, 24);
AT(mlstm_bw_args, workspace_size, 32);
AT(mlstm_bw_args, q, 40);
AT(mlstm_bw_args, k, 120);
AT(mlstm_bw_args, v, 200);
AT(mlstm_bw_args, i, 280);
AT(mlstm_bw_args, f, 360);
AT(mlstm_bw_args, c_initial, 440);
AT(mlstm_bw_args, n_initial, 520);
AT(mlstm_bw_args, m_initial, 600);
AT(mlstm_bw_args, cu_seqlens, 680);
AT(mlstm_bw_args, h, 760);
AT(mlstm_bw_args, n, 840);
AT(mlstm_bw_args, m, 920);
AT(mlstm_bw_args, dh, 1000);
AT(mlstm_bw_args, dc_last, 1080);
AT(mlstm_bw_args, dn_last, 1160);
AT(mlstm_bw_args, dm_last, 1240);
AT(mlstm_bw_args, dq, 1320);
AT(mlstm_bw_args, dk, 1400);
AT(mlstm_bw_args, dv, 1480);
AT(mlstm_bw_args, di, 1560);
AT(mlstm_bw_args, df, 1640);
AT(mlstm_bw_args, dc_initial, 1720);
AT(mlstm_bw_args, dn_initial, 1800);
AT(mlstm_bw_args, dm_initial, 1880);

SIZE(mlstm_step_args, 1320);
AT(mlstm_step_args, struct_size, 0);
AT(mlstm_step_args, problem, 8);
AT(mlstm_step_args, stream, 16);
AT(mlstm_step_args, workspace, 24);
AT(mlstm_step_args, workspace_size, 32);
AT(mlstm_step_args, q, 40);
AT(mlstm_step_args, k, 120);
AT(mlstm_step_args, v, 200);
AT(mlstm_step_args, i, 280);
AT(mlstm_step_args, f, 360);
AT(mlstm_step_args, c, 440);
AT(mlstm_step_args, n, 520);
AT(mlstm_step_args, m, 600);
AT(mlstm_step_args, c_dst, 680);
AT(mlstm_step_args, n_dst, 760);
AT(mlstm_step_args, m_dst, 840);
AT(mlstm_step_args, src_slots, 920);
AT(mlstm_step_args, dst_slots, 1000);
AT(mlstm_step_args, has_state, 1080);
AT(mlstm_step_args, num_tokens, 1160);
AT(mlstm_step_args, h, 1240);

/* Numbers of flags, statuses and enumerations. */
#define VALUE(name, number) static_assert((name) == (number), #name)

VALUE(MLSTM_FLAG_NO_NORMALIZE, 1);
VALUE(MLSTM_FLAG_DETACH_DENOMINATOR, 2);
VALUE(MLSTM_FLAG_NO_EPS, 4);
VALUE(MLSTM_FLAG_ALLOW_TF32, 8);
VALUE(MLSTM_FLAG_GENERIC_ENGINE, 16);
VALUE(MLSTM_FLAG_ALIGNED, 32);
VALUE(MLSTM_OK, 0);
VALUE(MLSTM_INVALID_ARGUMENT, 1);
VALUE(MLSTM_UNSUPPORTED, 2);
VALUE(MLSTM_WORKSPACE_TOO_SMALL, 3);
VALUE(MLSTM_DEVICE_ERROR, 4);
VALUE(MLSTM_INTERNAL_ERROR, 5);
VALUE(MLSTM_DTYPE_DEFAULT, 0);
VALUE(MLSTM_F32, 1);
VALUE(MLSTM_F64, 2);
VALUE(MLSTM_BF16, 3);
VALUE(MLSTM_F16, 4);
VALUE(MLSTM_I32, 5);
VALUE(MLSTM_I64, 6);
VALUE(MLSTM_U8, 7);
VALUE(MLSTM_DEVICE_CPU, 1);
VALUE(MLSTM_DEVICE_CUDA, 2);
VALUE(MLSTM_GATE_EXP, 0);
VALUE(MLSTM_GATE_SIGMOID, 1);
VALUE(MLSTM_OP_CHUNKWISE_FW, 1);
VALUE(MLSTM_OP_CHUNKWISE_BW, 2);
VALUE(MLSTM_OP_PARALLEL_FW, 3);
VALUE(MLSTM_OP_PARALLEL_BW, 4);
VALUE(MLSTM_OP_STEP, 5);

/* Enumerations are 32-bit on every compiler, since they are no C enums. */
SIZE(mlstm_status, 4);
SIZE(mlstm_op, 4);
SIZE(mlstm_gate, 4);
SIZE(mlstm_device, 4);
SIZE(mlstm_dtype, 4);

int main(void) { return 0; }
