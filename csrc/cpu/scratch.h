// Memory that a thread keeps between calls, because new memory costs a page fault every 4 KB.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace exssnet::cpu {

// Room for `count` elements in a buffer, aligned to 64 bytes. A buffer that is too small is replaced by a new one.
template <class T>
T* room_in(std::vector<std::byte>& buffer, int64_t count) {
  const size_t size = count * sizeof(T) + 64;
  if (buffer.size() < size) buffer = std::vector<std::byte>(size);
  return reinterpret_cast<T*>((reinterpret_cast<uintptr_t>(buffer.data()) + 63) / 64 * 64);
}

}  // namespace exssnet::cpu
