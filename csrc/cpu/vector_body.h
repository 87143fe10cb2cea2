// The vector of an instruction set, for every body of cpu/each_isa.h.

template <class T>
struct Vector {
  typedef T type __attribute__((vector_size(kVectorBytes), aligned(alignof(T)), may_alias));
  static constexpr int lanes = kVectorBytes / sizeof(T);

  static type load(const T* from) { return *reinterpret_cast<const type*>(from); }
  static void store(type v, T* to) { *reinterpret_cast<type*>(to) = v; }
};
