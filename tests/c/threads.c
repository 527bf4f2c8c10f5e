/* Any number of threads may call at once: each gets the bits that a lone call gives, and its own
 * error message. Prints a hash of the bits, to be compared between numbers of worker threads. */
#include <pthread.h>
#include <stdio.h>
#include <string.h>

#include "call.h"
#include "test.h"

enum { THREADS = 8, ROUNDS = 15, OPS = 5 };

/* FNV-1a over the outputs of a call. */
static uint64_t hash_outputs(const struct call* call, uint64_t hash) {
  for (int index = 0; index < call->count; index++) {
    const struct fence* memory = &call->memory[index];
    if (call->members[index].role != OUT || !memory->map) continue;
    for (size_t byte = 0; byte < memory->size; byte++) {
      hash = (hash ^ ((unsigned char*)memory->data)[byte]) * 1099511628211u;
    }
  }
  return hash;
}

struct worker {
  pthread_t thread;
  int number, failures;
  /* Calls with the same inputs in every worker. */
  struct call calls[OPS];
  const uint64_t* expected;
};

static void* work(void* argument) {
  struct worker* worker = argument;
  for (int round = 0; round < ROUNDS; round++) {
    struct call* call = &worker->calls[(round + worker->number) % OPS];
    int op = (int)(call - worker->calls);
    if ((round + worker->number) % 3 == 0) {
      char expected[64];
      int64_t good = call->problem.b;
      call->problem.b = -1 - worker->number;
      snprintf(expected, sizeof expected, "problem.b: expected a size >= 0, got %d",
               -1 - worker->number);
      worker->failures += call_run(call) != MLSTM_INVALID_ARGUMENT;
      worker->failures += strcmp(mlstm_last_error(), expected) != 0;
      call->problem.b = good;
    }
    call_poison(call, POISON);
    worker->failures += call_run(call) != MLSTM_OK;
    worker->failures += *mlstm_last_error() != 0;
    worker->failures += hash_outputs(call, 0) != worker->expected[op];
  }
  return NULL;
}

static void init_calls(struct call calls[OPS]) {
  srand(1);
  for (int op = 0; op < OPS; op++) {
    call_init(&calls[op], op + 1,
              (struct options){.large = 1, .separate = op + 1 == MLSTM_OP_STEP});
  }
}

int main(void) {
  struct call lone[OPS];
  uint64_t expected[OPS], all = 0;
  init_calls(lone);
  for (int op = 0; op < OPS; op++) {
    CHECK_MSG(call_run(&lone[op]) == MLSTM_OK, "%s", mlstm_last_error());
    expected[op] = hash_outputs(&lone[op], 0);
    all = hash_outputs(&lone[op], all);
  }
  static struct worker workers[THREADS];
  for (int number = 0; number < THREADS; number++) {
    workers[number].number = number;
    workers[number].expected = expected;
    init_calls(workers[number].calls);
  }
  for (int number = 0; number < THREADS; number++) {
    CHECK(pthread_create(&workers[number].thread, NULL, work, &workers[number]) == 0);
  }
  for (int number = 0; number < THREADS; number++) {
    CHECK(pthread_join(workers[number].thread, NULL) == 0);
    CHECK_MSG(workers[number].failures == 0, "%d wrong results in thread %d",
              workers[number].failures, number);
    for (int op = 0; op < OPS; op++) call_free(&workers[number].calls[op]);
  }
  for (int op = 0; op < OPS; op++) call_free(&lone[op]);
  printf("  bits: %016llx\n", (unsigned long long)all);
  return test_summary("threads");
}
