#include "cuda/sparse.h"

#include <utility>

#include "cuda/sparse_walk.h"

namespace exssnet::cuda {

namespace {

constexpr int kSampledRows = 2;    // rows of a warp, in the gradient of the values
constexpr int kGroup = 8;          // dot products that a warp reduces together
constexpr int64_t kBlocks = 512;   // number of blocks that a gradient of the values is split into, if possible

// Reads the value of an entry. Entries with a slot out of range are left out.
template <class T>
struct ValueOf {
  const T *free, *frozen;
  int64_t free_count, count;

  __device__ bool operator()(int slot, Sum<T>& value) const {
    if (slot < 0 || slot >= count) return false;
    value = static_cast<Sum<T>>(slot < free_count ? free[slot] : frozen[slot - free_count]);
    return true;
  }
};

// Reads the slot of an entry. Only free entries are used.
struct FreeSlot {
  int64_t free_count;

  __device__ bool operator()(int slot, int& kept) const {
    kept = slot;
    return 0 <= slot && slot < free_count;
  }
};

// The epilogue for the sums of a row (see SparseEpilogue).
template <class T>
struct Finish {
  const T *scale, *bias, *residual;
  bool relu;
};

__device__ inline uint4 vector_at(const uint4* patch, int byte) {
  return *reinterpret_cast<const uint4*>(reinterpret_cast<const char*>(patch) + byte);
}

// For the entries [first, last) of a window: multiplies this lane's elements of their sources with their values, and
// adds the products to `total`. The sums of each part start at zero, which keeps rounding errors small.
template <class T, int kVectors, bool kStaged>
__device__ void add_part(const Entry<Sum<T>>* window, int first, int last, const uint4* patch,
                         const T* x, int64_t plane, const int (&at)[kVectors],
                         Sum<T> (&total)[kVectors][kLanes<T>]) {
  Sum<T> sum[kVectors][kLanes<T>] = {};
  constexpr int at_once = kStaged ? 2 : 8;  // several loads with a long latency overlap
#pragma unroll at_once
  for (int k = first; k < last; ++k) {
    const Entry<Sum<T>> entry = window[k];
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      Sum<T> elements[kLanes<T>];
      if constexpr (kStaged) spread<T>(vector_at(patch, entry.offset + at[v]), elements);
      else spread<T>(*reinterpret_cast<const uint4*>(x + entry.offset * plane), elements);
#pragma unroll
      for (int j = 0; j < kLanes<T>; ++j) sum[v][j] += entry.what * elements[j];
    }
  }
#pragma unroll
  for (int v = 0; v < kVectors; ++v)
#pragma unroll
    for (int j = 0; j < kLanes<T>; ++j) total[v][j] += sum[v][j];
}

// Writes a vector of a row of the result.
template <class T>
__device__ void finish(const Plan& plan, const Finish<T>& then, int row, const Place& place, bool aligned,
                       const Sum<T> (&total)[kLanes<T>], T* y) {
  const int64_t at = int64_t{row} * plan.h.out * plan.w.out * plan.batch + place.in_result;
  const int64_t left = min(plan.batch - place.image, int64_t{kLanes<T>});
  const Sum<T> scale = then.scale ? static_cast<Sum<T>>(then.scale[row]) : Sum<T>(1);
  const Sum<T> bias = then.bias ? static_cast<Sum<T>>(then.bias[row]) : Sum<T>(0);
  Sum<T> residual[kLanes<T>] = {};
  if (then.residual) spread<T>(load(then.residual + at, left, in_vectors(then.residual, plan.batch)), residual);
  T stored[kLanes<T>];
#pragma unroll
  for (int j = 0; j < kLanes<T>; ++j) {
    const Sum<T> v = (then.scale ? total[j] * scale + bias : total[j] + bias) + residual[j];
    stored[j] = static_cast<T>(then.relu && v < 0 ? Sum<T>(0) : v);
  }
  if (aligned) {
    uint4 vector;
    memcpy(&vector, stored, 16);
    *reinterpret_cast<uint4*>(y + at) = vector;
  } else {
#pragma unroll
    for (int j = 0; j < kLanes<T>; ++j)
      if (j < left) y[at + j] = stored[j];
  }
}

// y (rows, H', W', N) is the product of the pattern's rows with x (channels, H, W, N). There is a block for each group
// of rows and each tile. Without kStaged, x is one pixel in aligned vectors, and is read in place.
template <class T, int kRows, int kVectors, bool kStaged>
__global__ void __launch_bounds__(kSparseThreads, 2)
    multiply(const __grid_constant__ Plan plan, const __grid_constant__ Pattern pattern,
             const __grid_constant__ ValueOf<T> values, const __grid_constant__ Finish<T> then,
             const T* __restrict__ x, T* __restrict__ y) {
  EXSSNET_DYNAMIC_SHARED(uint4, memory);
  __shared__ int order[32];
  __shared__ Tile tile;
  auto* const windows = reinterpret_cast<Window<Sum<T>>*>(memory) + threadIdx.x / 32 * kRows;
  uint4* const behind = memory + kSparseWarps * kRows * sizeof(Window<Sum<T>>) / 16;
  int* const chart = reinterpret_cast<int*>(behind);
  uint4* const patches = behind + plan.chart_vectors;
  const int64_t groups = groups_of(plan.rows, kRows * kSparseWarps);
  enter<T>(plan, blockIdx.x / groups, tile);
  if (plan.charted) draw_chart<T>(plan, tile, chart);
  const int64_t group = blockIdx.x % groups;
  deal<kRows>(plan, pattern, group, order);
  Cursor cursor = begin_rows<kRows>(plan, pattern, group, order, 0, windows);
  Sum<T> total[kRows][kVectors][kLanes<T>] = {};
  int at[kVectors];
#pragma unroll
  for (int v = 0; v < kVectors; ++v) at[v] = place<T>(plan, tile, v).in_patch;
  const int64_t plane = plan.batch;
  const int64_t lane_at = kStaged ? 0 : max(place<T>(plan, tile, 0).in_result, int64_t{0});  // any place for idle lanes
  for_each_chunk<T, kStaged>(plan, tile, 0, plan.units, x, chart, patches, [&](int begin, int end, uint4* patch) {
#pragma unroll
    for (int r = 0; r < kRows; ++r)
      for_each_part<kStaged>(plan, pattern, tile, begin, end, cursor, r, windows[r], values, [&](int first, int last) {
        add_part<T, kVectors, kStaged>(windows[r].entries, first, last, patch, x + lane_at, plane, at, total[r]);
      });
  });
  const bool aligned = in_vectors(y, plan.batch);
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    const Place here = place<T>(plan, tile, v);
    if (here.in_result < 0) continue;
#pragma unroll
    for (int r = 0; r < kRows; ++r)
      if (const int row = row_of<kRows>(plan, group, order, r); row < plan.rows)
        finish(plan, then, row, here, aligned, total[r][v], y);
  }
}

