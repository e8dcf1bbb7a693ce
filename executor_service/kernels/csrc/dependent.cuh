// Programmatic dependent launch (from sm_90 on): a kernel may begin while the one before it on the stream still runs.
// Every kernel that is launched so waits once, also where it has nothing to read: then the end of one kernel says that
// all before it have ended. Without the attribute at the launch, and on older GPUs, both do nothing.
#pragma once

// Returns when everything before on the stream has ended and its writes are visible.
__device__ __forceinline__ void wait_for_previous() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// From now on the next kernel on the stream may begin, as soon as all blocks of this one have said so or ended.
__device__ __forceinline__ void let_next_begin() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;");
#endif
}
