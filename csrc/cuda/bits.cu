#include "cuda/bits.h"

namespace exssnet::cuda {

namespace {

constexpr int kThreads = 256;
constexpr int64_t kMostBlocks = 1 << 12;  // several waves of the largest GPU; a grid-stride loop does the rest

// ---- Four entries of 0 or 1, as bytes of a word and as bits. A multiplication moves byte j, or bit j, to its place.

__device__ __forceinline__ uint32_t gather(uint32_t bytes) { return bytes * 0x10204080u >> 28; }
__device__ __forceinline__ uint32_t spread(uint32_t bits) { return (bits & 0xfu) * 0x00204081u & 0x01010101u; }

__device__ __forceinline__ int64_t first_of_thread() { return int64_t{blockIdx.x} * kThreads + threadIdx.x; }
__device__ __forceinline__ int64_t grid_stride() { return int64_t{gridDim.x} * kThreads; }

// vectors: number of aligned groups of 16 entries. The entries after them are processed one packed byte at a time.
__global__ void __launch_bounds__(kThreads)
    pack(const uint8_t* __restrict__ mask, int64_t n, int64_t vectors, uint8_t* __restrict__ packed) {
  for (int64_t i = first_of_thread(); i < vectors; i += grid_stride()) {
    const uint4 bytes = reinterpret_cast<const uint4*>(mask)[i];
    reinterpret_cast<uint16_t*>(packed)[i] = static_cast<uint16_t>(
        gather(bytes.x) | gather(bytes.y) << 4 | gather(bytes.z) << 8 | gather(bytes.w) << 12);
  }
  for (int64_t i = 2 * vectors + first_of_thread(); 8 * i < n; i += grid_stride()) {
    uint32_t bits = 0;
    for (int64_t j = 0; j < min(n - 8 * i, int64_t{8}); ++j) bits |= uint32_t{mask[8 * i + j]} << j;
    packed[i] = static_cast<uint8_t>(bits);
  }
}

__global__ void __launch_bounds__(kThreads)
    unpack(const uint8_t* __restrict__ packed, int64_t n, int64_t vectors, uint8_t* __restrict__ mask) {
  for (int64_t i = first_of_thread(); i < vectors; i += grid_stride()) {
    const uint32_t bits = reinterpret_cast<const uint16_t*>(packed)[i];
    reinterpret_cast<uint4*>(mask)[i] =
        make_uint4(spread(bits), spread(bits >> 4), spread(bits >> 8), spread(bits >> 12));
  }
  for (int64_t i = 16 * vectors + first_of_thread(); i < n; i += grid_stride()) mask[i] = packed[i / 8] >> i % 8 & 1;
}

__global__ void __launch_bounds__(kThreads)
    clear_used(const uint8_t* __restrict__ mask, const uint8_t* __restrict__ used, int64_t bytes, int64_t vectors,
               uint8_t* __restrict__ free) {
  for (int64_t i = first_of_thread(); i < vectors; i += grid_stride()) {
    const uint4 m = reinterpret_cast<const uint4*>(mask)[i], u = reinterpret_cast<const uint4*>(used)[i];
    reinterpret_cast<uint4*>(free)[i] = make_uint4(m.x & ~u.x, m.y & ~u.y, m.z & ~u.z, m.w & ~u.w);
  }
  for (int64_t i = 16 * vectors + first_of_thread(); i < bytes; i += grid_stride()) free[i] = mask[i] & ~used[i];
}

template <class... Pointers>
bool aligned(size_t bytes, Pointers... pointers) {
  return (reinterpret_cast<uintptr_t>(pointers) | ...) % bytes == 0;
}

// Number of blocks for the vectors, or for the rest, which is everything if nothing is aligned.
dim3 blocks_for(int64_t vectors, int64_t rest) {
  const int64_t threads = vectors > rest ? vectors : rest;
  const int64_t blocks = (threads + kThreads - 1) / kThreads;
  return dim3(static_cast<unsigned>(blocks < kMostBlocks ? blocks : kMostBlocks));
}

}  // namespace

cudaError_t pack_mask(const bool* mask, int64_t n, uint8_t* packed, cudaStream_t stream) {
  if (n == 0) return cudaSuccess;
  const int64_t vectors = aligned(16, mask) && aligned(2, packed) ? n / 16 : 0;
  return EXSSNET_LAUNCH(pack, blocks_for(vectors, (n + 7) / 8 - 2 * vectors), kThreads, 0, stream,
                        reinterpret_cast<const uint8_t*>(mask), n, vectors, packed);
}

cudaError_t unpack_mask(const uint8_t* packed, int64_t n, bool* mask, cudaStream_t stream) {
  if (n == 0) return cudaSuccess;
  const int64_t vectors = aligned(16, mask) && aligned(2, packed) ? n / 16 : 0;
  return EXSSNET_LAUNCH(unpack, blocks_for(vectors, n - 16 * vectors), kThreads, 0, stream, packed, n, vectors,
                        reinterpret_cast<uint8_t*>(mask));
}

cudaError_t and_not(const uint8_t* mask, const uint8_t* used, int64_t bytes, uint8_t* free, cudaStream_t stream) {
  if (bytes == 0) return cudaSuccess;
  const int64_t vectors = aligned(16, mask, used, free) ? bytes / 16 : 0;
  return EXSSNET_LAUNCH(clear_used, blocks_for(vectors, bytes - 16 * vectors), kThreads, 0, stream, mask, used, bytes,
                        vectors, free);
}

}  // namespace exssnet::cuda
