// The part of rank one that label smoothing adds to gradients, emulated, against double precision:
// weighted_row_sum, outer_product.
#include <cstring>
#include <random>

#include "cuda/generic_kernels.h"
#include "kernels/arrays.h"

using namespace memeff;
using namespace memeff::cuda;
using emulator::Array;
using emulator::BufferAccess;
using emulator::compare;
using emulator::unit_roundoff;

namespace {

struct Shape {
  int64_t rows, columns, padding, offset;
};

// 64 columns and 128 rows belong to a thread block at a time, 8 columns to a thread.
constexpr Shape kShapes[] = {{1, 1, 0, 0}, {130, 64, 8, 0}, {300, 70, 2, 3}, {5, 131, 1, 1}};

void test_weighted_row_sum(const Shape& s, DType dtype, bool weighted) {
  std::mt19937 random{11};
  std::normal_distribution<double> normal;
  const int64_t stride = s.columns + s.padding;
  Array matrix(dtype, s.rows * stride, "matrix", BufferAccess::kReadOnly, s.offset);
  Array factors(DType::kFloat32, s.rows, "factors", BufferAccess::kReadOnly);
  Array sums(DType::kFloat32, s.columns, "sums");
  std::vector<double> expected(s.columns), magnitude(s.columns);
  for (int64_t row = 0; row < s.rows; ++row) {
    factors.set(row, normal(random));
    const double factor = weighted ? factors.at(row) : 1.0;
    for (int64_t d = 0; d < s.columns; ++d) {
      matrix.set(row * stride + d, normal(random));
      expected[d] += factor * matrix.at(row * stride + d);
      magnitude[d] += std::abs(factor * matrix.at(row * stride + d));
    }
  }
  const auto* given = weighted ? static_cast<const float*>(factors.data()) : nullptr;
  CHECK(weighted_row_sum({matrix.data(), stride, dtype, s.rows, s.columns, given,
                          static_cast<float*>(sums.data())},
                         nullptr)
            .ok());
  // A thread adds every 128th row, one thread all of these sums.
  const double additions = std::sqrt(static_cast<double>(s.rows)) + 12;
  for (int64_t d = 0; d < s.columns; ++d)
    compare(sums.at(d), expected[d], additions * unit_roundoff(DType::kFloat32) * magnitude[d],
            "weighted row sum", dtype);
}

void test_outer_product(const Shape& s, bool weighted, bool accumulate) {
  std::mt19937 random{13};
  std::normal_distribution<double> normal;
  const DType dtype = DType::kFloat32;
  const int64_t stride = s.columns + s.padding;
  Array factors(dtype, s.rows, "factors", BufferAccess::kReadOnly);
  Array values(dtype, s.columns, "values", BufferAccess::kReadOnly);
  Array out(dtype, s.rows * stride, "out");
  std::vector<double> before(s.rows * s.columns);
  for (int64_t row = 0; row < s.rows; ++row) factors.set(row, normal(random));
  for (int64_t d = 0; d < s.columns; ++d) values.set(d, normal(random));
  for (int64_t row = 0; accumulate && row < s.rows; ++row)
    for (int64_t d = 0; d < s.columns; ++d) {
      out.set(row * stride + d, normal(random));
      before[row * s.columns + d] = out.at(row * stride + d);
    }
  const auto* given = weighted ? static_cast<const float*>(factors.data()) : nullptr;
  CHECK(outer_product({given, static_cast<const float*>(values.data()),
                       static_cast<float*>(out.data()), stride, s.rows, s.columns, accumulate},
                      nullptr)
            .ok());
  for (int64_t row = 0; row < s.rows; ++row) {
    for (int64_t d = 0; d < s.columns; ++d) {
      const double product = (weighted ? factors.at(row) : 1.0) * values.at(d);
      const double expected = before[row * s.columns + d] + product;
      compare(out.at(row * stride + d), expected,
              2 * unit_roundoff(dtype) * (std::abs(expected) + std::abs(product)), "outer product",
              dtype);
    }
    for (int64_t d = s.columns; d < stride; ++d) CHECK(out.untouched(row * stride + d));
  }
}

void test_statuses() {
  WeightedRowSum sum;
  sum.dtype = DType::kFloat32, sum.rows = sum.columns = 1;
  const Status wide = weighted_row_sum(sum, nullptr);
  CHECK(!wide.ok() && std::strstr(wide.message, "16 bits") != nullptr);
  sum.dtype = DType::kBFloat16, sum.columns = 0;
  CHECK(weighted_row_sum(sum, nullptr).ok());
  OuterProduct product;
  product.columns = 1;
  CHECK(outer_product(product, nullptr).ok());
}

}  // namespace

int main() {
  emulator::config().printed_reports = 0;
  emulator::expect_clean("rank one", [] {
    for (const Shape& shape : kShapes)
      for (const bool weighted : {false, true}) {
        test_weighted_row_sum(shape, DType::kBFloat16, weighted);
        test_weighted_row_sum(shape, DType::kFloat16, weighted);
        for (const bool accumulate : {false, true}) test_outer_product(shape, weighted, accumulate);
      }
  });
  test_statuses();
  std::printf("largest error: %.2f of the tolerance\n", emulator::worst_error);
  return emulator::finish("test_generic_rank_one_kernels");
}
