/* The contract of the C ABI: every bad argument is refused with its status and a message that names
 * the argument, what was expected and what came; and then nothing at all has been written. */
#include <limits.h>
#include <math.h>
#include <stdio.h>
#include <string.h>

#include "call.h"
#include "test.h"

enum { UNKNOWN = 99, MESSAGE_SIZE = 100 };

static const mlstm_op all_ops[] = {MLSTM_OP_CHUNKWISE_FW, MLSTM_OP_CHUNKWISE_BW,
                                   MLSTM_OP_PARALLEL_FW, MLSTM_OP_PARALLEL_BW, MLSTM_OP_STEP};
#define FOR_EACH_OP(op) for (const mlstm_op* op = all_ops; op != all_ops + 5; op++)

/* ---- Running a call that must be refused --------------------------------------------------- */

static void take_copies(const struct call* call, void* copies[]) {
  for (int index = 0; index <= MAX_MEMBERS; index++) {
    const struct fence* memory = &call->memory[index];
    copies[index] = NULL;
    if (!memory->map) continue;
    copies[index] = malloc(memory->size ? memory->size : 1);
    memcpy(copies[index], memory->data, memory->size);
  }
}

/* Checks that memory is as in the copies, and frees them. */
static void check_untouched(const struct call* call, void* copies[], const char* what, int line) {
  for (int index = 0; index <= MAX_MEMBERS; index++) {
    const struct fence* memory = &call->memory[index];
    if (!memory->map) continue;
    const char* name = index < call->count ? call->members[index].name : "workspace";
    /* The workspace is the call's own, whatever it returns; but not what lies around it. */
    test_check(index == MAX_MEMBERS || memcmp(copies[index], memory->data, memory->size) == 0,
               __FILE__, line, "%s, %s: wrote to %s", op_name(call->op), what, name);
    test_check(fence_intact(memory), __FILE__, line, "%s, %s: wrote before %s", op_name(call->op),
               what, name);
    free(copies[index]);
  }
}

/* `start` is how the message begins, `inside` what it contains. */
static void check_refused(struct call* call, mlstm_status status, const char* start,
                          const char* inside, const char* what, int line) {
  void* copies[MAX_MEMBERS + 1];
  take_copies(call, copies);
  mlstm_status got = call_run(call);
  const char* message = mlstm_last_error();
  test_check(got == status, __FILE__, line, "%s, %s: %s instead of %s (%s)", op_name(call->op),
             what, mlstm_status_name(got), mlstm_status_name(status), message);
  test_check(strncmp(message, start, strlen(start)) == 0 && strstr(message, inside), __FILE__, line,
             "%s, %s: the message is \"%s\", not \"%s ... %s\"", op_name(call->op), what, message,
             start, inside);
  if (status == MLSTM_INVALID_ARGUMENT || status == MLSTM_WORKSPACE_TOO_SMALL) {
    test_check(strstr(message, ": expected ") && strstr(message, ", got "), __FILE__, line,
               "%s, %s: \"%s\" does not say what was expected and what came", op_name(call->op),
               what, message);
  }
  check_untouched(call, copies, what, line);
}

