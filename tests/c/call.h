/* Valid calls of every operation, in fenced memory, for tests to spoil one argument at a time. */
#ifndef MLSTM_TESTS_CALL_H
#define MLSTM_TESTS_CALL_H

#include <mlstm.h>

#include "fence.h"

enum { MAX_MEMBERS = 32, POISON = 0xa5 };

enum role {
  IN,
  OUT,
  /* State pools are read, and without a destination written. */
  POOL,
};

/* A tensor member of an argument struct. */
struct member {
  const char* name;
  size_t offset;
  enum role role;
  int optional;
  /* One letter per dimension: Batch, Heads, Seq, Key dim, Value dim, Rows of the states, pool Lots,
   * Offsets (num_seqs + 1). */
  const char* dims;
  /* Data, gate, state, compute, index or flag: 'd' 'g' 's' 'c' 'i' 'b'. */
  char kind;
};

struct call {
  mlstm_op op;
  const struct member* members;
  int count;
  mlstm_problem problem;
  union {
    mlstm_fw_args fw;
    mlstm_bw_args bw;
    mlstm_step_args step;
  } args;
  /* Memory of each member, then the workspace's. */
  struct fence memory[MAX_MEMBERS + 1];
};

/* What varies between calls; zero gives the plainest. */
struct options {
  /* Three sequences in cu_seqlens, one of them empty. */
  int packed;
  /* Separate destination pools. */
  int separate;
  /* Large enough to be spread over worker threads. */
  int large;
  mlstm_gate gate;
  mlstm_dtype dtype;
  mlstm_dtype index_dtype;
};

/* A call that succeeds. Outputs are poisoned, inputs random, all optional members present. */
void call_init(struct call* call, mlstm_op op, struct options options);
void call_free(struct call* call);
mlstm_status call_run(struct call* call);

mlstm_tensor* call_tensor(struct call* call, int member);
/* The index of the member of that name. */
int call_find(const struct call* call, const char* name);
/* Sets element `index` of an index or flag tensor. */
void call_set(struct call* call, const char* name, int index, int64_t value);
/* Whether the call writes to that member. */
int call_writes(const struct call* call, int member);
/* Fills the outputs with a byte. */
void call_poison(struct call* call, int byte);

size_t dtype_size(mlstm_dtype dtype);
const char* op_name(mlstm_op op);

#endif
