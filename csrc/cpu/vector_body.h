// The vector types of an instruction set, for the bodies of cpu/each_isa.h. bfloat16 in memory is float in registers.

typedef uint32_t Words __attribute__((vector_size(kVectorBytes), aligned(2), may_alias));
typedef uint16_t Halves __attribute__((vector_size(kVectorBytes / 2), aligned(2), may_alias));

template <class T>
struct Vector {
  typedef T type __attribute__((vector_size(kVectorBytes), aligned(alignof(T)), may_alias));
  static constexpr int lanes = kVectorBytes / sizeof(T);

  static type load(const T* from) { return *reinterpret_cast<const type*>(from); }
  static void store(type v, T* to) { *reinterpret_cast<type*>(to) = v; }

  // See cpu/streaming.h. `to` must be aligned to the size of what is stored.
  static void stream(type v, T* to) { store_past_caches(v, to); }
  static void stream(type v, BFloat16* to) { store_past_caches(halves(v), to); }

  static type load(const BFloat16* from) {
    const Halves halves = *reinterpret_cast<const Halves*>(from);
    Words words;
#if EXSSNET_X86  // GCC would extend 16 bytes at a time
    if constexpr (kVectorBytes > 16) asm("vpmovzxwd %1, %0" : "=v"(words) : "v"(halves));
    else
#endif
      words = __builtin_convertvector(halves, Words);
    return (type)(words << 16);
  }

  // The bits of v with the upper 16 rounded to nearest, ties to even. NaN stays NaN.
  static Words rounded(type v) {
    const Words bits = (Words)v;
    return v != v ? bits | 0x400000u : bits + 0x7fffu + (bits >> 16 & 1u);
  }

  static Halves halves(type v) {
    const Words words = rounded(v) >> 16;
    Halves halves;
#if EXSSNET_X86
    if constexpr (kVectorBytes == 64) asm("vpmovdw %1, %0" : "=v"(halves) : "v"(words));
    else
#endif
      halves = __builtin_convertvector(words, Halves);
    return halves;
  }
  static void store(type v, BFloat16* to) { *reinterpret_cast<Halves*>(to) = halves(v); }

  // The first `count` lanes. The others are zeros.
  template <class S>
  static type load_part(const S* from, int64_t count) {
    S part[lanes] = {};
    std::memcpy(part, from, count * sizeof(S));
    return load(part);
  }
  template <class S>
  static void store_part(type v, S* to, int64_t count) {
    S part[lanes];
    store(v, part);
    std::memcpy(to, part, count * sizeof(S));
  }

  // Vector b of `count` adjacent vectors, in an order of lanes that needs no shuffle: of two vectors of bfloat16, the
  // first takes the even elements, and the second the odd ones. store_all undoes that.
  template <int count, class S>
  static type load_of(const S* from, int b) {
    if constexpr (std::is_same_v<S, T> || count == 1) {
      return load(from + b * lanes);
    } else {
      const Words pairs = *reinterpret_cast<const Words*>(from + b / 2 * 2 * lanes);
      return (type)(b % 2 ? pairs & 0xffff0000u : pairs << 16);
    }
  }
  template <int count, class S>
  static void store_all(const type (&v)[count], S* to) {
#pragma GCC unroll 8
    for (int b = 0; b < count; ++b) {
      if constexpr (std::is_same_v<S, T> || count == 1) store(v[b], to + b * lanes);
      else if (b % 2)
        *reinterpret_cast<Words*>(to + (b - 1) * lanes) = rounded(v[b - 1]) >> 16 | (rounded(v[b]) & 0xffff0000u);
    }
  }

 private:
  template <class V>
  static void store_past_caches(const V& v, void* to) {
#if EXSSNET_X86
    if constexpr (kVectorBytes > 16) asm("vmovntps %1, %0" : "=m"(*static_cast<V*>(to)) : "v"(v));
    else if constexpr (sizeof v == 16) asm("movntps %1, %0" : "=m"(*static_cast<V*>(to)) : "x"(v));
    else
#endif
      std::memcpy(to, &v, sizeof v);
  }
};

// A line of `width` elements: vectors that are as long as it, or as the registers.
template <class T, int width>
struct Line {
  static constexpr int lanes = width < Vector<T>::lanes ? width : Vector<T>::lanes, vectors = width / lanes;
  typedef T V __attribute__((vector_size(lanes * sizeof(T)), aligned(alignof(T)), may_alias));

  static V load(const T* from) { return *reinterpret_cast<const V*>(from); }
  static void store(V v, T* to) { *reinterpret_cast<V*>(to) = v; }
};
template <class T>
struct Line<T, 1> {
  static constexpr int lanes = 1, vectors = 1;
  using V = T;

  static T load(const T* from) { return *from; }
  static void store(T v, T* to) { *to = v; }
};
