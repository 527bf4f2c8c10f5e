/* mLSTM in C: a forward over a prompt, then generation token by token from the state it left.
 *
 *   cc generate.c $(pkg-config --cflags --libs mlstm) -lm -o generate && ./generate
 */
#include <math.h>
#include <mlstm.h>
#include <stdio.h>
#include <stdlib.h>

/* Batch, heads, tokens, head dims. */
enum { B = 1, NH = 2, PROMPT = 100, GENERATED = 20, S = PROMPT + GENERATED, DHQK = 16, DHHV = 32 };

/* What a model's layers would compute for every token, and the mLSTM's output. */
static float q[B * NH * S * DHQK], k[B * NH * S * DHQK], v[B * NH * S * DHHV];
static float i[B * NH * S], f[B * NH * S], h[B * NH * S * DHHV], again[B * NH * S * DHHV];
/* The state that replaces a transformer's cache: the same size after any number of tokens. */
static float c[B * NH * DHQK * DHHV], n[B * NH * DHQK], m[B * NH];

static void check(mlstm_status status) {
  if (status == MLSTM_OK) return;
  fprintf(stderr, "%s: %s\n", mlstm_status_name(status), mlstm_last_error());
  exit(1);
}

/* A view of tokens [from, to) of a dense (B, NH, S, width) array; width 0 for (B, NH, S). */
static mlstm_tensor tokens(float* data, int width, int from, int to) {
  int items = width ? width : 1;
  mlstm_tensor view = {data + from * items,
                       {B, NH, to - from, width},
                       {NH * S * items, S * items, items, 1},
                       MLSTM_F32,
                       width ? 4 : 3};
  return view;
}

static mlstm_tensor state(float* data, int rank) {
  mlstm_tensor dense = {data, {B, NH, DHQK, DHHV}, {0}, MLSTM_F32, rank};
  int64_t stride = 1;
  for (int dim = rank - 1; dim >= 0; dim--) {
    dense.stride[dim] = stride;
    stride *= dense.shape[dim];
  }
  return dense;
}

/* A call on `count` tokens per row. What is not set stays zero, which always means the default. */
static mlstm_problem problem_of(int count) {
  mlstm_problem problem = {.struct_size = sizeof problem,
                           .b = B,
                           .nh = NH,
                           .s = count,
                           .dhqk = DHQK,
                           .dhhv = DHHV,
                           .device = MLSTM_DEVICE_CPU,
                           .dtype = MLSTM_F32};
  return problem;
}

/* The library allocates nothing: scratch memory is the caller's, as large and aligned as it asks.
 * Returns what to free. */
static char* scratch(mlstm_op op, const mlstm_problem* problem, void** workspace, size_t* size) {
  mlstm_requirements needs = {.struct_size = sizeof needs};
  check(mlstm_query(op, problem, &needs));
  size_t unit = needs.workspace_alignment;
  char* memory = malloc(needs.workspace_size + unit);
  *workspace = memory + unit - (uintptr_t)memory % unit;
  *size = needs.workspace_size;
  return memory;
}

/* The forward over the first `count` tokens; writes their h and the state after them. */
static void forward(int count, float* out) {
  mlstm_problem problem = problem_of(count);
  mlstm_fw_args args = {.struct_size = sizeof args,
                        .problem = &problem,
                        .q = tokens(q, DHQK, 0, count),
                        .k = tokens(k, DHQK, 0, count),
                        .v = tokens(v, DHHV, 0, count),
                        .i = tokens(i, 0, 0, count),
                        .f = tokens(f, 0, 0, count),
                        .h = tokens(out, DHHV, 0, count),
                        .c_last = state(c, 4),
                        .n_last = state(n, 3),
                        .m_last = state(m, 2)};
  char* memory = scratch(MLSTM_OP_CHUNKWISE_FW, &problem, &args.workspace, &args.workspace_size);
  check(mlstm_chunkwise_fw(&args));
  free(memory);
}

/* One more token; the state is updated in place. */
static void step(int token) {
  mlstm_problem problem = problem_of(1);
  mlstm_step_args args = {.struct_size = sizeof args,
                          .problem = &problem,
                          .q = tokens(q, DHQK, token, token + 1),
                          .k = tokens(k, DHQK, token, token + 1),
                          .v = tokens(v, DHHV, token, token + 1),
                          .i = tokens(i, 0, token, token + 1),
                          .f = tokens(f, 0, token, token + 1),
                          .h = tokens(h, DHHV, token, token + 1),
                          .c = state(c, 4),
                          .n = state(n, 3),
                          .m = state(m, 2)};
  char* memory = scratch(MLSTM_OP_STEP, &problem, &args.workspace, &args.workspace_size);
  check(mlstm_step(&args));
  free(memory);
}

static void random_numbers(float* data, int count, float scale, float offset) {
  while (count--) *data++ = offset + scale * ((float)rand() / (float)RAND_MAX - 0.5f);
}

int main(void) {
  random_numbers(q, B * NH * S * DHQK, 2, 0);
  random_numbers(k, B * NH * S * DHQK, 2, 0);
  random_numbers(v, B * NH * S * DHHV, 2, 0);
  random_numbers(i, B * NH * S, 2, -1);
  random_numbers(f, B * NH * S, 2, 3);

  forward(PROMPT, h);
  for (int token = PROMPT; token < S; token++) step(token);

  /* The same tokens in one go give the same numbers. */
  forward(S, again);
  float largest = 0, difference = 0;
  for (int at = 0; at < B * NH * S * DHHV; at++) {
    largest = fmaxf(largest, fabsf(again[at]));
    difference = fmaxf(difference, fabsf(again[at] - h[at]));
  }
  printf("mlstm %u.%u.%u: %d tokens at once, then %d one by one; |h| up to %.3f, difference %.1e\n",
         mlstm_version() >> 16, mlstm_version() >> 8 & 255, mlstm_version() & 255, PROMPT,
         GENERATED, largest, difference);
  return difference > 1e-4f * largest;
}
