/* A test program is a list of RUN(function) between a main's braces; CHECK records failures. */
#ifndef MLSTM_TESTS_TEST_H
#define MLSTM_TESTS_TEST_H

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>

static int test_checks, test_failures;

/* Records one check; prints the place and the message of a failed one. */
__attribute__((format(printf, 4, 5))) static inline int test_check(int ok, const char* file,
                                                                   int line, const char* format,
                                                                   ...) {
  test_checks++;
  if (ok) return 1;
  va_list arguments;
  va_start(arguments, format);
  fprintf(stderr, "%s:%d: ", file, line);
  vfprintf(stderr, format, arguments);
  fputc('\n', stderr);
  va_end(arguments);
  /* A broken library fails everything: the first messages are the useful ones. */
  if (++test_failures == 50) {
    fprintf(stderr, "too many failures\n");
    exit(1);
  }
  return 0;
}

#define CHECK(condition) test_check(!!(condition), __FILE__, __LINE__, "%s", #condition)
#define CHECK_MSG(condition, ...) test_check(!!(condition), __FILE__, __LINE__, __VA_ARGS__)

#define RUN(function)                                                             \
  do {                                                                            \
    int before = test_failures;                                                   \
    function();                                                                   \
    printf("  %-28s %s\n", #function, test_failures == before ? "ok" : "FAILED"); \
    fflush(stdout);                                                               \
  } while (0)

/* The program's exit status. */
static inline int test_summary(const char* program) {
  printf("%s: %d checks, %d failed\n", program, test_checks, test_failures);
  return test_failures != 0;
}

#endif
