// knn_classify, for the kernels of csrc/cpu/knn. ATen computes the products.
#include "cpu/knn.h"

#include "torch/checks.h"

namespace exssnet {
namespace {

constexpr int64_t kBlock = 1 << 22;  // products per block; a block has at least 16 queries

template <class T>
void classify(const Tensor& features, const Tensor& labels, Tensor queries, int64_t k, int64_t classes, Tensor& out) {
  const int64_t n = features.size(0), m = queries.size(0), rows = std::clamp<int64_t>(kBlock / n, 16, 1024);
  const Tensor squares = torch::stable::new_empty(features, {n});
  cpu::row_squares(features.const_data_ptr<T>(), n, features.size(1), squares.mutable_data_ptr<T>());
  const Tensor columns = torch::stable::transpose(features, 0, 1);
  for (int64_t begin = 0; begin < m; begin += rows) {
    const int64_t size = std::min(rows, m - begin);
    const Tensor products = row_major(aten("aten::mm", "", torch::stable::narrow(queries, 0, begin, size), columns));
    cpu::vote(products.const_data_ptr<T>(), size, squares.const_data_ptr<T>(), labels.const_data_ptr<int64_t>(), n, k,
              classes, out.mutable_data_ptr<int64_t>() + begin);
  }
}

Tensor knn_classify(const Tensor& features, const Tensor& labels, const Tensor& queries, int64_t k, int64_t classes) {
  constexpr auto kWho = "knn_classify";
  check(features.dim() == 2 && queries.dim() == 2 && features.size(1) == queries.size(1) && features.is_cpu() &&
            queries.is_cpu(),
        kWho, "CPU features (n, d) and queries (m, d)");
  const int64_t n = features.size(0);
  check(labels.dim() == 1 && labels.size(0) == n && labels.scalar_type() == ScalarType::Long && labels.is_cpu(), kWho,
        "an int64 label for each feature");
  check(1 <= k && k <= n, kWho, "k in [1, n]");
  const Tensor flat = row_major(labels);
  const int64_t* label = flat.const_data_ptr<int64_t>();
  check(std::all_of(label, label + n, [=](int64_t v) { return 0 <= v && v < classes; }), kWho,
        "labels in [0, classes)");
  Tensor out = torch::stable::new_empty(labels, {queries.size(0)});
  if (float_type(features, kWho) == Float::float64) {
    classify<double>(row_major(features), flat, queries, k, classes, out);
  } else {
    const auto full = [](const Tensor& t) { return torch::stable::to(t, ScalarType::Float); };
    classify<float>(row_major(full(features)), flat, full(queries), k, classes, out);
  }
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(exssnet, CPU, m) { m.impl("knn_classify", TORCH_BOX(&knn_classify)); }

}  // namespace exssnet