/* Spoils a fresh call `c` of `op` by `change` and expects the status and the message's start. */
#define REFUSED(op, options, status, start, change)         \
  do {                                                      \
    struct call call, *c = &call;                           \
    call_init(c, op, options);                              \
    change;                                                 \
    check_refused(c, status, start, "", #change, __LINE__); \
    call_free(c);                                           \
  } while (0)

#define INVALID(op, start, change) \
  REFUSED(op, ((struct options){0}), MLSTM_INVALID_ARGUMENT, start, change)

/* ---- Valid calls -------------------------------------------------------------------------- */

/* Also: every output element is written, and only those; the same bits each time. */
static void check_accepted(mlstm_op op, struct options options) {
  struct call call;
  call_init(&call, op, options);
  void *before[MAX_MEMBERS + 1], *first[MAX_MEMBERS + 1];
  take_copies(&call, before);
  CHECK_MSG(call_run(&call) == MLSTM_OK, "%s: %s", op_name(op), mlstm_last_error());
  CHECK(strcmp(mlstm_last_error(), "") == 0);
  take_copies(&call, first);
  for (int index = 0; index < call.count; index++) {
    const struct member* member = &call.members[index];
    const struct fence* memory = &call.memory[index];
    if (!memory->map) continue;
    CHECK_MSG(fence_intact(memory), "%s: wrote before %s", op_name(op), member->name);
    if (!call_writes(&call, index)) {
      CHECK_MSG(memcmp(memory->data, before[index], memory->size) == 0, "%s: wrote to %s",
                op_name(op), member->name);
    }
    if (call_writes(&call, index)) memcpy(memory->data, before[index], memory->size);
  }
  call_poison(&call, 0x3c);
  CHECK(call_run(&call) == MLSTM_OK);
  for (int index = 0; index <= MAX_MEMBERS; index++) {
    int output = index < call.count && call_writes(&call, index);
    /* Slots of a separate pool that no row writes keep what they had. */
    if (output && call.memory[index].map && !options.separate) {
      CHECK_MSG(memcmp(call.memory[index].data, first[index], call.memory[index].size) == 0,
                "%s: %s differs in the second call, or was not written completely", op_name(op),
                call.members[index].name);
    }
    free(before[index]);
    free(first[index]);
  }
  call_free(&call);
}

static void valid_calls(void) {
  static const mlstm_dtype dtypes[] = {MLSTM_F32, MLSTM_F64, MLSTM_BF16, MLSTM_F16};
  static const mlstm_dtype indices[] = {MLSTM_I32, MLSTM_I64};
  FOR_EACH_OP(op) {
    for (int variant = 0; variant < 32; variant++) {
      struct options options = {0};
      options.dtype = dtypes[variant & 3];
      options.gate = variant & 4 ? MLSTM_GATE_SIGMOID : MLSTM_GATE_EXP;
      options.index_dtype = indices[variant >> 3 & 1];
      options.packed = *op != MLSTM_OP_STEP && variant & 16;
      options.separate = *op == MLSTM_OP_STEP && variant & 16;
      check_accepted(*op, options);
    }
  }
}

static void optional_members(void) {
  FOR_EACH_OP(op) {
    struct call call;
    call_init(&call, *op, (struct options){.separate = *op == MLSTM_OP_STEP});
    for (int index = 0; index < call.count; index++) {
      if (call.members[index].optional) {
        memset(call_tensor(&call, index), 0, sizeof(mlstm_tensor));
      }
    }
    if (*op == MLSTM_OP_STEP) call.problem.num_slots = 4;
    CHECK_MSG(call_run(&call) == MLSTM_OK, "%s: %s", op_name(*op), mlstm_last_error());
    call_free(&call);
  }
}

/* A batch without rows and a sequence without tokens are valid, and leave states as they were. */
static void empty_calls(void) {
  FOR_EACH_OP(op) {
    struct call call;
    call_init(&call, *op, (struct options){0});
    call.problem.nh = 0;
    for (int index = 0; index < call.count; index++) {
      mlstm_tensor* tensor = call_tensor(&call, index);
      if (tensor->rank > 1) tensor->shape[1] = 0;
      if (tensor->rank > 1) tensor->data = NULL;
    }
    CHECK_MSG(call_run(&call) == MLSTM_OK, "%s: %s", op_name(*op), mlstm_last_error());
    call_free(&call);
  }
  struct call call;
  call_init(&call, MLSTM_OP_CHUNKWISE_FW, (struct options){0});
  call.problem.s = 0;
  static const char* const tokens[] = {"q", "k", "v", "i", "f", "h", "n", "m"};
  for (int index = 0; index < 8; index++) {
    mlstm_tensor* tensor = call_tensor(&call, call_find(&call, tokens[index]));
    tensor->shape[2] = 0;
    tensor->data = NULL;
  }
  CHECK_MSG(call_run(&call) == MLSTM_OK, "%s", mlstm_last_error());
  static const char* const states[][2] = {
      {"c_initial", "c_last"}, {"n_initial", "n_last"}, {"m_initial", "m_last"}};
  for (int index = 0; index < 3; index++) {
    const struct fence* from = &call.memory[call_find(&call, states[index][0])];
    const struct fence* to = &call.memory[call_find(&call, states[index][1])];
    CHECK_MSG(memcmp(from->data, to->data, to->size) == 0, "%s", states[index][1]);
  }
  call_free(&call);
}

/* ---- Tensors: each member of each struct, spoiled in each way ------------------------------ */

/* The dtype that a member may not have. */
static mlstm_dtype wrong_dtype(const mlstm_tensor* tensor) {
  return tensor->dtype == MLSTM_F64 ? MLSTM_F32 : MLSTM_F64;
}

/* Spoils `tensor` in the `way`-th way. Returns the message's expected start, or NULL when the way
 * does not apply to this member, or the empty string when there are no more ways. */
static const char* spoil(const struct member* member, mlstm_tensor* tensor, int written, int way) {
  static char start[MESSAGE_SIZE];
  int last = tensor->rank - 1;
  /* The first dimension may have a single row, whose stride does not matter. */
  int outer = last > 0;
  const char* field = "";
  int feature = member->dims[last] == 'K' || member->dims[last] == 'V';
  switch (way) {
    case 0:
      tensor->rank++;
      field = tensor->rank > 4 ? ".rank: expected 0 to 4, got 5" : ".rank";
      break;
    case 1:
      tensor->rank--;
      field = ".rank";
      break;
    case 2:
      tensor->rank = -1;
      field = ".rank: expected 0 to 4, got -1";
      break;
    case 3:
    case 4:
    case 5:
    case 6:
      if (way - 3 > last) return NULL;
      tensor->shape[way - 3]++;
      field = ".shape";
      break;
    case 7:
      tensor->shape[0] = -1;
      field = ".shape: expected sizes >= 0";
      break;
    case 8:
      tensor->dtype = wrong_dtype(tensor);
      field = ".dtype";
      break;
    case 9:
      tensor->dtype = UNKNOWN;
      field = ".dtype: expected one of MLSTM_F32 ... MLSTM_U8, got 99";
      break;
    case 10:
      tensor->dtype = MLSTM_DTYPE_DEFAULT;
      field = ".dtype";
      break;
    case 11:
      tensor->data = NULL;
      field = ".data: expected a pointer, got null";
      break;
    case 12:
      if (tensor->dtype == MLSTM_U8) return NULL;
      tensor->data = (char*)tensor->data + 1;
      field = ".data: expected an address that is a multiple of ";
      break;
    case 13:
      if (!feature) return NULL;
      tensor->stride[last] = 2;
      field = ".stride[";
      break;
    case 14:
      if (!feature) return NULL;
      tensor->stride[last] = -1;
      field = ".stride[";
      break;
    case 15:
      tensor->stride[outer] = LLONG_MAX / (int64_t)dtype_size(tensor->dtype);
      field = ".stride: expected strides that stay within the address space";
      break;
    case 16:
      tensor->stride[outer] = LLONG_MIN / (int64_t)dtype_size(tensor->dtype);
      field = ".stride: expected strides that stay within the address space";
      break;
    case 17:
      if (!written || tensor->rank < 2) return NULL;
      tensor->stride[1] = 0;
      field = ".stride: expected strides that give every element its own memory";
      break;
    case 18:
      if (!written || tensor->rank < 3) return NULL;
      tensor->stride[1] = tensor->stride[2];
      field = ".stride: expected strides that give every element its own memory";
      break;
    default:
      return "";
  }
  snprintf(start, sizeof start, "%s%s", member->name, field);
  return start;
}

static void spoil_all(mlstm_op op, struct options options) {
  struct call call;
  call_init(&call, op, options);
  for (int index = 0; index < call.count; index++) {
    const struct member* member = &call.members[index];
    mlstm_tensor* tensor = call_tensor(&call, index);
    if (!call.memory[index].map) continue;
    const mlstm_tensor good = *tensor;
    for (int way = 0;; way++) {
      const char* start = spoil(member, tensor, call_writes(&call, index), way);
      if (start && !*start) break;
      if (start) {
        char what[MESSAGE_SIZE];
        snprintf(what, sizeof what, "%s spoiled in way %d", member->name, way);
        check_refused(&call, MLSTM_INVALID_ARGUMENT, start, "", what, __LINE__);
      }
      *tensor = good;
    }
    if (!member->optional) {
      memset(tensor, 0, sizeof *tensor);
      check_refused(&call, MLSTM_INVALID_ARGUMENT, member->name, "", "absent member", __LINE__);
      *tensor = good;
    }
  }
  call_free(&call);
}

static void spoiled_tensors(void) {
  FOR_EACH_OP(op) {
    spoil_all(*op, (struct options){0});
    if (*op == MLSTM_OP_STEP) {
      spoil_all(*op, (struct options){.separate = 1, .index_dtype = MLSTM_I64});
    } else {
      spoil_all(*op, (struct options){.packed = 1});
    }
  }
}

/* c, n and m come all together or not at all. */
static void incomplete_states(void) {
  static const struct {
    mlstm_op op;
    const char* names[3];
  } triples[] = {
      {MLSTM_OP_CHUNKWISE_FW, {"c_initial", "n_initial", "m_initial"}},
      {MLSTM_OP_CHUNKWISE_FW, {"c_last", "n_last", "m_last"}},
      {MLSTM_OP_PARALLEL_BW, {"c_initial", "n_initial", "m_initial"}},
      {MLSTM_OP_CHUNKWISE_BW, {"dc_initial", "dn_initial", "dm_initial"}},
      {MLSTM_OP_STEP, {"c_dst", "n_dst", "m_dst"}},
  };
  for (size_t triple = 0; triple < sizeof triples / sizeof *triples; triple++) {
    for (int absent = 0; absent < 3; absent++) {
      struct call call;
      call_init(&call, triples[triple].op, (struct options){.separate = 1});
      const char* name = triples[triple].names[absent];
      memset(call_tensor(&call, call_find(&call, name)), 0, sizeof(mlstm_tensor));
      check_refused(&call, MLSTM_INVALID_ARGUMENT, name, "all or none of", name, __LINE__);
      call_free(&call);
    }
  }
  INVALID(MLSTM_OP_CHUNKWISE_BW, "dc_initial: expected absent without c_initial", {
    memset(&c->args.bw.c_initial, 0, sizeof(mlstm_tensor));
    memset(&c->args.bw.n_initial, 0, sizeof(mlstm_tensor));
    memset(&c->args.bw.m_initial, 0, sizeof(mlstm_tensor));
  });
}

/* The sigmoid gate has no m anywhere. */
static void unwanted_stabilizers(void) {
  const struct options sigmoid = {.gate = MLSTM_GATE_SIGMOID, .separate = 1};
  FOR_EACH_OP(op) {
    struct call with, call;
    call_init(&with, *op, (struct options){.separate = 1});
    call_init(&call, *op, sigmoid);
    for (int index = 0; index < call.count; index++) {
      const struct member* member = &call.members[index];
      if (call.memory[index].map || strcmp(member->name, "cu_seqlens") == 0) continue;
      *call_tensor(&call, index) = *call_tensor(&with, index);
      check_refused(&call, MLSTM_INVALID_ARGUMENT, member->name, "absent", member->name, __LINE__);
      memset(call_tensor(&call, index), 0, sizeof(mlstm_tensor));
    }
    call_free(&with);
    call_free(&call);
  }
}

/* ---- Overlap ------------------------------------------------------------------------------ */

static void overlap_all(mlstm_op op, struct options options) {
  struct call call;
  call_init(&call, op, options);
  for (int a = 0; a < call.count; a++) {
    const struct member* first = &call.members[a];
    mlstm_tensor* tensor = call_tensor(&call, a);
    if (!call.memory[a].map) continue;
    void* good = tensor->data;
    for (int b = 0; b <= call.count; b++) {
      const struct fence* other = &call.memory[b < call.count ? b : MAX_MEMBERS];
      const struct member* second = b < call.count ? &call.members[b] : NULL;
      /* The step's destination may be its source; `aliased_pools` looks at that. */
      if (a == b || !other->map || !other->size || (second && first->dims == second->dims))
        continue;
      if (!call_writes(&call, a) && second && !call_writes(&call, b)) continue;
      /* The other's last whole element, so that the views share only a little. */
      size_t item = dtype_size(tensor->dtype);
      uintptr_t end = (uintptr_t)other->data + other->size;
      tensor->data = (void*)((end - 1) / item * item);
      char what[MESSAGE_SIZE];
      snprintf(what, sizeof what, "%s over %s", first->name, second ? second->name : "workspace");
      check_refused(&call, MLSTM_INVALID_ARGUMENT, "", "memory of its own, apart from ", what,
                    __LINE__);
      const char* message = mlstm_last_error();
      CHECK_MSG(
          strstr(message, first->name) && strstr(message, second ? second->name : "workspace"),
          "%s: %s", what, message);
      tensor->data = good;
    }
  }
  call_free(&call);
}

static void overlapping_tensors(void) {
  FOR_EACH_OP(op) {
    overlap_all(*op, (struct options){0});
    overlap_all(*op,
                (struct options){.packed = *op != MLSTM_OP_STEP, .separate = *op == MLSTM_OP_STEP});
  }
}

/* A destination that is its source means in place, for all of c, n and m. */
static void aliased_pools(void) {
  struct call call;
  call_init(&call, MLSTM_OP_STEP, (struct options){.separate = 1});
  mlstm_step_args* step = &call.args.step;
  step->c_dst = step->c;
  check_refused(&call, MLSTM_INVALID_ARGUMENT, "c_dst", "all or none", "c_dst is c", __LINE__);
  step->n_dst = step->n;
  step->m_dst = step->m;
  CHECK_MSG(call_run(&call) == MLSTM_OK, "%s", mlstm_last_error());
  call_free(&call);
}

/* Tensors that interleave in one buffer without sharing an element are fine. */
static void interleaved_tensors(void) {
  struct call call;
  call_init(&call, MLSTM_OP_CHUNKWISE_FW, (struct options){0});
  const mlstm_problem* p = &call.problem;
  /* One row per token: q, k, v and h beside each other. */
  size_t width = (size_t)(2 * p->dhqk + 2 * p->dhhv);
  struct fence rows = fence_new((size_t)(p->b * p->nh * p->s) * width * sizeof(float));
  memset(rows.data, 0, rows.size);
  mlstm_tensor* parts[] = {&call.args.fw.q, &call.args.fw.k, &call.args.fw.v, &call.args.fw.h};
  float* at = rows.data;
  for (int part = 0; part < 4; part++) {
    parts[part]->data = at;
    at += parts[part]->shape[3];
    parts[part]->stride[2] = (int64_t)width;
    parts[part]->stride[1] = p->s * (int64_t)width;
    parts[part]->stride[0] = p->nh * p->s * (int64_t)width;
  }
  CHECK_MSG(call_run(&call) == MLSTM_OK, "%s", mlstm_last_error());
  parts[3]->data = (float*)parts[3]->data - 1;
  check_refused(&call, MLSTM_INVALID_ARGUMENT, "h", "apart from", "h over v's last column",
                __LINE__);
  fence_free(&rows);
  call_free(&call);
}

/* ---- Workspace ---------------------------------------------------------------------------- */

static void bad_workspaces(void) {
  FOR_EACH_OP(op) {
    struct call call;
    call_init(&call, *op, (struct options){0});
    mlstm_fw_args* args = &call.args.fw;
    void* good = args->workspace;
    if (args->workspace_size) {
      args->workspace_size--;
      check_refused(&call, MLSTM_WORKSPACE_TOO_SMALL, "workspace: expected at least ",
                    "mlstm_query", "short workspace", __LINE__);
      args->workspace_size++;
      args->workspace = NULL;
      check_refused(&call, MLSTM_INVALID_ARGUMENT, "workspace", "got null", "null workspace",
                    __LINE__);
      args->workspace = (char*)good - 8;
      check_refused(&call, MLSTM_INVALID_ARGUMENT, "workspace", "multiple of 64",
                    "misaligned workspace", __LINE__);
    }
    call_free(&call);
  }
}

/* ---- Structs ------------------------------------------------------------------------------ */

/* Runs `op` with `args` and expects the status and the message's start. */
static void check_raw(struct call* call, const void* args, mlstm_status status, const char* start,
                      int line) {
  mlstm_status got = call->op == MLSTM_OP_STEP           ? mlstm_step(args)
                     : call->op == MLSTM_OP_CHUNKWISE_BW ? mlstm_chunkwise_bw(args)
                     : call->op == MLSTM_OP_PARALLEL_BW  ? mlstm_parallel_bw(args)
                     : call->op == MLSTM_OP_CHUNKWISE_FW ? mlstm_chunkwise_fw(args)
                                                         : mlstm_parallel_fw(args);
  test_check(got == status, __FILE__, line, "%s: %s (%s)", op_name(call->op),
             mlstm_status_name(got), mlstm_last_error());
  test_check(strncmp(mlstm_last_error(), start, strlen(start)) == 0, __FILE__, line, "%s: %s",
             op_name(call->op), mlstm_last_error());
}

static void struct_sizes(void) {
  static const size_t bad[] = {0, 1, 8, (size_t)-1, 1 << 20};
  FOR_EACH_OP(op) {
    struct call call;
    call_init(&call, *op, (struct options){0});
    size_t good = call.args.fw.struct_size;
    for (int index = 0; index < 5; index++) {
      call.args.fw.struct_size = bad[index];
      check_refused(&call, MLSTM_INVALID_ARGUMENT, "args.struct_size", "", "struct_size", __LINE__);
      call.args.fw.struct_size = good;
      call.problem.struct_size = bad[index];
      check_refused(&call, MLSTM_INVALID_ARGUMENT, "problem.struct_size", "", "struct_size",
                    __LINE__);
      call.problem.struct_size = sizeof call.problem;
    }
    call.args.fw.struct_size = good - 1;
    check_refused(&call, MLSTM_INVALID_ARGUMENT, "args.struct_size", "", "struct_size", __LINE__);
    call.args.fw.struct_size = good;
    call.args.fw.problem = NULL;
    check_refused(&call, MLSTM_INVALID_ARGUMENT, "problem: expected a pointer, got null", "",
                  "no problem", __LINE__);
    check_raw(&call, NULL, MLSTM_INVALID_ARGUMENT, "args: expected a pointer, got null", __LINE__);
    check_raw(&call, (char*)&call.args + 4, MLSTM_INVALID_ARGUMENT, "args: expected an address",
              __LINE__);
    call_free(&call);
  }
}

/* A caller with a newer, longer struct: a zero tail is accepted, anything else is not known here.
 */
static void longer_structs(void) {
  enum { TAIL = 24 };
  FOR_EACH_OP(op) {
    struct call call;
    call_init(&call, *op, (struct options){0});
    size_t size = call.args.fw.struct_size;
    struct fence args = fence_new(size + TAIL);
    struct fence problem = fence_new(sizeof call.problem + TAIL);
    call.args.fw.struct_size = size + TAIL;
    call.problem.struct_size = sizeof call.problem + TAIL;
    memcpy(problem.data, &call.problem, sizeof call.problem);
    memset((char*)problem.data + sizeof call.problem, 0, TAIL);
    call.args.fw.problem = problem.data;
    memcpy(args.data, &call.args, size);
    memset((char*)args.data + size, 0, TAIL);
    check_raw(&call, args.data, MLSTM_OK, "", __LINE__);
    char* tail = (char*)args.data + size + TAIL - 1;
    *tail = 1;
    check_raw(&call, args.data, MLSTM_UNSUPPORTED, "args: a field at byte ", __LINE__);
    *tail = 0;
    tail = (char*)problem.data + sizeof call.problem;
    *tail = 1;
    check_raw(&call, args.data, MLSTM_UNSUPPORTED, "problem: a field at byte 112 ", __LINE__);
    fence_free(&args);
    fence_free(&problem);
    call_free(&call);
  }
}

/* ---- Problems ----------------------------------------------------------------------------- */

static void bad_problems(void) {
  FOR_EACH_OP(op) {
    INVALID(*op, "problem.b", c->problem.b = -1);
    INVALID(*op, "problem.nh", c->problem.nh = -1);
    INVALID(*op, "problem.s", c->problem.s = -1);
    INVALID(*op, "problem.dhqk", c->problem.dhqk = 0);
    INVALID(*op, "problem.dhhv", c->problem.dhhv = -4);
    INVALID(*op, "problem.num_seqs", c->problem.num_seqs = -1);
    INVALID(*op, "problem.num_slots", c->problem.num_slots = -1);
    INVALID(*op, "problem.chunk_size", c->problem.chunk_size = -1);
    INVALID(*op, "problem.qk_scale", c->problem.qk_scale = NAN);
    INVALID(*op, "problem.qk_scale", c->problem.qk_scale = INFINITY);
    INVALID(*op, "problem.eps", c->problem.eps = NAN);
    INVALID(*op, "problem.eps", c->problem.eps = -1e-6);
    INVALID(*op, "problem.eps", {
      c->problem.eps = 1e-6;
      c->problem.flags = MLSTM_FLAG_NO_EPS;
    });
    INVALID(*op, "problem.gate", c->problem.gate = UNKNOWN);
    INVALID(*op, "problem.device", c->problem.device = 0);
    INVALID(*op, "problem.device", c->problem.device = UNKNOWN);
    INVALID(*op, "problem.device_index", c->problem.device_index = 1);
    INVALID(*op, "problem.dtype", c->problem.dtype = MLSTM_DTYPE_DEFAULT);
    INVALID(*op, "problem.dtype", c->problem.dtype = MLSTM_I32);
    INVALID(*op, "problem.dtype", c->problem.dtype = UNKNOWN);
    INVALID(*op, "problem.gate_dtype", c->problem.gate_dtype = MLSTM_BF16);
    INVALID(*op, "problem.gate_dtype", c->problem.gate_dtype = UNKNOWN);
    INVALID(*op, "problem.state_dtype", c->problem.state_dtype = MLSTM_F64);
    INVALID(*op, "problem.state_dtype", c->problem.state_dtype = -1);
    INVALID(*op, "problem.flags", c->problem.flags = MLSTM_FLAG_NO_NORMALIZE);
    REFUSED(*op, ((struct options){0}), MLSTM_UNSUPPORTED, "problem.flags",
            c->problem.flags = 1u << 31);
    INVALID(*op, "problem", c->problem.b = LLONG_MAX);
    INVALID(*op, "problem", c->problem.nh = LLONG_MAX);
    INVALID(*op, "problem", c->problem.dhqk = LLONG_MAX);
    INVALID(*op, "problem", c->problem.dhhv = LLONG_MAX);
    INVALID(*op, "problem", c->problem.dhqk = c->problem.dhhv = 1LL << 31);
    INVALID(*op, "problem", c->problem.b = c->problem.nh = 1LL << 30);
    if (*op != MLSTM_OP_STEP) {
      INVALID(*op, "problem.num_slots", c->problem.num_slots = 4);
      INVALID(*op, "problem", c->problem.s = LLONG_MAX);
      INVALID(*op, "problem.b", c->problem.num_seqs = 3);
      INVALID(*op, "cu_seqlens", {
        c->problem.b = 1;
        c->problem.num_seqs = 3;
        for (int index = 0; index < c->count; index++) {
          const struct member* member = &c->members[index];
          call_tensor(c, index)->shape[0] = *member->dims == 'R' ? 3 : 1;
          if (*member->dims == 'R') memset(call_tensor(c, index), 0, sizeof(mlstm_tensor));
        }
      });
      REFUSED(*op, (struct options){.packed = 1}, MLSTM_INVALID_ARGUMENT, "problem.num_seqs", {
        c->problem.num_seqs = 0;
        for (int index = 0; index < c->count; index++) {
          if (*c->members[index].dims == 'R') call_tensor(c, index)->shape[0] = 1;
        }
      });
    }
  }
  INVALID(MLSTM_OP_STEP, "problem.s", c->problem.s = 0);
  INVALID(MLSTM_OP_STEP, "problem.s", c->problem.s = 17);
  INVALID(MLSTM_OP_STEP, "problem.num_seqs", c->problem.num_seqs = 1);
  INVALID(MLSTM_OP_STEP, "problem", c->problem.num_slots = LLONG_MAX);
  INVALID(MLSTM_OP_STEP, "problem.num_slots", {
    c->problem.num_slots = 1;
    c->args.step.c.shape[0] = c->args.step.n.shape[0] = c->args.step.m.shape[0] = 1;
    memset(&c->args.step.src_slots, 0, sizeof(mlstm_tensor));
  });
}

/* What a machine without a GPU answers; on others the call would read these host pointers. */
static void no_cuda(void) {
  if (mlstm_preload(MLSTM_DEVICE_CUDA, 0) == MLSTM_OK) return;
  FOR_EACH_OP(op) {
    REFUSED(*op, ((struct options){0}), MLSTM_DEVICE_ERROR,
            "device: ", c->problem.device = MLSTM_DEVICE_CUDA);
  }
  CHECK(mlstm_preload(MLSTM_DEVICE_CUDA, 0) == MLSTM_DEVICE_ERROR);
  CHECK(strstr(mlstm_last_error(), "CUDA"));
}

/* ---- Contents of index tensors ------------------------------------------------------------ */

static void bad_offsets(void) {
  static const mlstm_op ops[] = {MLSTM_OP_CHUNKWISE_FW, MLSTM_OP_CHUNKWISE_BW, MLSTM_OP_PARALLEL_FW,
                                 MLSTM_OP_PARALLEL_BW};
  static const struct {
    int index;
    int64_t value;
  } bad[] = {{0, 1}, {0, -1}, {1, 3}, {2, 1}, {2, 8}, {3, 6}, {3, 8}, {1, INT_MIN}, {2, INT_MAX}};
  for (int op = 0; op < 4; op++) {
    for (size_t row = 0; row < sizeof bad / sizeof *bad; row++) {
      struct options options = {.packed = 1, .index_dtype = row & 1 ? MLSTM_I64 : MLSTM_I32};
      REFUSED(ops[op], options, MLSTM_INVALID_ARGUMENT, "cu_seqlens",
              call_set(c, "cu_seqlens", bad[row].index, bad[row].value));
    }
    REFUSED(ops[op], ((struct options){.packed = 1, .index_dtype = MLSTM_I64}),
            MLSTM_INVALID_ARGUMENT, "cu_seqlens", call_set(c, "cu_seqlens", 1, LLONG_MIN));
  }
}

static void bad_slots(void) {
  static const mlstm_dtype dtypes[] = {MLSTM_I32, MLSTM_I64};
  for (int index = 0; index < 4; index++) {
    struct options options = {.index_dtype = dtypes[index & 1], .separate = index / 2};
#define SLOTS(start, change) REFUSED(MLSTM_OP_STEP, options, MLSTM_INVALID_ARGUMENT, start, change)
    SLOTS("src_slots", call_set(c, "src_slots", 1, 4));
    SLOTS("src_slots", call_set(c, "src_slots", 0, -2));
    SLOTS("src_slots", call_set(c, "src_slots", 1, INT_MAX));
    SLOTS("dst_slots", call_set(c, "dst_slots", 1, 4));
    SLOTS("dst_slots", call_set(c, "dst_slots", 0, -2));
    SLOTS("dst_slots", call_set(c, "dst_slots", 0, INT_MIN));
    SLOTS("dst_slots", call_set(c, "dst_slots", 0, 2));
    SLOTS("num_tokens", call_set(c, "num_tokens", 0, 4));
    SLOTS("num_tokens", call_set(c, "num_tokens", 1, -1));
    /* In place, the slots that rows read are the ones they write. */
    SLOTS("", {
      memset(&c->args.step.dst_slots, 0, sizeof(mlstm_tensor));
      call_set(c, "src_slots", 0, 2);
    });
#undef SLOTS
  }
  /* A row writes the slot that another row reads: fine only in a pool of its own. */
  REFUSED(MLSTM_OP_STEP, ((struct options){0}), MLSTM_INVALID_ARGUMENT, "src_slots", {
    call_set(c, "dst_slots", 0, 2);
    call_set(c, "dst_slots", 1, 3);
  });
  struct call call;
  call_init(&call, MLSTM_OP_STEP, (struct options){.separate = 1});
  call_set(&call, "dst_slots", 0, 2);
  call_set(&call, "dst_slots", 1, 3);
  CHECK_MSG(call_run(&call) == MLSTM_OK, "%s", mlstm_last_error());
  call_free(&call);
}

/* Whether bytes [from, to) of the fence hold `byte` only. */
static int all_bytes(const struct fence* fence, size_t from, size_t to, int byte) {
  for (size_t index = from; index < to; index++) {
    if (((unsigned char*)fence->data)[index] != byte) return 0;
  }
  return 1;
}

/* Padding rows and rows without tokens or destination write only what the header says. */
static void padding_rows(void) {
  struct call call;
  call_init(&call, MLSTM_OP_STEP, (struct options){.separate = 1});
  const struct fence* c_dst = &call.memory[call_find(&call, "c_dst")];
  const struct fence* h = &call.memory[call_find(&call, "h")];
  size_t slot = c_dst->size / 4, row = h->size / 2;
  call_set(&call, "src_slots", 0, -1);
  CHECK_MSG(call_run(&call) == MLSTM_OK, "%s", mlstm_last_error());
  CHECK(all_bytes(h, 0, row, POISON));
  CHECK(!all_bytes(h, row, 2 * row, POISON));
  CHECK(all_bytes(c_dst, 0, 2 * slot, POISON));
  CHECK(!all_bytes(c_dst, 2 * slot, 3 * slot, POISON));
  CHECK(all_bytes(c_dst, 3 * slot, 4 * slot, POISON));
  /* A row that stores no state still gets its h. */
  call_poison(&call, POISON);
  call_set(&call, "src_slots", 0, 1);
  call_set(&call, "dst_slots", 0, -1);
  call_set(&call, "dst_slots", 1, -1);
  CHECK_MSG(call_run(&call) == MLSTM_OK, "%s", mlstm_last_error());
  CHECK(all_bytes(c_dst, 0, c_dst->size, POISON));
  CHECK(!all_bytes(h, 0, row, POISON) && !all_bytes(h, row, 2 * row, POISON));
  call_free(&call);
}

/* ---- Queries and the rest ------------------------------------------------------------------ */

/* A refused query writes nothing. */
static void check_query(mlstm_op op, const mlstm_problem* problem, mlstm_requirements* out,
                        mlstm_status status, const char* start, int line) {
  mlstm_requirements copy = *out;
  mlstm_status got = mlstm_query(op, problem, out);
  test_check(got == status, __FILE__, line, "%s (%s)", mlstm_status_name(got), mlstm_last_error());
  test_check(strncmp(mlstm_last_error(), start, strlen(start)) == 0, __FILE__, line, "\"%s\"",
             mlstm_last_error());
  test_check(memcmp(&copy, out, sizeof copy) == 0, __FILE__, line, "query wrote to out");
}

static void queries(void) {
  mlstm_problem problem = {.struct_size = sizeof problem,
                           .b = 2,
                           .nh = 3,
                           .s = 100,
                           .dhqk = 8,
                           .dhhv = 16,
                           .device = MLSTM_DEVICE_CPU,
                           .dtype = MLSTM_F32,
                           .chunk_size = 32};
  mlstm_requirements out;
  memset(&out, POISON, sizeof out);
  out.struct_size = sizeof out;
  const mlstm_op op = MLSTM_OP_CHUNKWISE_FW;
#define QUERY(op, problem, start) \
  check_query(op, problem, &out, MLSTM_INVALID_ARGUMENT, start, __LINE__)
  QUERY(0, &problem, "op: expected one of MLSTM_OP_*, got 0");
  QUERY(UNKNOWN, &problem, "op: expected one of MLSTM_OP_*, got 99");
  QUERY(op, NULL, "problem: expected a pointer, got null");
  QUERY(op, (void*)((char*)&problem + 1), "problem: expected an address that is a multiple of 8");
  out.struct_size = sizeof out - 8;
  QUERY(op, &problem, "out.struct_size: expected sizeof the struct (40 in this library), got 32");
  out.struct_size = sizeof out;
  problem.s = -1;
  QUERY(op, &problem, "problem.s: expected a size >= 0, got -1");
  problem.s = 17;
  QUERY(MLSTM_OP_STEP, &problem, "problem.s: expected 1 to 16 tokens in a step, got 17");
#undef QUERY
  problem.s = 100;
  CHECK(mlstm_query(op, &problem, NULL) == MLSTM_INVALID_ARGUMENT);
  CHECK(strcmp(mlstm_last_error(), "out: expected a pointer, got null") == 0);

  problem.device_index = -1;
  CHECK_MSG(mlstm_query(op, &problem, &out) == MLSTM_OK, "%s", mlstm_last_error());
  CHECK(out.struct_size == sizeof out && out.chunk_size == 32 && out.num_chunks == 4);
  CHECK(out.workspace_alignment && (out.workspace_alignment & (out.workspace_alignment - 1)) == 0);

  /* Into a newer, longer struct: what the library does not know stays as it was. */
  struct {
    mlstm_requirements known;
    unsigned char tail[16];
  } longer;
  memset(&longer, POISON, sizeof longer);
  longer.known.struct_size = sizeof longer;
  CHECK_MSG(mlstm_query(op, &problem, &longer.known) == MLSTM_OK, "%s", mlstm_last_error());
  CHECK(longer.known.struct_size == sizeof longer);
  CHECK(longer.known.workspace_size == out.workspace_size);
  CHECK(longer.tail[0] == POISON && longer.tail[15] == POISON);
}

static void small_functions(void) {
  CHECK(mlstm_version() ==
        (MLSTM_VERSION_MAJOR << 16 | MLSTM_VERSION_MINOR << 8 | MLSTM_VERSION_PATCH));
  CHECK(strcmp(mlstm_status_name(MLSTM_OK), "MLSTM_OK") == 0);
  CHECK(strcmp(mlstm_status_name(MLSTM_INVALID_ARGUMENT), "MLSTM_INVALID_ARGUMENT") == 0);
  CHECK(strcmp(mlstm_status_name(MLSTM_UNSUPPORTED), "MLSTM_UNSUPPORTED") == 0);
  CHECK(strcmp(mlstm_status_name(MLSTM_WORKSPACE_TOO_SMALL), "MLSTM_WORKSPACE_TOO_SMALL") == 0);
  CHECK(strcmp(mlstm_status_name(MLSTM_DEVICE_ERROR), "MLSTM_DEVICE_ERROR") == 0);
  CHECK(strcmp(mlstm_status_name(MLSTM_INTERNAL_ERROR), "MLSTM_INTERNAL_ERROR") == 0);
  CHECK(mlstm_status_name(UNKNOWN) != NULL && mlstm_status_name(INT_MIN) != NULL);
  CHECK(mlstm_preload(UNKNOWN, 0) == MLSTM_INVALID_ARGUMENT);
  CHECK(strncmp(mlstm_last_error(), "device: expected MLSTM_DEVICE_CPU", 33) == 0);
  CHECK(mlstm_preload(MLSTM_DEVICE_CPU, 0) == MLSTM_OK);
  CHECK(strcmp(mlstm_last_error(), "") == 0);
}

int main(void) {
  CHECK(strcmp(mlstm_last_error(), "") == 0);
  RUN(small_functions);
  RUN(queries);
  RUN(struct_sizes);
  RUN(longer_structs);
  RUN(bad_problems);
  RUN(no_cuda);
  RUN(spoiled_tensors);
  RUN(incomplete_states);
  RUN(unwanted_stabilizers);
  RUN(overlapping_tensors);
  RUN(aliased_pools);
  RUN(interleaved_tensors);
  RUN(bad_workspaces);
  RUN(bad_offsets);
  RUN(bad_slots);
  RUN(padding_rows);
  RUN(valid_calls);
  RUN(optional_members);
  RUN(empty_calls);
  return test_summary("contract");
}