// Sums kGroup numbers over the lanes. Lane i gets the sum of number i / 4.
template <class S>
__device__ S sum_each(S (&x)[kGroup]) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  static_assert(kGroup == 8);
#pragma unroll
  for (int count = 4, step = 16; count > 0; count /= 2, step /= 2) {
    const bool upper = (lane & step) != 0;
#pragma unroll
    for (int i = 0; i < count; ++i) {
      const S sent = upper ? x[i] : x[i + count], kept = upper ? x[i + count] : x[i];
      x[i] = kept + __shfl_xor_sync(kAllLanes, sent, step);
    }
  }
  x[0] += __shfl_xor_sync(kAllLanes, x[0], 2);
  return x[0] + __shfl_xor_sync(kAllLanes, x[0], 1);
}

// How the sums over pixels and images are split among blocks. A block processes `tiles` tiles and `units` units.
struct Split {
  int64_t splits, tiles, all_tiles;
  int ranges, units;
};

// The part of the sums that a block computes. Like the tile, it is in shared memory.
struct Share {
  int64_t group, first_tile, first_sum;
  int tiles, from_unit, to_unit;
};

// sums (splits, free_count): inner products of grad (rows, H', W', N) with the sources of the free entries, summed over
// the tiles of each split. There is a block for each group of rows, range of units and split.
template <class T, int kRows, int kVectors, bool kStaged>
__global__ void __launch_bounds__(kSparseThreads, 2)
    sample(const __grid_constant__ Plan plan, const __grid_constant__ Pattern pattern,
           const __grid_constant__ Split split, const __grid_constant__ FreeSlot slots, const T* __restrict__ x,
           const T* __restrict__ grad, Sum<T>* __restrict__ sums) {
  EXSSNET_DYNAMIC_SHARED(uint4, memory);
  __shared__ int order[32];
  __shared__ Tile tile;
  __shared__ Share share;
  auto* const windows = reinterpret_cast<Window<int>*>(memory) + threadIdx.x / 32 * kRows;
  uint4* const behind = memory + kSparseWarps * kRows * sizeof(Window<int>) / 16;
  int* const chart = reinterpret_cast<int*>(behind);
  uint4* const patches = behind + plan.chart_vectors;
  const int64_t groups = groups_of(plan.rows, kRows * kSparseWarps);
  int64_t index = blockIdx.x;
  const int64_t group = index % groups;
  deal<kRows>(plan, pattern, group, order);
  index /= groups;
  const int from_unit = static_cast<int>(index % split.ranges) * split.units;
  index /= split.ranges;
  if (threadIdx.x == 0) {
    const int64_t first_tile = index * split.tiles;
    share = {group, first_tile, index * slots.free_count,
             static_cast<int>(min(split.tiles, split.all_tiles - first_tile)), from_unit,
             from_unit + min(split.units, plan.units - from_unit)};
  }
  __syncthreads();
  for (int t = 0; t < share.tiles; ++t) {
    enter<T>(plan, share.first_tile + t, tile);
    if (plan.charted) draw_chart<T>(plan, tile, chart);
    Cursor cursor = begin_rows<kRows>(plan, pattern, share.group, order, share.from_unit, windows);
    uint4 g[kRows][kVectors];
    int at[kVectors];
    unsigned idle = 0;  // bit v: vector v is outside the result, so that its address belongs to another lane
    const int64_t lane_at = kStaged ? 0 : max(place<T>(plan, tile, 0).in_result, int64_t{0});
    const bool aligned = in_vectors(grad, plan.batch);
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      const Place here = place<T>(plan, tile, v);
      at[v] = here.in_patch;
      const bool works = here.in_result >= 0;
      idle |= static_cast<unsigned>(!works) << v;
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const int64_t row = row_of<kRows>(plan, share.group, order, r);
        g[r][v] = make_uint4(0, 0, 0, 0);
        if (works && row < plan.rows)
          g[r][v] = load(grad + row * plan.h.out * plan.w.out * plan.batch + here.in_result, plan.batch - here.image,
                         aligned);
      }
    }
    const auto add_chunk = [&](int begin, int end, uint4* patch) {
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        for_each_part<kStaged>(
            plan, pattern, tile, begin, end, cursor, r, windows[r], slots, [&](int first, int last) {
              for (; first < last; first += kGroup) {
                Sum<T> dots[kGroup];
#pragma unroll
                for (int e = 0; e < kGroup; ++e) {
                  const int offset = windows[r].entries[min(first + e, last - 1)].offset;
                  Sum<T> dot = 0;
#pragma unroll
                  for (int v = 0; v < kVectors; ++v) {
                    if (idle >> v & 1) continue;
                    Sum<T> elements[kLanes<T>], gradients[kLanes<T>];
                    spread<T>(g[r][v], gradients);
                    if constexpr (kStaged) spread<T>(vector_at(patch, offset + at[v]), elements);
                    else spread<T>(*reinterpret_cast<const uint4*>(x + lane_at + offset * plan.batch), elements);
#pragma unroll
                    for (int j = 0; j < kLanes<T>; ++j) dot += gradients[j] * elements[j];
                  }
                  dots[e] = dot;
                }
                const Sum<T> sum = sum_each(dots);
                const int e = first + static_cast<int>(threadIdx.x % 32 / 4);
                if (threadIdx.x % 4 != 0 || e >= last) continue;
                Sum<T>& to = sums[share.first_sum + windows[r].entries[e].what];
                to = t == 0 ? sum : to + sum;
              }
            });
      }
    };
    for_each_chunk<T, kStaged>(plan, tile, share.from_unit, share.to_unit, x, chart, patches, add_chunk);
  }
}

