/* Numbers through the C ABI: chunkwise, parallel, step and packed runs against a plain loop in
 * double precision, and gradients against differences of that loop. */
#include <math.h>
#include <stdio.h>
#include <string.h>
#include <time.h>

#include <mlstm.h>

#include "oracle.h"
#include "test.h"

/* ---- Random numbers: xorshift, so that a seed means the same everywhere -------------------- */

static uint64_t random_state;

static double uniform(double low, double high) {
  random_state ^= random_state << 13;
  random_state ^= random_state >> 7;
  random_state ^= random_state << 17;
  return low + (high - low) * (double)(random_state >> 11) / 9007199254740992.0;
}

/* ---- Arrays of doubles, and the same in the dtype of a call --------------------------------- */

static double* random_array(size_t size, double low, double high) {
  double* array = malloc((size + 1) * sizeof *array);
  for (size_t index = 0; index < size; index++) array[index] = uniform(low, high);
  return array;
}

static uint16_t to_bf16(double value) {
  float single = (float)value;
  uint32_t bits;
  memcpy(&bits, &single, 4);
  return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

static double from_bf16(uint16_t half) {
  uint32_t bits = (uint32_t)half << 16;
  float single;
  memcpy(&single, &bits, 4);
  return single;
}

static size_t item_size(mlstm_dtype dtype) {
  return dtype == MLSTM_F64 ? 8 : dtype == MLSTM_F32 ? 4 : 2;
}

static void* narrow(const double* array, size_t size, mlstm_dtype dtype) {
  void* out = calloc(size + 1, item_size(dtype));
  for (size_t index = 0; array && index < size; index++) {
    if (dtype == MLSTM_F64) {
      ((double*)out)[index] = array[index];
    } else if (dtype == MLSTM_F32) {
      ((float*)out)[index] = (float)array[index];
    } else {
      ((uint16_t*)out)[index] = to_bf16(array[index]);
    }
  }
  return out;
}

static double element(const void* array, size_t index, mlstm_dtype dtype) {
  return dtype == MLSTM_F64   ? ((const double*)array)[index]
         : dtype == MLSTM_F32 ? ((const float*)array)[index]
                              : from_bf16(((const uint16_t*)array)[index]);
}

/* Frobenius norm of the difference over that of `expected`, or over an eighth of that of its
 * terms: where sums cancel, rounding is as large as the terms allow, whatever is left of them. */
static double distance(const void* got, mlstm_dtype dtype, const double* expected,
                       const double* terms, size_t size) {
  double difference = 0, norm = 1e-300, largest = 0;
  for (size_t index = 0; index < size; index++) {
    double delta = element(got, index, dtype) - expected[index];
    difference += delta * delta;
    norm += expected[index] * expected[index];
    largest += terms[index] * terms[index];
  }
  return sqrt(difference / fmax(norm, largest / 64));
}

/* A dense tensor of up to four dimensions; zeros end the shape. */
static mlstm_tensor dense(void* data, mlstm_dtype dtype, int64_t a, int64_t b, int64_t c,
                          int64_t d) {
  mlstm_tensor tensor = {.data = data, .shape = {a, b, c, d}, .dtype = dtype, .rank = 4};
  while (tensor.shape[tensor.rank - 1] == 0) tensor.rank--;
  int64_t stride = 1;
  for (int dim = tensor.rank - 1; dim >= 0; dim--) {
    tensor.stride[dim] = stride;
    stride *= tensor.shape[dim];
  }
  return tensor;
}

/* ---- A problem with its inputs and right answers in double precision ------------------------ */

enum { Q, K, V, I, F, C, N, M, H, C_LAST, N_LAST, M_LAST, ARRAYS };

struct sizes {
  int b, nh, s, dhqk, dhhv;
};

struct world {
  struct sizes z;
  mlstm_gate gate;
  mlstm_dtype dtype;
  /* dtype of the states and of the gates. */
  mlstm_dtype wide;
  /* Offsets of packed sequences, or NULL. */
  const int32_t* cu_seqlens;
  int rows;
  size_t size[ARRAYS];
  double* array[ARRAYS];
  /* Of the outputs: the oracle's terms. */
  double* terms[ARRAYS];
  /* The same in the call's dtypes. */
  void* data[ARRAYS];
};

static mlstm_dtype dtype_of(const struct world* w, int name) {
  return name == Q || name == K || name == V || name == H ? w->dtype : w->wide;
}

/* Runs the oracle over every head; returns which sides its maxima took. */
static unsigned solve(const struct world* w, double* const array[]) {
  const struct sizes z = w->z;
  unsigned sides = 0;
  memcpy(array[C_LAST], array[C], w->size[C] * sizeof(double));
  memcpy(array[N_LAST], array[N], w->size[N] * sizeof(double));
  memcpy(array[M_LAST], array[M], w->size[M] * sizeof(double));
  for (int name = C_LAST; name <= M_LAST; name++) {
    for (size_t index = 0; index < w->size[name]; index++) {
      w->terms[name][index] = fabs(array[name][index]);
    }
  }
  for (int row = 0; row < w->rows; row++) {
    for (int head = 0; head < z.nh; head++) {
      int from = w->cu_seqlens ? w->cu_seqlens[row] : 0;
      int to = w->cu_seqlens ? w->cu_seqlens[row + 1] : z.s;
      size_t token = (size_t)(((w->cu_seqlens ? 0 : row) * z.nh + head) * z.s + from);
      size_t state = (size_t)(row * z.nh + head), qk = (size_t)z.dhqk, hv = (size_t)z.dhhv;
      struct oracle o = {.s = to - from,
                         .dhqk = z.dhqk,
                         .dhhv = z.dhhv,
                         .gate = w->gate,
                         .eps = 1e-6,
                         .q = array[Q] + token * qk,
                         .k = array[K] + token * qk,
                         .v = array[V] + token * hv,
                         .i = array[I] + token,
                         .f = array[F] + token,
                         .h = array[H] + token * hv,
                         .c = array[C_LAST] + state * qk * hv,
                         .n = array[N_LAST] + state * qk,
                         .m = array[M_LAST] + state,
                         .h_terms = w->terms[H] + token * hv,
                         .c_terms = w->terms[C_LAST] + state * qk * hv,
                         .n_terms = w->terms[N_LAST] + state * qk,
                         .m_terms = w->terms[M_LAST] + state};
      sides = sides * 31 + oracle_run(&o);
    }
  }
  return sides;
}

static struct world world_new(struct sizes z, mlstm_gate gate, mlstm_dtype dtype,
                              const int32_t* cu_seqlens, int rows) {
  struct world w = {.z = z, .gate = gate, .dtype = dtype, .cu_seqlens = cu_seqlens, .rows = rows};
  w.wide = dtype == MLSTM_F64 ? MLSTM_F64 : MLSTM_F32;
  size_t tokens = (size_t)(z.b * z.nh * z.s), states = (size_t)(rows * z.nh);
  size_t qk = (size_t)z.dhqk, hv = (size_t)z.dhhv;
  const size_t size[ARRAYS] = {tokens * qk, tokens * qk,      tokens * hv, tokens,
                               tokens,      states * qk * hv, states * qk, states,
                               tokens * hv, states * qk * hv, states * qk, states};
  static const double range[ARRAYS][2] = {{-2, 2}, {-2, 2}, {-2, 2}, {-4, 3},
                                          {-2, 8}, {-1, 1}, {-1, 1}, {-2, 2}};
  memcpy(w.size, size, sizeof size);
  for (int name = 0; name < ARRAYS; name++) {
    w.array[name] = random_array(size[name], range[name][0], range[name][1]);
    if (name >= H) w.terms[name] = calloc(size[name], sizeof(double));
    w.data[name] = narrow(w.array[name], size[name], dtype_of(&w, name));
    /* The oracle sees the numbers that the call sees. */
    for (size_t index = 0; index < size[name]; index++) {
      w.array[name][index] = element(w.data[name], index, dtype_of(&w, name));
    }
  }
  solve(&w, w.array);
  return w;
}

static void world_free(struct world* w) {
  for (int name = 0; name < ARRAYS; name++) {
    free(w->array[name]);
    free(w->terms[name]);
    free(w->data[name]);
  }
}

static mlstm_problem problem_of(const struct world* w) {
  return (mlstm_problem){.struct_size = sizeof(mlstm_problem),
                         .b = w->z.b,
                         .nh = w->z.nh,
                         .s = w->z.s,
                         .dhqk = w->z.dhqk,
                         .dhhv = w->z.dhhv,
                         .num_seqs = w->cu_seqlens ? w->rows : 0,
                         .device = MLSTM_DEVICE_CPU,
                         .gate = w->gate,
                         .dtype = w->dtype,
                         .gate_dtype = w->dtype == MLSTM_F64 ? 0 : MLSTM_F32};
}

static mlstm_tensor tensor_of(const struct world* w, int name, void* data) {
  const struct sizes z = w->z;
  switch (name) {
    case Q:
    case K:
      return dense(data, w->dtype, z.b, z.nh, z.s, z.dhqk);
    case V:
    case H:
      return dense(data, w->dtype, z.b, z.nh, z.s, z.dhhv);
    case I:
    case F:
      return dense(data, w->wide, z.b, z.nh, z.s, 0);
    case C:
    case C_LAST:
      return dense(data, w->wide, w->rows, z.nh, z.dhqk, z.dhhv);
    case N:
    case N_LAST:
      return dense(data, w->wide, w->rows, z.nh, z.dhqk, 0);
    default:
      if (w->gate == MLSTM_GATE_SIGMOID) return (mlstm_tensor){0};
      return dense(data, w->wide, w->rows, z.nh, 0, 0);
  }
}

static mlstm_tensor offsets_of(const struct world* w) {
  if (!w->cu_seqlens) return (mlstm_tensor){0};
  return dense((void*)w->cu_seqlens, MLSTM_I32, w->rows + 1, 0, 0, 0);
}

/* Memory of the size and alignment that the call needs. */
static void* workspace_new(mlstm_op op, const mlstm_problem* problem, size_t* size) {
  mlstm_requirements needs = {.struct_size = sizeof needs};
  CHECK_MSG(mlstm_query(op, problem, &needs) == MLSTM_OK, "%s", mlstm_last_error());
  *size = needs.workspace_size;
  size_t unit = needs.workspace_alignment;
  return aligned_alloc(unit, (needs.workspace_size / unit + 1) * unit);
}

static mlstm_fw_args forward_of(const struct world* w, const mlstm_problem* problem) {
  return (mlstm_fw_args){.struct_size = sizeof(mlstm_fw_args),
                         .problem = problem,
                         .q = tensor_of(w, Q, w->data[Q]),
                         .k = tensor_of(w, K, w->data[K]),
                         .v = tensor_of(w, V, w->data[V]),
                         .i = tensor_of(w, I, w->data[I]),
                         .f = tensor_of(w, F, w->data[F]),
                         .c_initial = tensor_of(w, C, w->data[C]),
                         .n_initial = tensor_of(w, N, w->data[N]),
                         .m_initial = tensor_of(w, M, w->data[M]),
                         .cu_seqlens = offsets_of(w),
                         .h = tensor_of(w, H, w->data[H]),
                         .c_last = tensor_of(w, C_LAST, w->data[C_LAST]),
                         .n_last = tensor_of(w, N_LAST, w->data[N_LAST]),
                         .m_last = tensor_of(w, M_LAST, w->data[M_LAST])};
}

/* Compares outputs with the oracle's, and blanks them for the next run. */
static void check_outputs(struct world* w, const char* what) {
  for (int name = H; name < ARRAYS; name++) {
    if (name == M_LAST && w->gate == MLSTM_GATE_SIGMOID) continue;
    mlstm_dtype dtype = dtype_of(w, name);
    double tolerance = dtype == MLSTM_F64 ? 1e-11 : dtype == MLSTM_F32 ? 1e-5 : 6e-3;
    double error = distance(w->data[name], dtype, w->array[name], w->terms[name], w->size[name]);
    CHECK_MSG(error <= tolerance, "%s, gate %d, dtype %d, %dx%dx%dx%dx%d: %s is off by %.2g", what,
              w->gate, w->dtype, w->z.b, w->z.nh, w->z.s, w->z.dhqk, w->z.dhhv,
              (const char*[]){"h", "c_last", "n_last", "m_last"}[name - H], error);
    memset(w->data[name], 0xff, w->size[name] * item_size(dtype));
  }
}

static void run_forward(struct world* w, int chunk_size, int parallel) {
  mlstm_problem problem = problem_of(w);
  problem.chunk_size = chunk_size;
  mlstm_fw_args args = forward_of(w, &problem);
  args.workspace = workspace_new(parallel ? MLSTM_OP_PARALLEL_FW : MLSTM_OP_CHUNKWISE_FW, &problem,
                                 &args.workspace_size);
  mlstm_status status = parallel ? mlstm_parallel_fw(&args) : mlstm_chunkwise_fw(&args);
  CHECK_MSG(status == MLSTM_OK, "%s", mlstm_last_error());
  free(args.workspace);
  check_outputs(w, parallel ? "parallel" : "chunkwise");
}

/* Generates in steps of `count` tokens; the states are updated in place. */
static void run_steps(struct world* w, int count) {
  for (int name = C; name <= M; name++) {
    memcpy(w->data[name + C_LAST - C], w->data[name], w->size[name] * item_size(w->wide));
  }
  for (int from = 0; from < w->z.s; from += count) {
    mlstm_problem problem = problem_of(w);
    problem.s = w->z.s - from < count ? w->z.s - from : count;
    mlstm_step_args args = {.struct_size = sizeof args, .problem = &problem};
    mlstm_tensor* tensors[] = {&args.q, &args.k, &args.v, &args.i, &args.f, &args.h};
    static const int names[] = {Q, K, V, I, F, H};
    for (int index = 0; index < 6; index++) {
      mlstm_tensor* tensor = tensors[index];
      *tensor = tensor_of(w, names[index], w->data[names[index]]);
      tensor->shape[2] = problem.s;
      size_t offset = (size_t)(from * tensor->stride[2]) * item_size(tensor->dtype);
      tensor->data = (char*)tensor->data + offset;
    }
    args.c = tensor_of(w, C_LAST, w->data[C_LAST]);
    args.n = tensor_of(w, N_LAST, w->data[N_LAST]);
    args.m = tensor_of(w, M_LAST, w->data[M_LAST]);
    args.workspace = workspace_new(MLSTM_OP_STEP, &problem, &args.workspace_size);
    CHECK_MSG(mlstm_step(&args) == MLSTM_OK, "%s", mlstm_last_error());
    free(args.workspace);
  }
  check_outputs(w, "step");
}

static const mlstm_dtype dtypes[] = {MLSTM_F64, MLSTM_F32, MLSTM_BF16};
static const struct sizes shapes[] = {{1, 1, 1, 1, 1},     {2, 3, 37, 12, 20}, {1, 2, 65, 24, 16},
                                      {2, 1, 130, 64, 64}, {1, 1, 16, 100, 7}, {3, 2, 5, 8, 128}};

static void four_ways_to_the_same_numbers(void) {
  for (size_t shape = 0; shape < sizeof shapes / sizeof *shapes; shape++) {
    for (int variant = 0; variant < 6; variant++) {
      mlstm_gate gate = variant % 2 ? MLSTM_GATE_SIGMOID : MLSTM_GATE_EXP;
      struct sizes z = shapes[shape];
      struct world w = world_new(z, gate, dtypes[variant / 2], NULL, z.b);
      run_forward(&w, 0, 0);
      run_forward(&w, 1, 0);
      run_forward(&w, 7, 0);
      run_forward(&w, 16, 0);
      run_forward(&w, 1000, 0);
      run_forward(&w, 0, 1);
      run_steps(&w, 1);
      run_steps(&w, 5);
      run_steps(&w, 16);
      world_free(&w);
    }
  }
}

/* Packed sequences: empty, single-token, and across chunks. */
static void packed_sequences(void) {
  static const int32_t offsets[] = {0, 0, 1, 18, 18, 83, 100};
  for (int variant = 0; variant < 6; variant++) {
    mlstm_gate gate = variant % 2 ? MLSTM_GATE_SIGMOID : MLSTM_GATE_EXP;
    struct world w =
        world_new((struct sizes){1, 2, 100, 16, 24}, gate, dtypes[variant / 2], offsets, 6);
    run_forward(&w, 0, 0);
    run_forward(&w, 16, 0);
    run_forward(&w, 0, 1);
    world_free(&w);
  }
}

/* Gates that close, open and reset completely stay finite and right. */
static void extreme_gates(void) {
  static const double values[] = {-1000, 1000, -200, 200, -88, 17, -104};
  for (int variant = 0; variant < 2; variant++) {
    struct world w =
        world_new((struct sizes){1, 2, 70, 16, 8}, MLSTM_GATE_EXP, dtypes[variant], NULL, 1);
    for (size_t index = 0; index < w.size[F]; index += 3) {
      w.array[F][index] = values[index / 3 % 7];
      w.array[I][index] = index % 2 ? 15 : -30;
    }
    for (int name = I; name <= F; name++) {
      free(w.data[name]);
      w.data[name] = narrow(w.array[name], w.size[name], w.wide);
      for (size_t index = 0; index < w.size[name]; index++) {
        w.array[name][index] = element(w.data[name], index, w.wide);
      }
    }
    solve(&w, w.array);
    run_forward(&w, 0, 0);
    run_forward(&w, 16, 0);
    run_forward(&w, 0, 1);
    run_steps(&w, 1);
    world_free(&w);
  }
}

/* ---- Gradients ---------------------------------------------------------------------------- */

/* The loss <h, dh> + <c_last, dc> + <n_last, dn>, with the last state's frame taken out. */
static double loss(const struct world* w, double* const array[], double* const cotangent[]) {
  double sum = 0;
  for (size_t index = 0; index < w->size[H]; index++) sum += array[H][index] * cotangent[H][index];
  for (int name = C_LAST; name <= N_LAST; name++) {
    size_t per_head = w->size[name] / w->size[M];
    for (size_t index = 0; index < w->size[name]; index++) {
      size_t head = index / per_head;
      /* array[M_LAST] of the unperturbed run is the frame. */
      double frame =
          w->gate == MLSTM_GATE_EXP ? exp(array[M_LAST][head] - w->array[M_LAST][head]) : 1;
      sum += array[name][index] * frame * cotangent[name][index];
    }
  }
  return sum;
}

/* One random direction in the space of all inputs: the gradient along it is the difference of the
 * loss. A direction that takes a token over the denominator's kink is drawn again. */
static void check_gradient(struct sizes z, mlstm_gate gate, const int32_t* cu_seqlens, int rows,
                           int parallel) {
  enum { INPUTS = M + 1 };
  /* Two central differences, of a step and of half of it, whose errors of second order cancel. */
  const double step = 1e-5, sides_at[4] = {-1, -0.5, 0.5, 1};
  struct world w = world_new(z, gate, MLSTM_F64, cu_seqlens, rows);
  double *cotangent[ARRAYS] = {0}, *direction[INPUTS], *moved[ARRAYS];
  void* gradient[INPUTS];
  for (int name = 0; name < ARRAYS; name++) {
    moved[name] = random_array(w.size[name], 0, 0);
    if (name >= H) cotangent[name] = random_array(w.size[name], -1, 1);
    if (name < INPUTS) direction[name] = random_array(w.size[name], -1, 1);
    if (name < INPUTS) gradient[name] = narrow(NULL, w.size[name], MLSTM_F64);
  }
  double difference = 0;
  for (int attempt = 0; attempt < 20; attempt++) {
    unsigned sides[4];
    double losses[4];
    for (int side = 0; side < 4; side++) {
      const double along = sides_at[side] * step;
      for (int name = 0; name < INPUTS; name++) {
        for (size_t index = 0; index < w.size[name]; index++) {
          moved[name][index] = w.array[name][index] + along * direction[name][index];
        }
      }
      sides[side] = solve(&w, moved);
      losses[side] = loss(&w, moved, cotangent);
    }
    difference = (8 * (losses[2] - losses[1]) - (losses[3] - losses[0])) / (6 * step);
    if (sides[0] == sides[1] && sides[0] == sides[2] && sides[0] == sides[3]) break;
    for (int name = 0; name < INPUTS; name++) {
      for (size_t index = 0; index < w.size[name]; index++) direction[name][index] = uniform(-1, 1);
    }
  }

  mlstm_problem problem = problem_of(&w);
  problem.chunk_size = 8;
  size_t tokens = w.size[I];
  double *n = random_array(tokens, 0, 0), *m = random_array(tokens, 0, 0);
  const int exponential = gate == MLSTM_GATE_EXP;
  mlstm_fw_args fw = forward_of(&w, &problem);
  fw.n = dense(n, MLSTM_F64, z.b, z.nh, z.s, 0);
  if (exponential) fw.m = dense(m, MLSTM_F64, z.b, z.nh, z.s, 0);
  fw.workspace = workspace_new(parallel ? MLSTM_OP_PARALLEL_FW : MLSTM_OP_CHUNKWISE_FW, &problem,
                               &fw.workspace_size);
  mlstm_status status = parallel ? mlstm_parallel_fw(&fw) : mlstm_chunkwise_fw(&fw);
  CHECK_MSG(status == MLSTM_OK, "%s", mlstm_last_error());

  mlstm_bw_args bw = {.struct_size = sizeof bw,
                      .problem = &problem,
                      .q = fw.q,
                      .k = fw.k,
                      .v = fw.v,
                      .i = fw.i,
                      .f = fw.f,
                      .c_initial = fw.c_initial,
                      .n_initial = fw.n_initial,
                      .m_initial = fw.m_initial,
                      .cu_seqlens = fw.cu_seqlens,
                      .h = fw.h,
                      .n = fw.n,
                      .m = fw.m,
                      .dh = tensor_of(&w, H, cotangent[H]),
                      .dc_last = tensor_of(&w, C_LAST, cotangent[C_LAST]),
                      .dn_last = tensor_of(&w, N_LAST, cotangent[N_LAST]),
                      .dq = tensor_of(&w, Q, gradient[Q]),
                      .dk = tensor_of(&w, K, gradient[K]),
                      .dv = tensor_of(&w, V, gradient[V]),
                      .di = tensor_of(&w, I, gradient[I]),
                      .df = tensor_of(&w, F, gradient[F]),
                      .dc_initial = tensor_of(&w, C, gradient[C]),
                      .dn_initial = tensor_of(&w, N, gradient[N]),
                      .dm_initial = tensor_of(&w, M, gradient[M])};
  bw.workspace = workspace_new(parallel ? MLSTM_OP_PARALLEL_BW : MLSTM_OP_CHUNKWISE_BW, &problem,
                               &bw.workspace_size);
  status = parallel ? mlstm_parallel_bw(&bw) : mlstm_chunkwise_bw(&bw);
  CHECK_MSG(status == MLSTM_OK, "%s", mlstm_last_error());

  double along = 0;
  for (int name = 0; name < INPUTS; name++) {
    for (size_t index = 0; index < w.size[name]; index++) {
      along += element(gradient[name], index, MLSTM_F64) * direction[name][index];
    }
  }
  CHECK_MSG(fabs(along - difference) <= 1e-6 * (1 + fabs(difference)),
            "gate %d, %s, %s: the gradient along a direction is %.9g, the loss's difference %.9g",
            gate, parallel ? "parallel" : "chunkwise", cu_seqlens ? "packed" : "dense", along,
            difference);

  free(fw.workspace);
  free(bw.workspace);
  free(n);
  free(m);
  for (int name = 0; name < ARRAYS; name++) {
    free(moved[name]);
    free(cotangent[name]);
    if (name < INPUTS) free(direction[name]);
    if (name < INPUTS) free(gradient[name]);
  }
  world_free(&w);
}

static void gradients(void) {
  static const int32_t offsets[] = {0, 9, 9, 10, 33};
  for (int variant = 0; variant < 4; variant++) {
    mlstm_gate gate = variant % 2 ? MLSTM_GATE_SIGMOID : MLSTM_GATE_EXP;
    int parallel = variant / 2;
    check_gradient((struct sizes){2, 2, 19, 5, 7}, gate, NULL, 2, parallel);
    check_gradient((struct sizes){1, 2, 33, 6, 4}, gate, offsets, 4, parallel);
    check_gradient((struct sizes){1, 1, 1, 3, 2}, gate, NULL, 1, parallel);
  }
}

int main(void) {
  const char* seed = getenv("MLSTM_TEST_SEED");
  random_state = seed ? strtoull(seed, NULL, 10) : (uint64_t)time(NULL) * 2654435761u;
  if (random_state == 0) random_state = 1;
  printf("  seed: MLSTM_TEST_SEED=%llu\n", (unsigned long long)random_state);
  RUN(four_ways_to_the_same_numbers);
  RUN(packed_sequences);
  RUN(extreme_gates);
  RUN(gradients);
  return test_summary("numeric");
}
