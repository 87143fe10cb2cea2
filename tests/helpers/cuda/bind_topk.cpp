// csrc/cuda/topk over NumPy arrays.
#include "cuda/topk.h"

#include <pybind11/stl.h>

#include "arrays.h"

using namespace exssnet;

namespace {

// The layers' scores as unsigned integers of their size, with the number of their Float; masks empty, and hint
// None, for none.
std::vector<TopkLayer> layers_of(const std::vector<py::array>& scores, const std::vector<int>& dtypes,
                                       const std::vector<int64_t>& k, const std::vector<py::array>& masks,
                                       const std::optional<py::array>& hint, const py::array& selection,
                                       bool packed) {
  std::vector<TopkLayer> layers;
  for (size_t i = 0; i < scores.size(); ++i)
    layers.push_back({scores[i].data(), static_cast<Float>(dtypes[i]), scores[i].size(), k[i],
                      masks.empty() ? nullptr : data<uint8_t>(masks[i]), hint ? data<int64_t>(*hint) + 2 * i : nullptr,
                      data<int64_t>(selection) + 2 * i, packed});
  return layers;
}

}  // namespace

PYBIND11_MODULE(topk_emulated, m) {
  m.def("workspace_bytes", [](const std::vector<py::array>& scores, const std::vector<int>& dtypes) {
    std::vector<TopkLayer> layers;
    for (size_t i = 0; i < scores.size(); ++i) {
      const auto dtype = static_cast<Float>(dtypes[i]);
      layers.push_back({nullptr, dtype, scores[i].size(), 0, nullptr, nullptr, nullptr});
    }
    return cuda::topk_workspace_bytes(layers);
  });
  // Returns the number of launches.
  m.def("topk_masks", [](const std::vector<py::array>& scores, const std::vector<int>& dtypes,
                         const std::vector<int64_t>& k, const std::vector<py::array>& masks,
                         const std::optional<py::array>& hint, const py::array& selection,
                         const py::array& nan_flag, const py::array& workspace, int processors, bool packed) {
    const int64_t before = emulator::launches;
    check(cuda::topk_masks(layers_of(scores, dtypes, k, masks, hint, selection, packed),
                           data<int32_t>(nan_flag), data<uint8_t>(workspace), processors, nullptr));
    return emulator::launches - before;
  });
}
