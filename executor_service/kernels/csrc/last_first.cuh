// The order of a kernel's blocks. What the kernel before has written last is still in the L2 cache, what it wrote first is
// not if it was more than fits: so the last rows come first, before others take their place.
#pragma once

__device__ __forceinline__ long long last_first() { return gridDim.x - 1 - blockIdx.x; }