// grad_values (count,) from the sums of the splits (splits, count).
template <class T>
__global__ void __launch_bounds__(kSparseThreads)
    add_splits(const Sum<T>* __restrict__ sums, int64_t splits, int64_t count, T* __restrict__ grad_values) {
  for (int64_t i = int64_t{blockIdx.x} * kSparseThreads + threadIdx.x; i < count;
       i += int64_t{gridDim.x} * kSparseThreads) {
    Sum<T> sum = 0;
    for (int64_t s = 0; s < splits; ++s) sum += sums[s * count + i];
    grad_values[i] = static_cast<T>(sum);
  }
}

// ---- Host code

// Calls body(T*) for the type of a dtype.
template <class Body>
auto with_cuda_type(Float dtype, const Body& body) {
  switch (dtype) {
    case Float::float16: return body(static_cast<__half*>(nullptr));
    case Float::bfloat16: return body(static_cast<__nv_bfloat16*>(nullptr));
    case Float::float32: return body(static_cast<float*>(nullptr));
    default: return body(static_cast<double*>(nullptr));
  }
}

// Bytes of shared memory of a block that processes `units` units.
template <class What>
size_t shared_bytes(const Plan& plan, int rows, int units, bool staged) {
  const int patches = plan.plane() * plan.chunk * (units > plan.chunk ? 2 : 1);
  return kSparseWarps * rows * sizeof(Window<What>) +
         (staged ? size_t{16} * (patches + plan.chart_vectors) : 0);
}

