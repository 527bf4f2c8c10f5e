#include "call.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define COUNT(array) ((int)(sizeof(array) / sizeof *(array)))
#define FW(member) #member, offsetof(mlstm_fw_args, member)
#define BW(member) #member, offsetof(mlstm_bw_args, member)
#define STEP(member) #member, offsetof(mlstm_step_args, member)

static const struct member fw_members[] = {
    {FW(q), IN, 0, "BHSK", 'd'},        {FW(k), IN, 0, "BHSK", 'd'},
    {FW(v), IN, 0, "BHSV", 'd'},        {FW(i), IN, 0, "BHS", 'g'},
    {FW(f), IN, 0, "BHS", 'g'},         {FW(c_initial), IN, 1, "RHKV", 's'},
    {FW(n_initial), IN, 1, "RHK", 'c'}, {FW(m_initial), IN, 1, "RH", 'c'},
    {FW(cu_seqlens), IN, 1, "O", 'i'},  {FW(h), OUT, 0, "BHSV", 'd'},
    {FW(n), OUT, 1, "BHS", 'c'},        {FW(m), OUT, 1, "BHS", 'c'},
    {FW(c_last), OUT, 1, "RHKV", 's'},  {FW(n_last), OUT, 1, "RHK", 'c'},
    {FW(m_last), OUT, 1, "RH", 'c'},
};

static const struct member bw_members[] = {
    {BW(q), IN, 0, "BHSK", 'd'},          {BW(k), IN, 0, "BHSK", 'd'},
    {BW(v), IN, 0, "BHSV", 'd'},          {BW(i), IN, 0, "BHS", 'g'},
    {BW(f), IN, 0, "BHS", 'g'},           {BW(c_initial), IN, 1, "RHKV", 's'},
    {BW(n_initial), IN, 1, "RHK", 'c'},   {BW(m_initial), IN, 1, "RH", 'c'},
    {BW(cu_seqlens), IN, 1, "O", 'i'},    {BW(h), IN, 0, "BHSV", 'd'},
    {BW(n), IN, 0, "BHS", 'c'},           {BW(m), IN, 0, "BHS", 'c'},
    {BW(dh), IN, 0, "BHSV", 'd'},         {BW(dc_last), IN, 1, "RHKV", 's'},
    {BW(dn_last), IN, 1, "RHK", 'c'},     {BW(dm_last), IN, 1, "RH", 'c'},
    {BW(dq), OUT, 0, "BHSK", 'd'},        {BW(dk), OUT, 0, "BHSK", 'd'},
    {BW(dv), OUT, 0, "BHSV", 'd'},        {BW(di), OUT, 0, "BHS", 'g'},
    {BW(df), OUT, 0, "BHS", 'g'},         {BW(dc_initial), OUT, 1, "RHKV", 's'},
    {BW(dn_initial), OUT, 1, "RHK", 'c'}, {BW(dm_initial), OUT, 1, "RH", 'c'},
};

static const struct member step_members[] = {
    {STEP(q), IN, 0, "BHSK", 'd'},       {STEP(k), IN, 0, "BHSK", 'd'},
    {STEP(v), IN, 0, "BHSV", 'd'},       {STEP(i), IN, 0, "BHS", 'g'},
    {STEP(f), IN, 0, "BHS", 'g'},        {STEP(c), POOL, 0, "LHKV", 's'},
    {STEP(n), POOL, 0, "LHK", 'c'},      {STEP(m), POOL, 0, "LH", 'c'},
    {STEP(c_dst), OUT, 1, "LHKV", 's'},  {STEP(n_dst), OUT, 1, "LHK", 'c'},
    {STEP(m_dst), OUT, 1, "LH", 'c'},    {STEP(src_slots), IN, 1, "B", 'i'},
    {STEP(dst_slots), IN, 1, "B", 'i'},  {STEP(has_state), IN, 1, "B", 'b'},
    {STEP(num_tokens), IN, 1, "B", 'i'}, {STEP(h), OUT, 0, "BHSV", 'd'},
};

size_t dtype_size(mlstm_dtype dtype) {
  switch (dtype) {
    case MLSTM_U8:
      return 1;
    case MLSTM_BF16:
    case MLSTM_F16:
      return 2;
    case MLSTM_F64:
    case MLSTM_I64:
      return 8;
    default:
      return 4;
  }
}

