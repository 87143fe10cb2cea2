// Small kernels, most with a bug that a template parameter plants: what the emulator must compute, and must find.
#pragma once

#include <string>
#include <vector>

#include "cuda/portable.h"

namespace planted {

std::vector<std::string> names();  // of those with a bug

// Runs the right or the wrong version of a kernel over x (n) on 2 blocks of 64 threads.
cudaError_t run(const std::string& name, bool right, const float* x, int n, float* y, cudaStream_t stream);

// Launches a kernel that does nothing, to test the limits of launches.
cudaError_t launch_nothing(int64_t grid, int block, size_t shared_bytes, int allowed_bytes, cudaStream_t stream);

}  // namespace planted
