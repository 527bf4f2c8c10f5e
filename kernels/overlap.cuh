// Kernels that start while the one before them in the stream still runs (programmatic launches, from
// compute capability 9.0 on; elsewhere they do nothing).
#pragma once

namespace mlstm {

// The next kernel may start once all blocks of this one have come here or ended.
__device__ __forceinline__ void start_dependents() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Until the kernel before, if it lets this one start early, has ended and its results are there.
__device__ __forceinline__ void wait_for_previous() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

}  // namespace mlstm