// Allows a kernel the largest shared memory that it can need, not only `bytes`: another thread may launch it with more
// at the same time.
template <class What, class... P>
cudaError_t allow_shared(void (*kernel)(P...), int rows, size_t bytes) {
  if (bytes <= size_t{48} << 10) return cudaSuccess;
  const size_t most = kSparseWarps * rows * sizeof(Window<What>) + 2 * kPatchBytes;
  return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(most));
}

// Whether x should be read from the caches, not staged: images of one pixel, with a batch that does not fill a tile.
template <class T>
bool is_direct(const Convolution& c, const Plan& plan, const T* x) {
  return is_one_pixel(c) && in_vectors(x, plan.batch) && plan.batch / kLanes<T> <= 32 * kHeld<T>;
}

bool fits_a_grid(int64_t blocks) { return blocks <= std::numeric_limits<int>::max(); }

template <class T, int kRows, int kVectors, bool kStaged>
cudaError_t launch_multiply(const Plan& plan, const Pattern& pattern, const ValueOf<T>& values, const Finish<T>& then,
                            const T* x, T* y, cudaStream_t stream) {
  const int64_t blocks = plan.tiles() * groups_of(plan.rows, kRows * kSparseWarps);
  if (!fits_a_grid(blocks)) return cudaErrorInvalidValue;
  const auto kernel = multiply<T, kRows, kVectors, kStaged>;
  const size_t shared = shared_bytes<Sum<T>>(plan, kRows, plan.units, kStaged);
  if (const cudaError_t error = allow_shared<Sum<T>>(kernel, kRows, shared); error != cudaSuccess) return error;
  return EXSSNET_LAUNCH(kernel, static_cast<unsigned>(blocks), kSparseThreads, shared, stream, plan, pattern, values,
                        then, x, y);
}