const char* op_name(mlstm_op op) {
  static const char* const names[] = {"?",           "chunkwise_fw", "chunkwise_bw",
                                      "parallel_fw", "parallel_bw",  "step"};
  return names[op];
}

static int64_t size_of_dim(const mlstm_problem* p, char dim) {
  switch (dim) {
    case 'B':
      return p->b;
    case 'H':
      return p->nh;
    case 'S':
      return p->s;
    case 'K':
      return p->dhqk;
    case 'V':
      return p->dhhv;
    case 'R':
      return p->num_seqs ? p->num_seqs : p->b;
    case 'L':
      return p->num_slots;
    default:
      return p->num_seqs + 1;
  }
}

static mlstm_dtype dtype_of_kind(const mlstm_problem* p, char kind, mlstm_dtype index_dtype) {
  switch (kind) {
    case 'd':
    case 'g':
      return p->dtype;
    case 's':
    case 'c':
      return p->dtype == MLSTM_F64 ? MLSTM_F64 : MLSTM_F32;
    case 'b':
      return MLSTM_U8;
    default:
      return index_dtype;
  }
}

static void fill_random(const mlstm_tensor* tensor, size_t bytes) {
  size_t count = bytes / dtype_size(tensor->dtype);
  for (size_t index = 0; index < count; index++) {
    double value = rand() / (double)RAND_MAX - 0.5;
    if (tensor->dtype == MLSTM_F64) {
      ((double*)tensor->data)[index] = value;
    } else if (tensor->dtype == MLSTM_F32) {
      ((float*)tensor->data)[index] = (float)value;
    } else if (tensor->dtype == MLSTM_BF16) {
      float narrow = (float)value;
      memcpy((char*)tensor->data + 2 * index, (char*)&narrow + 2, 2);
    } else if (tensor->dtype == MLSTM_F16) {
      /* +-0.125 to 0.5 */
      ((uint16_t*)tensor->data)[index] = (uint16_t)(0x3000 + rand() % 0x800 + rand() % 2 * 0x8000);
    }
  }
}

mlstm_tensor* call_tensor(struct call* call, int member) {
  return (mlstm_tensor*)((char*)&call->args + call->members[member].offset);
}

int call_find(const struct call* call, const char* name) {
  for (int index = 0; index < call->count; index++) {
    if (strcmp(call->members[index].name, name) == 0) return index;
  }
  fprintf(stderr, "%s has no member %s\n", op_name(call->op), name);
  exit(2);
}

void call_set(struct call* call, const char* name, int index, int64_t value) {
  mlstm_tensor* tensor = call_tensor(call, call_find(call, name));
  if (tensor->dtype == MLSTM_I64) {
    ((int64_t*)tensor->data)[index] = value;
  } else if (tensor->dtype == MLSTM_I32) {
    ((int32_t*)tensor->data)[index] = (int32_t)value;
  } else {
    ((uint8_t*)tensor->data)[index] = (uint8_t)value;
  }
}

int call_writes(const struct call* call, int member) {
  enum role role = call->members[member].role;
  return role == OUT || (role == POOL && !call->args.step.c_dst.data);
}

void call_poison(struct call* call, int byte) {
  for (int index = 0; index < call->count; index++) {
    if (call->members[index].role == OUT && call->memory[index].map) {
      memset(call->memory[index].data, byte, call->memory[index].size);
    }
  }
}

/* Whether the call of these options has the member. */
static int wanted(const struct call* call, const struct member* member, struct options options) {
  if (strcmp(member->name, "cu_seqlens") == 0) return options.packed;
  if (call->op == MLSTM_OP_STEP && member->role == OUT && member->kind != 'd') {
    if (!options.separate) return 0;
  }
  int stabilizer = member->name[0] == 'm' || strncmp(member->name, "dm_", 3) == 0;
  return !(stabilizer && options.gate == MLSTM_GATE_SIGMOID);
}

static void add_tensor(struct call* call, int index, struct options options) {
  const struct member* member = &call->members[index];
  mlstm_tensor* tensor = call_tensor(call, index);
  tensor->rank = (int32_t)strlen(member->dims);
  tensor->dtype = dtype_of_kind(&call->problem, member->kind, options.index_dtype);
  int64_t elements = 1;
  for (int dim = tensor->rank - 1; dim >= 0; dim--) {
    tensor->shape[dim] = size_of_dim(&call->problem, member->dims[dim]);
    tensor->stride[dim] = elements;
    elements *= tensor->shape[dim];
  }
  call->memory[index] = fence_new((size_t)elements * dtype_size(tensor->dtype));
  tensor->data = call->memory[index].data;
  if (member->role != OUT) fill_random(tensor, call->memory[index].size);
}

