// A pattern in the order in which the loops of cpu/sparse.cpp read it.
#pragma once

#include <algorithm>
#include <memory>
#include <vector>

#include "cpu/parallel.h"
#include "cpu/sparse.h"

namespace exssnet::cpu {

// The entries of a row are cut into blocks of about the same columns in every row.
template <class T>
struct Walk {
  int64_t rows = 0, blocks = 1;
  std::vector<int64_t> start;         // (rows, blocks + 1): where the blocks of a row begin and end
  std::unique_ptr<int64_t[]> offset;  // of each entry in the packed image
  std::unique_ptr<T[]> value;         // of each entry; its gradient, where only free entries are walked
  std::unique_ptr<int32_t[]> slot;    // of each entry, where only free entries are walked
};

// What the rows of a walk consist of: row r takes, for each tap of phases[r % P] (P = phases.size()), the pattern's row
// r / P * taps + tap.row. An entry is read at place[its index] + tap.shift.
struct Plan {
  struct Tap {
    int64_t row, shift;
  };
  int64_t rows, taps;
  std::vector<std::vector<Tap>> phases;
  std::vector<int64_t> place;
};

// Row o is the pattern's row o; column (channel, r, s) has its place in the packed input.
inline Plan plan_rows(const Convolution& c) {
  const PackedImage x = packed_input(c);
  Plan plan{c.out_channels, 1, {{{0, 0}}}, std::vector<int64_t>(c.in_channels * c.h.taps * c.w.taps)};
  for (int64_t r = 0, tap = 0; r < c.h.taps; ++r)
    for (int64_t s = 0; s < c.w.taps; ++s, ++tap) {
      const int64_t within = (c.h.phase(r) * x.w.phases + c.w.phase(s)) * x.plane() + c.h.shift(r) * x.line() +
                             c.w.shift(s) * c.batch;
      for (int64_t channel = 0; channel < c.in_channels; ++channel)
        plan.place[channel * c.h.taps * c.w.taps + tap] = channel * x.channel() + within;
    }
  return plan;
}

// Row (channel, phase of h, phase of w) takes the columns of the taps that hit the phase.
inline Plan plan_columns(const Convolution& c) {
  const PackedImage grad = packed_output_gradient(c);
  const int64_t across = c.w.phases(), phases = c.h.phases() * across;
  Plan plan{c.in_channels * phases, c.h.taps * c.w.taps, std::vector<std::vector<Plan::Tap>>(phases), {}};
  for (int64_t r = 0; r < c.h.taps; ++r)
    for (int64_t s = 0; s < c.w.taps; ++s)
      plan.phases[c.h.phase(r) * across + c.w.phase(s)].push_back(
          {r * c.w.taps + s, (c.h.reach() - c.h.shift(r)) * grad.line() + (c.w.reach() - c.w.shift(s)) * c.batch});
  for (int64_t o = 0; o < c.out_channels; ++o) plan.place.push_back(o * grad.channel());
  return plan;
}

// With only_free, the entries of frozen values are left out, and values are zero.
template <bool only_free, class T>
Walk<T> make_walk(const Plan& plan, const Pattern& pattern, const Values<T>& values) {
  // Of a row: with fewer, adding up blocks costs more than a nearer cache gains; with more, rounding errors grow.
  constexpr int64_t kEntriesPerBlock = 16;
  constexpr int64_t kGrain = 1 << 14;                // entries that are worth a thread
  constexpr int64_t unit = only_free ? 64 / sizeof(T) : 1;  // entries whose gradients are summed together
  Walk<T> walk;
  walk.rows = plan.rows;
  walk.blocks = pattern.entries / std::max<int64_t>(1, plan.rows * kEntriesPerBlock) + 1;
  walk.start.resize(plan.rows * (walk.blocks + 1));
  walk.offset.reset(new int64_t[pattern.entries]);
  walk.value.reset(new T[pattern.entries]);
  if (only_free) walk.slot.reset(new int32_t[pattern.entries]);

  const int64_t phases = plan.phases.size();
  // Calls visit(row of the pattern, shift) for what row r consists of.
  const auto for_each_tap = [&](int64_t r, const auto& visit) {
    for (const Plan::Tap& tap : plan.phases[r % phases]) visit(r / phases * plan.taps + tap.row, tap.shift);
  };
  int64_t entries = 0;
  for (int64_t r = 0; r < plan.rows; ++r) {
    walk.start[r * (walk.blocks + 1)] = entries;
    for_each_tap(r, [&](int64_t row, int64_t) { entries += pattern.ptr[row + 1] - pattern.ptr[row]; });
  }
  std::vector<int32_t> block_of(pattern.columns);
  for (int64_t i = 0; i < pattern.columns; ++i) block_of[i] = static_cast<int32_t>(i * walk.blocks / pattern.columns);

  parallel_for(plan.rows, kGrain * plan.rows / std::max<int64_t>(1, pattern.entries) + 1, [&](int64_t begin, int64_t end) {
    std::vector<int64_t> next(walk.blocks);  // place of the next entry of each block
    for (int64_t r = begin; r < end; ++r) {
      const auto for_each_entry = [&](const auto& visit) {
        for_each_tap(r, [&](int64_t row, int64_t shift) {
          for (int64_t k = pattern.ptr[row], last = pattern.ptr[row + 1]; k < last; ++k)
            if (!only_free || pattern.slot[k] < values.free_count) visit(pattern.index[k], pattern.slot[k], shift);
        });
      };
      const auto put = [&](int64_t at, int32_t index, int32_t slot, int64_t shift) {
        walk.offset[at] = plan.place[index] + shift;
        if constexpr (only_free) {
          walk.slot[at] = slot;
          walk.value[at] = 0;
        } else {
          walk.value[at] = *(slot < values.free_count ? values.free + slot : values.frozen + (slot - values.free_count));
        }
      };
      int64_t* start = &walk.start[r * (walk.blocks + 1)];
      if (plan.phases[r % phases].size() <= 1) {  // the columns ascend: cut evenly
        int64_t at = start[0];
        for_each_entry([&](int32_t index, int32_t slot, int64_t shift) { put(at++, index, slot, shift); });
        for (int64_t block = 1; block < walk.blocks; ++block)
          start[block] = start[0] + (at - start[0]) * block / walk.blocks / unit * unit;
        start[walk.blocks] = at;
      } else {  // sort by block
        for_each_entry([&](int32_t index, int32_t, int64_t) { ++start[block_of[index] + 1]; });
        for (int64_t block = 0; block < walk.blocks; ++block) start[block + 1] += next[block] = start[block];
        for_each_entry(
            [&](int32_t index, int32_t slot, int64_t shift) { put(next[block_of[index]]++, index, slot, shift); });
      }
    }
  });
  return walk;
}

}  // namespace exssnet::cpu