// Number of rows per warp: 1, 2 or kMostRows, whichever minimizes the work of the busiest multiprocessor. Copying a
// vector into the patch counts as much as reading two vectors from it.
template <class T>
int rows_of_warps(const Plan& plan, const Pattern& pattern, int processors) {
  const double staged = 2.0 * plan.units * plan.plane();
  const double read = 32.0 * kHeld<T> * static_cast<double>(pattern.entries) / plan.rows;
  const auto work = [&](int rows) {
    const int64_t blocks = plan.tiles() * groups_of(plan.rows, int64_t{rows} * kSparseWarps);
    return static_cast<double>(groups_of(blocks, processors)) * (staged + rows * kSparseWarps * read);
  };
  int best = kMostRows<T>;
  for (int rows = best / 2; rows > 0; rows /= 2)
    if (work(rows) < work(best)) best = rows;
  return best;
}

template <class T>
cudaError_t product(const Convolution& c, const Pattern& pattern, bool transposed, const SparseValues& values,
                    const SparseEpilogue& then, const T* x, T* y, int processors, cudaStream_t stream) {
  Plan plan = plan_of(c, pattern, transposed);
  if (plan.rows == 0 || plan.batch == 0 || plan.h.out == 0 || plan.w.out == 0) return cudaSuccess;
  const auto at = [](const void* p) { return static_cast<const T*>(p); };
  const ValueOf<T> of{at(values.free), at(values.frozen), values.free_count, values.count};
  const Finish<T> finish{at(then.scale), at(then.bias), at(then.residual), then.relu};
  if (is_direct(c, plan, x)) {
    lay_out<T>(plan, 32);
    plan.units = 1;
    return launch_multiply<T, 1, 1, false>(plan, pattern, of, finish, x, y, stream);
  }
  lay_out<T>(plan, 32 * kHeld<T>);
  plan.charted = can_chart(plan, x);
  const int rows = rows_of_warps<T>(plan, pattern, processors);
  if (rows == 1) return launch_multiply<T, 1, kHeld<T>, true>(plan, pattern, of, finish, x, y, stream);
  if (rows == 2) return launch_multiply<T, 2, kHeld<T>, true>(plan, pattern, of, finish, x, y, stream);
  return launch_multiply<T, kMostRows<T>, kHeld<T>, true>(plan, pattern, of, finish, x, y, stream);
}

Split split_of(const Plan& plan, int rows) {
  const int64_t groups = groups_of(plan.rows, rows), tiles = plan.tiles(), wanted = groups_of(kBlocks, groups);
  Split split{};
  split.all_tiles = tiles;
  split.tiles = groups_of(tiles, std::min(tiles, wanted));
  split.splits = groups_of(tiles, split.tiles);
  const int64_t chunks = groups_of(plan.units, plan.chunk), ranges = groups_of(wanted, split.splits);
  const int64_t units = groups_of(chunks, std::min(chunks, ranges)) * plan.chunk;
  split.units = static_cast<int>(std::min<int64_t>(units, plan.units));
  split.ranges = static_cast<int>(groups_of(plan.units, split.units));
  return split;
}

// The plan of a gradient of the values, and its split.
template <class T>
std::pair<Plan, Split> sampling(const Convolution& c, const Pattern& pattern, bool direct) {
  Plan plan = plan_of(c, pattern, false);
  lay_out<T>(plan, direct ? 32 : 32 * kHeld<T>);
  if (direct) plan.units = plan.chunk = 1;
  return {plan, split_of(plan, (direct ? 1 : kSampledRows) * kSparseWarps)};
}

// Whether partial sums are stored in scratch memory, instead of writing the gradient directly.
template <class T>
bool has_parts(const Split& split) {
  return split.splits > 1 || !std::is_same_v<T, Sum<T>>;
}

bool is_empty(const Convolution& c, const Pattern& pattern, int64_t free_count) {
  return free_count == 0 || pattern.entries == 0 || c.batch == 0;
}

