#define _DEFAULT_SOURCE
#include "fence.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

enum { PATTERN = 0xc3 };

struct fence fence_new(size_t size) {
  size_t page = (size_t)sysconf(_SC_PAGESIZE);
  size_t pages = (size + page - 1) / page + 1;
  struct fence fence = {NULL, size, NULL, (pages + 1) * page};
  void* map =
      mmap(NULL, fence.map_size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (map == MAP_FAILED || mprotect((char*)map + pages * page, page, PROT_NONE) != 0) {
    perror("fence_new");
    exit(2);
  }
  fence.map = map;
  fence.data = fence.map + pages * page - size;
  memset(fence.map, PATTERN, pages * page - size);
  return fence;
}

int fence_intact(const struct fence* fence) {
  for (const unsigned char* byte = fence->map; byte != fence->data; byte++) {
    if (*byte != PATTERN) return 0;
  }
  return 1;
}

void fence_free(struct fence* fence) {
  munmap(fence->map, fence->map_size);
  memset(fence, 0, sizeof *fence);
}
