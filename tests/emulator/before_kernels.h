// Comes before each translated .cu file: its kernels become those of the program.
#include "cuda.h"
#include "kernels.h"
#include "params.cuh"

#undef MLSTM_GEOMETRY
#define MLSTM_GEOMETRY(name, rows, columns, threads, shared) \
  static const emu::AddKernel add_##name(#name, name, {rows, columns, threads, shared, {}});