static void add_workspace(struct call* call) {
  mlstm_requirements needs = {.struct_size = sizeof needs};
  if (mlstm_query(call->op, &call->problem, &needs) != MLSTM_OK) {
    fprintf(stderr, "mlstm_query: %s\n", mlstm_last_error());
    exit(2);
  }
  struct fence* memory = &call->memory[MAX_MEMBERS];
  *memory = fence_new(needs.workspace_size);
  void* workspace = needs.workspace_size ? memory->data : NULL;
  /* The three structs start alike. */
  call->args.fw.workspace = workspace;
  call->args.fw.workspace_size = needs.workspace_size;
}

static void set_contents(struct call* call, struct options options) {
  if (options.packed) {
    static const int offsets[] = {0, 2, 2, 7};
    for (int index = 0; index < COUNT(offsets); index++) {
      call_set(call, "cu_seqlens", index, offsets[index]);
    }
  }
  if (call->op != MLSTM_OP_STEP) return;
  for (int row = 0; row < call->problem.b; row++) {
    call_set(call, "src_slots", row, row + 1);
    call_set(call, "dst_slots", row, row + 1);
    call_set(call, "has_state", row, 1);
    call_set(call, "num_tokens", row, call->problem.s);
  }
}

void call_init(struct call* call, mlstm_op op, struct options options) {
  memset(call, 0, sizeof *call);
  if (!options.dtype) options.dtype = MLSTM_F32;
  if (!options.index_dtype) options.index_dtype = MLSTM_I32;
  call->op = op;
  call->problem = (mlstm_problem){
      .struct_size = sizeof call->problem,
      .b = options.packed ? 1 : 2,
      .nh = 2,
      .s = op == MLSTM_OP_STEP ? 3 : 7,
      .dhqk = 4,
      .dhhv = 6,
      .num_seqs = options.packed ? 3 : 0,
      .num_slots = op == MLSTM_OP_STEP ? 4 : 0,
      .device = MLSTM_DEVICE_CPU,
      .gate = options.gate,
      .dtype = options.dtype,
      .chunk_size = op == MLSTM_OP_CHUNKWISE_FW || op == MLSTM_OP_CHUNKWISE_BW ? 3 : 0,
  };
  if (options.large) {
    call->problem.nh = 4;
    call->problem.s = op == MLSTM_OP_STEP ? 16 : 200;
    call->problem.dhqk = 64;
    call->problem.dhhv = 96;
    if (call->problem.chunk_size) call->problem.chunk_size = 32;
  }
  if (op == MLSTM_OP_STEP) {
    call->members = step_members;
    call->count = COUNT(step_members);
    call->args.step.struct_size = sizeof call->args.step;
  } else if (op == MLSTM_OP_CHUNKWISE_BW || op == MLSTM_OP_PARALLEL_BW) {
    call->members = bw_members;
    call->count = COUNT(bw_members);
    call->args.bw.struct_size = sizeof call->args.bw;
  } else {
    call->members = fw_members;
    call->count = COUNT(fw_members);
    call->args.fw.struct_size = sizeof call->args.fw;
  }
  call->args.fw.problem = &call->problem;
  for (int index = 0; index < call->count; index++) {
    if (wanted(call, &call->members[index], options)) add_tensor(call, index, options);
  }
  add_workspace(call);
  set_contents(call, options);
  call_poison(call, POISON);
}

void call_free(struct call* call) {
  for (int index = 0; index <= MAX_MEMBERS; index++) {
    if (call->memory[index].map) fence_free(&call->memory[index]);
  }
}

mlstm_status call_run(struct call* call) {
  switch (call->op) {
    case MLSTM_OP_CHUNKWISE_FW:
      return mlstm_chunkwise_fw(&call->args.fw);
    case MLSTM_OP_CHUNKWISE_BW:
      return mlstm_chunkwise_bw(&call->args.bw);
    case MLSTM_OP_PARALLEL_FW:
      return mlstm_parallel_fw(&call->args.fw);
    case MLSTM_OP_PARALLEL_BW:
      return mlstm_parallel_bw(&call->args.bw);
    default:
      return mlstm_step(&call->args.step);
  }
}
