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

// Sums of neighbouring lanes, those of a before those of b.
template <class T, int... i>
typename Vector<T>::type add_pairs(const typename Vector<T>::type& a, const typename Vector<T>::type& b,
                                   std::integer_sequence<int, i...>) {
#ifdef __clang__
  return __builtin_shufflevector(a, b, (2 * i)...) + __builtin_shufflevector(a, b, (2 * i + 1)...);
#else
  using Index = decltype(a < b);
  return __builtin_shuffle(a, b, Index{(2 * i)...}) + __builtin_shuffle(a, b, Index{(2 * i + 1)...});
#endif
}

// The sums over the lanes of as many vectors as a vector has lanes.
template <class T>
typename Vector<T>::type sum_lanes(typename Vector<T>::type (&v)[Vector<T>::lanes]) {
  constexpr int lanes = Vector<T>::lanes;
#pragma GCC unroll 16
  for (int count = lanes; count > 1; count /= 2)
#pragma GCC unroll 16
    for (int i = 0; i < count / 2; ++i)
      v[i] = add_pairs<T>(v[2 * i], v[2 * i + 1], std::make_integer_sequence<int, lanes>());
  return v[0];
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

// Adds to the values of the entries in rows [begin, end) their inner products of x and grad over `count` elements.
template <class T>
void sample_rows(const Walk<T>& walk, int64_t begin, int64_t end, const T* x, const T* grad, int64_t grad_plane,
                 int64_t count) {
  using V = typename Vector<T>::type;
  in_pieces<T>(0, count, [&]<int vectors, bool partial>(int64_t at, int64_t size) {
    constexpr int lanes = Vector<T>::lanes;
    V lane;
    for (int i = 0; i < lanes; ++i) lane[i] = T(i);
    const auto inside = lane < V{} + T(size);  // of a partial vector; x may hold anything outside
    for (int64_t block = 0; block < walk.blocks; ++block)
      for (int64_t row = begin; row < end; ++row) {
        const int64_t first = walk.start[row * (walk.blocks + 1) + block];
        const int64_t last = walk.start[row * (walk.blocks + 1) + block + 1];
        if (first == last) continue;
        V g[vectors];
#pragma GCC unroll 16
        for (int i = 0; i < vectors; ++i) g[i] = load<partial>(grad + row * grad_plane + at + i * lanes, size);
        for (int64_t k = first; k < last; k += lanes) {  // as many entries at a time as a vector has lanes
          const int64_t entries = std::min<int64_t>(lanes, last - k);
          V product[lanes] = {};
          for (int64_t entry = 0; entry < entries; ++entry) {
            const T* from = x + walk.offset[k + entry] + at;
#pragma GCC unroll 16
            for (int i = 0; i < vectors; ++i) {
              const V v = load<false>(from + i * lanes, 0);
              product[entry] += g[i] * (partial ? (inside ? v : V{}) : v);
            }
          }
          const V sums = load<true>(&walk.value[k], entries) + sum_lanes<T>(product);
          std::memcpy(&walk.value[k], &sums, entries * sizeof(T));
        }
      }
  });
}
