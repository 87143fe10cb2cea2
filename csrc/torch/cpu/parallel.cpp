// csrc/cpu/parallel.h with torch's thread pool.
#include "cpu/parallel.h"

#include <torch/csrc/stable/ops.h>

namespace exssnet {

void run_parallel(int64_t count, int64_t grain, RangeFn fn, void* context) {
  torch::stable::parallel_for(0, count, grain, [=](int64_t begin, int64_t end) { fn(begin, end, context); });
}

int64_t max_threads() { return torch::stable::get_num_threads(); }

}  // namespace exssnet
