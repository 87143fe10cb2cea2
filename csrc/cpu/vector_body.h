// The vector type of an instruction set, for the bodies of cpu/each_isa.h.

template <class T>
struct Vector {
  typedef T type __attribute__((vector_size(kVectorBytes), aligned(alignof(T)), may_alias));
  static constexpr int lanes = kVectorBytes / sizeof(T);

  static type load(const T* from) { return *reinterpret_cast<const type*>(from); }
  static void store(type v, T* to) { *reinterpret_cast<type*>(to) = v; }

  // See cpu/streaming.h. `to` must be aligned to the size of a register.
  static void stream(type v, T* to) {
#if EXSSNET_X86
    if constexpr (kVectorBytes == 16) asm("movntps %1, %0" : "=m"(*reinterpret_cast<type*>(to)) : "x"(v));
    else asm("vmovntps %1, %0" : "=m"(*reinterpret_cast<type*>(to)) : "v"(v));
#else
    store(v, to);
#endif
  }
};
