// Body of the transposition between layouts. It is compiled per instruction set (see dispatch.h), includes nothing.

// Interleaves the lanes of a and b: those of the lower halves (from = 0) or of the upper halves.
template <int from, class V, int... i>
static V by_turns(V a, V b, std::integer_sequence<int, i...>) {
  constexpr int count = sizeof...(i), first = from * count / 2;
#ifdef __clang__
  return __builtin_shufflevector(a, b, (first + i / 2 + i % 2 * count)...);
#else
  return __builtin_shuffle(a, b, decltype(a < b){(first + i / 2 + i % 2 * count)...});
#endif
}

// to[j][i] = from[i][j] for a square with one row per lane of a vector. The distances are between rows.
template <class T, class F>
static void transpose_square(const F* from, int64_t from_step, T* to, int64_t to_step) {
  using V = typename Vector<T>::type;
  constexpr int count = Vector<T>::lanes;
  constexpr auto lanes = std::make_integer_sequence<int, count>();
  V v[count], next[count];
#pragma GCC unroll 32
  for (int i = 0; i < count; ++i) v[i] = Vector<T>::load(from + i * from_step);
#pragma GCC unroll 5
  for (int step = 1; step < count; step *= 2) {
#pragma GCC unroll 32
    for (int i = 0; i < count / 2; ++i) {
      next[2 * i] = by_turns<0>(v[i], v[i + count / 2], lanes);
      next[2 * i + 1] = by_turns<1>(v[i], v[i + count / 2], lanes);
    }
#pragma GCC unroll 32
    for (int i = 0; i < count; ++i) v[i] = next[i];
  }
#pragma GCC unroll 32
  for (int i = 0; i < count; ++i) Vector<T>::store(v[i], to + i * to_step);
}

// to[j][i] = from[i][j] for i < rows, j < columns.
template <class T, class F = T>
void transpose(const F* from, int64_t from_step, int64_t rows, int64_t columns, T* to, int64_t to_step) {
  constexpr int64_t count = Vector<T>::lanes;
  for (int64_t i = 0; i < rows; i += count)
    for (int64_t j = 0; j < columns; j += count) {
      if (i + count <= rows && j + count <= columns) {
        transpose_square<T>(from + i * from_step + j, from_step, to + j * to_step + i, to_step);
        continue;
      }
      for (int64_t a = i; a < std::min(i + count, rows); ++a)
        for (int64_t b = j; b < std::min(j + count, columns); ++b) {
          const F entry = from[a * from_step + b];
          if constexpr (std::is_same_v<F, T>) to[b * to_step + a] = entry;
          else to[b * to_step + a] = value(entry);
        }
    }
}
