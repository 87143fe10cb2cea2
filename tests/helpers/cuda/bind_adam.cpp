// csrc/cuda/adam over NumPy arrays.
#include "cuda/adam.h"

#include <pybind11/stl.h>

#include "arrays.h"

using namespace exssnet;

namespace {

using Arrays = std::vector<py::array>;

// masks empty, and hint None, for none; hint and selection (layers, 2).
std::vector<cuda::AdamLayer> layers_of(const Arrays& scores, const Arrays& grads, const Arrays& exp_avgs,
                                       const Arrays& exp_avg_sqs, const Arrays& steps, const std::vector<int64_t>& k,
                                       const Arrays& masks, const std::optional<py::array>& hint,
                                       const py::array& selection, bool packed) {
  std::vector<cuda::AdamLayer> layers;
  for (size_t i = 0; i < scores.size(); ++i) {
    const TopkLayer topk{data<float>(scores[i]), Float::float32, scores[i].size(), k[i],
                               masks.empty() ? nullptr : data<uint8_t>(masks[i]),
                               hint ? data<int64_t>(*hint) + 2 * i : nullptr, data<int64_t>(selection) + 2 * i,
                               packed};
    layers.push_back({topk, data<float>(grads[i]), data<float>(exp_avgs[i]), data<float>(exp_avg_sqs[i]),
                      data<float>(steps[i])});
  }
  return layers;
}

}  // namespace

PYBIND11_MODULE(adam_emulated, m) {
  m.def("workspace_bytes", [](const Arrays& scores) {
    std::vector<cuda::AdamLayer> layers;
    for (const py::array& s : scores)
      layers.push_back({{nullptr, Float::float32, s.size(), 0, nullptr, nullptr, nullptr},
                        nullptr, nullptr, nullptr, nullptr});
    return cuda::adam_topk_workspace_bytes(layers);
  });
  // Returns the number of launches.
  m.def("adam_topk", [](const Arrays& scores, const Arrays& grads, const Arrays& exp_avgs, const Arrays& exp_avg_sqs,
                        const Arrays& steps, const std::vector<int64_t>& k, const Arrays& masks,
                        const std::optional<py::array>& hint, const py::array& selection, double lr, double beta1,
                        double beta2, double eps, double weight_decay, bool maximize, const py::array& nan_flag,
                        const py::array& workspace, int processors, bool packed) {
    const int64_t before = emulator::launches;
    check(cuda::adam_topk(
        layers_of(scores, grads, exp_avgs, exp_avg_sqs, steps, k, masks, hint, selection, packed),
        {lr, beta1, beta2, eps, weight_decay, maximize}, data<int32_t>(nan_flag), data<uint8_t>(workspace), processors,
        nullptr));
    return emulator::launches - before;
  });
}
