// The inner loops of cpu/sparse.cpp, compiled once per instruction set (see dispatch.h), with kVectorBytes and kVectors,
// the accumulators that fit its registers, defined by the includer.

template <class T>
struct Vector {
  typedef T type __attribute__((vector_size(kVectorBytes), aligned(alignof(T))));
  static constexpr int lanes = kVectorBytes / sizeof(T);
};

// Calls piece.template operator()<vectors, partial>(at, count) on pieces that cover [at, at + count): as many whole
// vectors at a time as fit the registers, then the rest of less than a vector.
template <class T, int vectors = kVectors, class Piece>
void in_pieces(int64_t at, int64_t count, const Piece& piece) {
  constexpr int64_t size = vectors * Vector<T>::lanes;
  for (; count >= size; at += size, count -= size) piece.template operator()<vectors, false>(at, size);
  if constexpr (vectors > 1)
    in_pieces<T, vectors / 2>(at, count, piece);
  else if (count > 0)
    piece.template operator()<1, true>(at, count);
}

template <bool partial, class T>
typename Vector<T>::type load(const T* from, int64_t count) {
  typename Vector<T>::type v = {};
  std::memcpy(&v, from, partial ? count * sizeof(T) : sizeof v);
  return v;
}

template <class T>
T sum_lanes(const typename Vector<T>::type& v) {
  T lanes[Vector<T>::lanes];
  std::memcpy(lanes, &v, sizeof v);
  for (int half = Vector<T>::lanes / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  return lanes[0];
}

// Rows [begin, end) of the product, `count` elements from x and y on. The piece of x that a block of columns touches
// stays in the first-level cache while all rows pass over it; the sums of blocks are added up in y, which also keeps
// rounding errors small.
template <class T>
void multiply_rows(const Walk<T>& walk, int64_t begin, int64_t end, const T* x, const T* bias, T* y, int64_t y_plane,
                   int64_t count) {
  using V = typename Vector<T>::type;
  in_pieces<T>(0, count, [&]<int vectors, bool partial>(int64_t at, int64_t size) {
    constexpr int lanes = Vector<T>::lanes;
    for (int64_t block = 0; block < walk.blocks; ++block)
      for (int64_t row = begin; row < end; ++row) {
        const int64_t first = walk.start[row * (walk.blocks + 1) + block];
        const int64_t last = walk.start[row * (walk.blocks + 1) + block + 1];
        if (block > 0 && first == last) continue;
        T* to = y + row * y_plane + at;
        V sum[vectors] = {};
        for (int64_t k = first; k < last; ++k) {
          const T* from = x + walk.offset[k] + at;
#pragma GCC unroll 16
          for (int i = 0; i < vectors; ++i) sum[i] += walk.value[k] * load<false>(from + i * lanes, 0);
        }
#pragma GCC unroll 16
        for (int i = 0; i < vectors; ++i)
          sum[i] += block > 0 ? load<partial>(to + i * lanes, size) : V{} + (bias ? bias[row] : T(0));
        std::memcpy(to, sum, partial ? size * sizeof(T) : sizeof sum);
      }
  });
}

// Adds to the gradients of the free values in rows [begin, end) what `count` elements from x and grad on contribute.
template <class T>
void sample_rows(const Walk<T>& walk, int64_t begin, int64_t end, const T* x, const T* grad, int64_t grad_plane,
                 int64_t count, T* grad_values) {
  using V = typename Vector<T>::type;
  in_pieces<T>(0, count, [&]<int vectors, bool partial>(int64_t at, int64_t size) {
    constexpr int lanes = Vector<T>::lanes, chains = vectors < 4 ? vectors : 4;
    V lane;
#pragma GCC unroll 16
    for (int i = 0; i < lanes; ++i) lane[i] = T(i);
    const auto inside = lane < V{} + T(size);  // of a partial vector; x may hold anything outside
    for (int64_t block = 0; block < walk.blocks; ++block)
      for (int64_t row = begin; row < end; ++row) {
        V g[vectors];
#pragma GCC unroll 16
        for (int i = 0; i < vectors; ++i) g[i] = load<partial>(grad + row * grad_plane + at + i * lanes, size);
        for (int64_t k = walk.start[row * (walk.blocks + 1) + block];
             k < walk.start[row * (walk.blocks + 1) + block + 1]; ++k) {
          const T* from = x + walk.offset[k] + at;
          V sum[chains] = {};
#pragma GCC unroll 16
          for (int i = 0; i < vectors; ++i) {
            const V v = load<false>(from + i * lanes, 0);
            sum[i % chains] += g[i] * (partial ? (inside ? v : V{}) : v);
          }
#pragma GCC unroll 16
          for (int i = 1; i < chains; ++i) sum[0] += sum[i];
          grad_values[walk.slot[k]] += sum_lanes<T>(sum[0]);
        }
      }
  });
}
