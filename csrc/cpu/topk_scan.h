// Body of the pass over the scores (see dispatch.h). It is compiled per instruction set and includes nothing.

// Writes mask[i] = magnitude > hi. Counts the magnitudes above and inside [lo, hi]. Writes the positions of those
// inside to `found`, unless it is null; up to 3 more entries may be written there. n is at most 2^16. Comparisons of 64
// entries give bytes of 0 and 1, which compilers turn into vector instructions. Most of these blocks have no entry
// inside.
template <class B>
static ScanCounts scan(const B* __restrict scores, int64_t n, B lo, B hi, uint8_t* __restrict mask,
                       uint16_t* __restrict found) {
  constexpr B kMagnitude = std::numeric_limits<B>::max();
  constexpr uint64_t kOnes = 0x0101010101010101ull, kGather = 0x0102040810204080ull;
  uint8_t scratch[64], inside[64];
  ScanCounts counts{0, 0, 0};
  B largest = 0;
  int64_t i = 0;
  for (; i + 64 <= n; i += 64) {
    uint8_t* __restrict above = mask ? mask + i : scratch;
    for (int j = 0; j < 64; ++j) {
      const B b = scores[i + j] & kMagnitude;
      above[j] = b > hi;
      inside[j] = (b >= lo) & (b <= hi);
      largest = b > largest ? b : largest;
    }
    uint64_t above_sum = 0, inside_sum = 0, eight[8];  // no byte of the sums exceeds 8
    for (int w = 0; w < 8; ++w) {
      std::memcpy(&eight[w], above + 8 * w, 8);
      above_sum += eight[w];
    }
    for (int w = 0; w < 8; ++w) {
      std::memcpy(&eight[w], inside + 8 * w, 8);
      inside_sum += eight[w];
    }
    counts.above += (above_sum * kOnes) >> 56;
    if (inside_sum == 0) continue;
    if (found != nullptr) {
      uint64_t bits = 0;
      for (int w = 0; w < 8; ++w) bits |= (eight[w] * kGather >> 56) << (8 * w);
      uint16_t* next = found + counts.inside;
      do {  // always four at a time: a loop of exact length would have more mispredicted branches
        for (int j = 0; j < 4; ++j, bits &= bits - 1) *next++ = static_cast<uint16_t>(i + std::countr_zero(bits));
      } while (bits != 0);
    }
    counts.inside += (inside_sum * kOnes) >> 56;
  }
  for (; i < n; ++i) {
    const B b = scores[i] & kMagnitude;
    if (mask) mask[i] = b > hi;
    counts.above += b > hi;
    if (b >= lo && b <= hi) {
      if (found != nullptr) found[counts.inside] = static_cast<uint16_t>(i);
      ++counts.inside;
    }
    largest = b > largest ? b : largest;
  }
  counts.largest = largest;
  return counts;
}
