// Masks as bits: bit j of byte i is flat entry 8 i + j.
#pragma once

#include <cstdint>

namespace exssnet::cpu {

void pack_mask(const bool* mask, int64_t n, uint8_t* packed);
void unpack_mask(const uint8_t* packed, int64_t n, bool* mask);
void and_not(const uint8_t* mask, const uint8_t* used, int64_t bytes, uint8_t* free);

}  // namespace exssnet::cpu
