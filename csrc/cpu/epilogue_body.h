// Body of the epilogue's loops over one block (see dispatch.h). It is compiled per instruction set and includes
// nothing. Results are written to separate memory, so that compilers can use vectors even if the kernel works in place.

// kept[i] = 1 where the magnitude is at least the threshold.
template <class B>
static void at_least(const B* __restrict scores, int64_t n, B threshold, uint8_t* __restrict kept) {
  for (int64_t i = 0; i < n; ++i) {
    const B magnitude = scores[i] & std::numeric_limits<B>::max();
    kept[i] = magnitude >= threshold;
  }
}

// to[i] = from[i] where kept[i] is 1, 0 where it is 0.
template <class U>
static void where(const U* __restrict from, const uint8_t* __restrict kept, int64_t n, U* __restrict to) {
  for (int64_t i = 0; i < n; ++i) to[i] = kept[i] ? from[i] : U{0};
}
