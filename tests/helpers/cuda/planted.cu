#include "planted.h"

namespace planted {

namespace {

constexpr int kBlocks = 2, kThreads = 64;

#define KERNEL(name) \
  template <bool right> \
  __global__ void name([[maybe_unused]] const float* x, [[maybe_unused]] int n, float* y)

// Its place in the block, in the grid.
#define THREAD const int t = threadIdx.x, i = blockIdx.x * kThreads + t

KERNEL(barrier) {
  THREAD;
  __shared__ float tile[kThreads];
  tile[t] = x[i];
  if constexpr (right) __syncthreads();
  y[i] = tile[kThreads - 1 - t];
}

KERNEL(barrier_before_reuse) {
  THREAD;
  __shared__ float tile[kThreads];
  float sum = 0;
  for (int step = 1; step <= 2; ++step) {
    tile[t] = x[i] * step;
    __syncthreads();
    sum += tile[kThreads - 1 - t];
    if constexpr (right) __syncthreads();
  }
  y[i] = sum;
}

KERNEL(warp_barrier) {
  THREAD;
  __shared__ float tile[kThreads];
  tile[t] = x[i];
  if constexpr (right) __syncwarp();
  y[i] = tile[t ^ 31];
}

KERNEL(warp_barrier_after_loads) {
  THREAD;
  __shared__ float tile[kThreads / 32];
  float* const mine = tile + t / 32;
  if (t % 32 == 0) *mine = x[i];
  __syncwarp();
  float sum = *mine;
  __syncwarp();
  sum += *mine;
  if constexpr (right) __syncwarp();
  if (t % 32 == 31) *mine = sum;
  __syncwarp();
  y[i] = *mine + sum;
}

KERNEL(divergent_barrier) {
  THREAD;
  if (right || t < 32) __syncthreads();
  else __syncthreads();
  y[i] = x[i];
}

KERNEL(barrier_of_some) {
  THREAD;
  if (right || t < 40) __syncwarp();
  __syncthreads();
  y[i] = x[i];
}

KERNEL(returned_lane) {
  THREAD;
  y[i] = x[i];
  if (!right && t == 40) return;
  __syncwarp();
}

KERNEL(lane_mask) {
  THREAD;
  float value = x[i];
  if (t % 32 < 16) value = __shfl_xor_sync(right ? 0xffffu : 0xffffffffu, value, 8);
  y[i] = value;
}

KERNEL(lane_outside_mask) {
  THREAD;
  float value = x[i];
  if (t % 32 < 16) value = __shfl_sync(0xffffu, value, right ? 3 : 19);
  y[i] = value;
}

KERNEL(read_past_end) {
  THREAD;
  if (i < n) y[i] = x[i] + (i + 1 < n + !right ? x[i + 1] : 0);
}

KERNEL(write_past_end) {
  THREAD;
  if (i < n + !right) y[i] = i < n ? x[i] : 0;
}

KERNEL(shared_past_end) {
  THREAD;
  __shared__ float tile[kThreads];
  tile[t] = x[i];
  __syncthreads();
  y[i] = tile[right ? (t + 1) % kThreads : t + 1];
}

KERNEL(dynamic_shared_past_end) {
  THREAD;
  EXSSNET_DYNAMIC_SHARED(float, tile);
  tile[t] = x[i];
  __syncthreads();
  y[i] = tile[right ? (t + 1) % kThreads : t + 1];
}

KERNEL(uninitialised_shared) {
  THREAD;
  __shared__ float tile[kThreads];
  if (right || t % 2 == 0) tile[t] = x[i];
  __syncthreads();
  y[i] = tile[t ^ 1];
}

KERNEL(misaligned_vector) {
  THREAD;
  if (4 * i >= n) return;
  const float4 v = *reinterpret_cast<const float4*>(x + 4 * i + !right);
  y[i] = v.x + v.y + v.z + v.w;
}

KERNEL(missing_atomic) {
  THREAD;
  __shared__ int count;
  if (t == 0) count = 0;
  __syncthreads();
  if (x[i] > 0) {
    if constexpr (right) atomicAdd(&count, 1);
    else ++count;
  }
  __syncthreads();
  if (t == 0) y[blockIdx.x] = static_cast<float>(count);
}

KERNEL(read_beside_atomic) {
  THREAD;
  __shared__ int most;
  if (t == 0) most = 0;
  __syncthreads();
  atomicMax(&most, static_cast<int>(x[i]));
  if constexpr (right) __syncthreads();
  if (t == 0) y[blockIdx.x] = static_cast<float>(most);
}

KERNEL(colliding_blocks) {
  THREAD;
  y[right ? i : t] = 1;
}

KERNEL(overflow) {
  THREAD;
  constexpr int scale = 1 << 28;
  const int64_t product = right ? int64_t{i} * scale : i * scale;
  y[i] = static_cast<float>(product / scale);
}

// y: the sum, each block's sum, a counter that starts at zero. The block that comes last adds the others' sums.
template <bool fence_before, bool fence_after, bool counted>
__device__ void add_in_last_block(const float* x, float* y) {
  THREAD;
  if (t != 0) return;
  float sum = 0;
  for (int k = 0; k < kThreads; ++k) sum += x[i + k];
  if constexpr (fence_before) __threadfence();
  y[1 + blockIdx.x] = sum;
  if constexpr (fence_after) __threadfence();
  int* const counter = reinterpret_cast<int*>(y + 1 + kBlocks);
  if (atomicAdd(counter + (counted ? 0 : blockIdx.x), 1) != (counted ? kBlocks - 1 : 0)) return;
  sum = 0;
  for (int k = 0; k < kBlocks; ++k) sum += y[1 + k];
  y[0] = sum;
}

KERNEL(last_block_without_fence) { add_in_last_block<false, right, true>(x, y); }
KERNEL(last_block_with_early_fence) { add_in_last_block<!right, right, true>(x, y); }
KERNEL(last_block_without_counter) { add_in_last_block<false, true, right>(x, y); }

// ---- kernels without a bug

KERNEL(shuffles) {
  THREAD;
  const unsigned all = 0xffffffffu;
  y[i] = __shfl_sync(all, x[i], 11, 8);  // lane 3 of each 8
  y[kBlocks * kThreads + i] = __shfl_up_sync(all, x[i], 3);
  y[2 * kBlocks * kThreads + i] = __shfl_down_sync(all, static_cast<double>(x[i]), 5, 16);
  y[3 * kBlocks * kThreads + i] = __shfl_xor_sync(all, x[i], 6);
}

KERNEL(votes) {
  THREAD;
  const unsigned odd = 0xaaaaaaaau, mine = t % 2 ? odd : ~odd;
  const bool vote = x[i] > 100;
  const unsigned ballot = __ballot_sync(mine, vote);
  y[i] = static_cast<float>(__popc(ballot) + 100 * (ballot >> t % 32 & 1) + 1000 * (ballot & ~mine));
  y[kBlocks * kThreads + i] = static_cast<float>(__any_sync(mine, vote) + 2 * __all_sync(mine, x[i] > 1));
}

KERNEL(barrier_votes) {
  THREAD;
  const int count = __syncthreads_count(x[i] > 100);
  const int any = __syncthreads_or(x[i] > 127), all = __syncthreads_and(x[i] > 1);
  y[i] = static_cast<float>(count + 1000 * any + 10000 * all);
}

// In which order threads come, twice; the counter, zero at first, lies behind.
KERNEL(tickets) {
  THREAD;
  int* const counter = reinterpret_cast<int*>(y + 2 * kBlocks * kThreads);
  y[i] = static_cast<float>(atomicAdd(counter, 1));
  __syncwarp();
  y[kBlocks * kThreads + i] = static_cast<float>(atomicAdd(counter, 1));
}

// Each thread applies its x to shared words; what they held before goes nowhere.
KERNEL(atomics) {
  THREAD;
  __shared__ unsigned long long sum;
  __shared__ int least, most, swapped;
  __shared__ unsigned bits, common;
  if (t == 0) sum = 1ull << 40, least = 1000, most = -1000, swapped = -1, bits = 0, common = ~0u;
  __syncthreads();
  const int value = static_cast<int>(x[i]);
  atomicAdd(&sum, static_cast<unsigned long long>(value));
  atomicMin(&least, value);
  atomicMax(&most, value);
  atomicOr(&bits, static_cast<unsigned>(value));
  atomicAnd(&common, static_cast<unsigned>(value) | 256u);
  const bool first = atomicCAS(&swapped, -1, value) == -1;
  __syncthreads();
  if (first && swapped == value) y[6 * blockIdx.x + 5] += 1;
  if (t != 0) return;
  const float results[] = {static_cast<float>(sum - (1ull << 40)), static_cast<float>(least), static_cast<float>(most),
                           static_cast<float>(bits), static_cast<float>(common)};
  for (int k = 0; k < 5; ++k) y[6 * blockIdx.x + k] = results[k];
}

// What shared memory holds before anything is written, and that a block leaves nothing to the next.
KERNEL(fresh_shared) {
  THREAD;
  EXSSNET_DYNAMIC_SHARED(float, dynamic);
  __shared__ float fixed[kThreads];
  y[i] = (fixed[t] != fixed[t]) + (dynamic[t] != dynamic[t]);
  fixed[t] = dynamic[t] = x[i];
}

KERNEL(copy_not_awaited) {
  THREAD;
  __shared__ uint4 tile[kThreads / 4];
  const uint4* const of_block = reinterpret_cast<const uint4*>(x + blockIdx.x * kThreads);
  if (t < kThreads / 4) exssnet::cuda::copy_async(tile + t, of_block + t, t % 2 == 0);
  if constexpr (right) exssnet::cuda::await_copies();
  __syncthreads();
  y[i] = reinterpret_cast<const float*>(tile)[t];
}

KERNEL(copy_awaited_after_barrier) {
  THREAD;
  __shared__ uint4 tile[kThreads / 4];
  const uint4* const of_block = reinterpret_cast<const uint4*>(x + blockIdx.x * kThreads);
  if (t < kThreads / 4) exssnet::cuda::copy_async(tile + t, of_block + t, true);
  if constexpr (right) exssnet::cuda::await_copies();
  __syncthreads();
  if constexpr (!right) exssnet::cuda::await_copies();
  y[i] = reinterpret_cast<const float*>(tile)[kThreads - 1 - t];
}

KERNEL(copy_begun_before_barrier) {
  THREAD;
  __shared__ uint4 tile[kThreads / 4];
  const uint4* const of_block = reinterpret_cast<const uint4*>(x + blockIdx.x * kThreads);
  float sum = 0;
  for (int step = 0; step < 2; ++step) {
    if (right) __syncthreads();
    if (t < kThreads / 4) exssnet::cuda::copy_async(tile + t, of_block + t, true);
    if (!right) __syncthreads();
    exssnet::cuda::await_copies();
    __syncthreads();
    sum += reinterpret_cast<const float*>(tile)[kThreads - 1 - t];
  }
  y[i] = sum;
}

struct Plant {
  std::string name;
  void (*right)(const float*, int, float*);
  void (*wrong)(const float*, int, float*);
  size_t shared_bytes = 0;
};

#define PLANT(kernel, ...) {#kernel, kernel<true>, kernel<false> __VA_OPT__(, ) __VA_ARGS__}
const std::vector<Plant> plants{
    PLANT(barrier), PLANT(barrier_before_reuse), PLANT(warp_barrier), PLANT(warp_barrier_after_loads),
    PLANT(divergent_barrier), PLANT(barrier_of_some), PLANT(returned_lane), PLANT(lane_mask), PLANT(lane_outside_mask),
    PLANT(read_past_end), PLANT(write_past_end), PLANT(shared_past_end),
    PLANT(dynamic_shared_past_end, kThreads * sizeof(float)), PLANT(uninitialised_shared), PLANT(misaligned_vector),
    PLANT(missing_atomic), PLANT(read_beside_atomic), PLANT(colliding_blocks), PLANT(overflow),
    PLANT(last_block_without_fence), PLANT(last_block_with_early_fence), PLANT(last_block_without_counter),
    PLANT(copy_not_awaited), PLANT(copy_awaited_after_barrier), PLANT(copy_begun_before_barrier),
};
#define SOUND(kernel, ...) {#kernel, kernel<true>, nullptr __VA_OPT__(, ) __VA_ARGS__}
const std::vector<Plant> sound{SOUND(shuffles), SOUND(votes),   SOUND(barrier_votes),
                               SOUND(tickets),  SOUND(atomics), SOUND(fresh_shared, kThreads * sizeof(float))};

__global__ void nothing() {}

}  // namespace

std::vector<std::string> names() {
  std::vector<std::string> result;
  for (const Plant& plant : plants) result.push_back(plant.name);
  return result;
}

cudaError_t run(const std::string& name, bool right, const float* x, int n, float* y, cudaStream_t stream) {
  for (const auto* list : {&plants, &sound})
    for (const Plant& plant : *list)
      if (plant.name == name)
        return EXSSNET_LAUNCH((right ? plant.right : plant.wrong), kBlocks, kThreads, plant.shared_bytes, stream, x, n,
                              y);
  return cudaErrorInvalidValue;
}

cudaError_t launch_nothing(int64_t grid, int block, size_t shared_bytes, int allowed_bytes, cudaStream_t stream) {
  if (allowed_bytes > 0) {
    const cudaError_t error =
        cudaFuncSetAttribute(nothing, cudaFuncAttributeMaxDynamicSharedMemorySize, allowed_bytes);
    if (error != cudaSuccess) return error;
  }
  return EXSSNET_LAUNCH(nothing, grid, block, shared_bytes, stream);
}

}  // namespace planted
