/* Memory that notices stray accesses of a library that is not instrumented itself: it ends where
 * an inaccessible page begins, and the bytes before it carry a pattern. */
#ifndef MLSTM_TESTS_FENCE_H
#define MLSTM_TESTS_FENCE_H

#include <stddef.h>

struct fence {
  void* data;
  size_t size;
  unsigned char* map;
  size_t map_size;
};

/* `size` bytes, a multiple of their alignment. */
struct fence fence_new(size_t size);
/* Whether the bytes before the memory are untouched. */
int fence_intact(const struct fence* fence);
void fence_free(struct fence* fence);

#endif