template <class T, int kRows, int kVectors, bool kStaged>
cudaError_t launch_sample(const Plan& plan, const Split& split, const Pattern& pattern, int64_t free_count, const T* x,
                          const T* grad, Sum<T>* sums, cudaStream_t stream) {
  const int64_t blocks = split.splits * split.ranges * groups_of(plan.rows, kRows * kSparseWarps);
  if (!fits_a_grid(blocks)) return cudaErrorInvalidValue;
  const auto kernel = sample<T, kRows, kVectors, kStaged>;
  const size_t shared = shared_bytes<int>(plan, kRows, split.units, kStaged);
  if (const cudaError_t error = allow_shared<int>(kernel, kRows, shared); error != cudaSuccess) return error;
  return EXSSNET_LAUNCH(kernel, static_cast<unsigned>(blocks), kSparseThreads, shared, stream, plan, pattern, split,
                        FreeSlot{free_count}, x, grad, sums);
}

template <class T>
cudaError_t value_gradient(const Convolution& c, const Pattern& pattern, int64_t free_count, const T* x, const T* grad,
                           T* grad_values, Sum<T>* parts, cudaStream_t stream) {
  const bool direct = is_direct(c, plan_of(c, pattern, false), x);
  auto [plan, split] = sampling<T>(c, pattern, direct);
  plan.charted = !direct && can_chart(plan, x);
  if constexpr (std::is_same_v<T, Sum<T>>)
    if (!has_parts<T>(split)) parts = grad_values;
  const cudaError_t error =
      direct ? launch_sample<T, 1, 1, false>(plan, split, pattern, free_count, x, grad, parts, stream)
             : launch_sample<T, kSampledRows, kHeld<T>, true>(plan, split, pattern, free_count, x, grad, parts, stream);
  if (error != cudaSuccess || !has_parts<T>(split)) return error;
  const auto blocks = static_cast<unsigned>(std::min<int64_t>(groups_of(free_count, kSparseThreads), 1 << 12));
  return EXSSNET_LAUNCH(add_splits<T>, blocks, kSparseThreads, 0, stream, parts, split.splits, free_count, grad_values);
}

}  // namespace

cudaError_t sparse_forward(const Convolution& c, const Pattern& pattern, const SparseValues& values,
                           const SparseEpilogue& epilogue, Float dtype, const void* x, void* y, int processors,
                           cudaStream_t stream) {
  return with_cuda_type(dtype, [&]<class T>(T*) {
    return product(c, pattern, false, values, epilogue, static_cast<const T*>(x), static_cast<T*>(y), processors,
                   stream);
  });
}

cudaError_t sparse_input_gradient(const Convolution& c, const Pattern& transposed, const SparseValues& values,
                                  Float dtype, const void* grad, void* grad_x, int processors, cudaStream_t stream) {
  return with_cuda_type(dtype, [&]<class T>(T*) {
    return product(c, transposed, true, values, {}, static_cast<const T*>(grad), static_cast<T*>(grad_x), processors,
                   stream);
  });
}

size_t sparse_workspace_bytes(const Convolution& c, const Pattern& pattern, int64_t free_count, Float dtype) {
  if (is_empty(c, pattern, free_count)) return 0;
  return with_cuda_type(dtype, [&]<class T>(T*) {
    size_t most = 0;
    for (const bool direct : {false, true}) {
      if (direct && !is_one_pixel(c)) continue;
      const Split split = sampling<T>(c, pattern, direct).second;
      if (has_parts<T>(split)) most = std::max(most, sizeof(Sum<T>) * static_cast<size_t>(split.splits * free_count));
    }
    return most;
  });
}

cudaError_t sparse_value_gradient(const Convolution& c, const Pattern& pattern, int64_t free_count, Float dtype,
                                  const void* x, const void* grad, void* grad_values, void* workspace,
                                  cudaStream_t stream) {
  return with_cuda_type(dtype, [&]<class T>(T*) {
    if (is_empty(c, pattern, free_count)) return cudaMemsetAsync(grad_values, 0, sizeof(T) * free_count, stream);
    return value_gradient(c, pattern, free_count, static_cast<const T*>(x), static_cast<const T*>(grad),
                          static_cast<T*>(grad_values), static_cast<Sum<T>*>(workspace), stream);
  });
}

}  // namespace exssnet::cuda
