// Shared by the bodies of the sparse products (see each_isa.h): the check of a row, and sums over the lanes of vectors.

// Whether the `count` indices of a row ascend, and its indices and slots are in range.
bool in_range(const int32_t* index, const int32_t* slot, int64_t count, int64_t columns, int64_t slots) {
  uint32_t bad = 0;  // unsigned, because differences of arbitrary values may overflow
  const uint32_t last_column = static_cast<uint32_t>(columns - 1), last_slot = static_cast<uint32_t>(slots - 1);
  for (int64_t k = 0; k < count; ++k) {
    const uint32_t i = static_cast<uint32_t>(index[k]), s = static_cast<uint32_t>(slot[k]);
    bad |= i | (last_column - i) | s | (last_slot - s);
  }
  if (bad >> 31 == 0)
    for (int64_t k = 1; k < count; ++k) bad |= static_cast<uint32_t>(index[k] - index[k - 1] - 1);
  return bad >> 31 == 0;
}

// Sums of neighbours, first those of a, then those of b. Neighbours are adjacent elements within each 16 bytes, or
// adjacent groups of 16 bytes. Both kinds of shuffles are cheap. V is a vector of the elements 0, ..., i.
template <bool in_lane, class V, int... i>
V add_pairs(V a, V b, std::integer_sequence<int, i...>) {
  constexpr int count = sizeof...(i), bytes = sizeof(V) / count;
  constexpr int size = in_lane ? 16 / bytes : count, unit = in_lane ? 1 : 16 / bytes;
  constexpr auto first_of = [](int to) {  // the first of the two lanes that are added
    const int place = to % size / unit, half = size / unit / 2;
    return to / size * size + place % half * 2 * unit + to % unit + (place < half ? 0 : count);
  };
#ifdef __clang__
  return __builtin_shufflevector(a, b, first_of(i)...) + __builtin_shufflevector(a, b, (first_of(i) + unit)...);
#else
  using Index = decltype(a < b);
  return __builtin_shuffle(a, b, Index{first_of(i)...}) + __builtin_shuffle(a, b, Index{(first_of(i) + unit)...});
#endif
}

// Sums over the lanes of vector(first), ..., vector(first + n - 1). If n is the number of lanes, each has one lane.
template <class T, int n = Vector<T>::lanes, class Make>
inline auto sum_each(const Make& vector, int first = 0) {
  if constexpr (n == 1) {
    return vector(first);
  } else {
    const auto a = sum_each<T, n / 2>(vector, first), b = sum_each<T, n / 2>(vector, first + n / 2);
    return add_pairs<n * sizeof(T) <= 16>(a, b, std::make_integer_sequence<int, sizeof(a) / sizeof(T)>());
  }
}
