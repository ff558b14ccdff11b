// The generic kernels on rows so far apart that offsets pass 2^31 elements: each must compute, bit
// by bit, what it computes on adjacent rows.
#include <sys/mman.h>

#include <random>

#include "cuda/generic_kernels.h"
#include "kernels/arrays.h"

using namespace memeff;
using namespace memeff::cuda;
using emulator::Array;

namespace {

// Rows from the fifth on, which kernels reach in a second step, lie beyond 2^31 elements.
constexpr int64_t kRows = 6, kColumns = 5;
constexpr int64_t kFarStride = (int64_t{1} << 29) + 8;

// A matrix [kRows, kColumns] of 16-bit or float elements in reserved, not allocated, address space;
// only its rows exist for the emulator.
class FarRows {
 public:
  explicit FarRows(DType dtype) : row_bytes_(kFarStride * size_of(dtype)) {
    void* reserved = mmap(nullptr, kRows * row_bytes_, PROT_READ | PROT_WRITE,
                          MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (reserved == MAP_FAILED) {
      std::printf("cannot reserve %lld bytes of address space\n",
                  static_cast<long long>(kRows * row_bytes_));
      std::exit(EXIT_FAILURE);
    }
    data_ = static_cast<unsigned char*>(reserved);
    for (int64_t r = 0; r < kRows; ++r)
      emulator::register_buffer(row(r), kColumns * size_of(dtype), "far row",
                                emulator::BufferAccess::kReadWrite, 2);
    row_used_ = kColumns * size_of(dtype);
  }
  ~FarRows() {
    for (int64_t r = 0; r < kRows; ++r) emulator::unregister_buffer(row(r));
    munmap(data_, kRows * row_bytes_);
  }
  FarRows(const FarRows&) = delete;
  FarRows& operator=(const FarRows&) = delete;

  void* data() { return data_; }
  // From or to adjacent rows.
  void copy_from(const void* near) {
    for (int64_t r = 0; r < kRows; ++r)
      std::memcpy(row(r), static_cast<const unsigned char*>(near) + r * row_used_, row_used_);
  }
  bool equals(const void* near, int64_t bytes_per_row) {
    for (int64_t r = 0; r < kRows; ++r)
      if (std::memcmp(row(r), static_cast<const unsigned char*>(near) + r * row_used_,
                      bytes_per_row) != 0)
        return false;
    return true;
  }

 private:
  unsigned char* row(int64_t r) { return data_ + r * row_bytes_; }

  int64_t row_bytes_, row_used_ = 0;
  unsigned char* data_;
};

// Adjacent rows of random numbers.
struct NearRows : Array {
  NearRows(DType dtype, unsigned seed) : Array(dtype, kRows * kColumns, "near rows") {
    std::mt19937 random{seed};
    std::normal_distribution<double> normal;
    for (int64_t i = 0; i < kRows * kColumns; ++i) set(i, std::abs(normal(random)));
  }
};

const Block kBlock{0, kRows, kColumns};

struct Tokens : Array {
  explicit Tokens(double value) : Array(DType::kFloat32, kColumns, "tokens") {
    for (int64_t n = 0; n < kColumns; ++n) set(n, value);
  }
};

void test_statistics() {
  NearRows near(DType::kFloat32, 1), near_q(DType::kFloat32, 2);
  FarRows far(DType::kFloat32), far_q(DType::kFloat32);
  far.copy_from(near.data()), far_q.copy_from(near_q.data());
  Tokens max[2] = {Tokens(0), Tokens(0)}, sum[2] = {Tokens(0), Tokens(0)},
         dot[2] = {Tokens(0), Tokens(0)}, target_logit[2] = {Tokens(0), Tokens(0)};
  for (const bool probabilities : {true, false}) {
    std::vector<int64_t> index(kColumns, kRows - 1);
    const emulator::GlobalBuffer guard(index.data(), kColumns * 8, "target");
    for (const int i : {0, 1}) {
      PartialStatistics partials;
      partials.max = max[i].data(), partials.sum = sum[i].data();
      partials.target_dot = probabilities ? dot[i].data() : nullptr;
      const int64_t stride = i == 0 ? kColumns : kFarStride;
      const Targets soft{nullptr, i == 0 ? near_q.data() : far_q.data(), DType::kFloat32, 1,
                         stride};
      CHECK(block_statistics({kBlock,
                              i == 0 ? near.data() : far.data(),
                              stride,
                              DType::kFloat32,
                              {},
                              probabilities ? soft : Targets{index.data()},
                              64,
                              partials,
                              target_logit[i].data()},
                             nullptr)
                .ok());
    }
    for (int64_t n = 0; n < kColumns; ++n) {
      CHECK(max[0].at(n) == max[1].at(n) && sum[0].at(n) == sum[1].at(n) && sum[0].at(n) >= 1);
      CHECK(dot[0].at(n) == dot[1].at(n) && dot[0].at(n) != 0);
      if (!probabilities) CHECK(target_logit[1].at(n) == near.at((kRows - 1) * kColumns + n));
    }
  }
}

void test_gradients() {
  Tokens shift(2.0), softmax(0.7), target(-1.1), rest(-0.4), target_gradient(0.25);
  Coefficients coefficients;
  coefficients.shift = shift.data(), coefficients.softmax = softmax.data();
  coefficients.target = target.data(), coefficients.target_rest = rest.data();
  std::vector<int64_t> index(kColumns, kRows - 1);
  const emulator::GlobalBuffer guard(index.data(), kColumns * 8, "target");
  for (const DType dtype : {DType::kFloat32, DType::kBFloat16}) {
    NearRows near(DType::kFloat32, 3);
    FarRows far(DType::kFloat32);
    far.copy_from(near.data());
    for (const bool is_far : {false, true})
      CHECK(block_gradient({kBlock,
                            is_far ? far.data() : near.data(),
                            is_far ? kFarStride : kColumns,
                            DType::kFloat32,
                            dtype,
                            {},
                            {index.data()},
                            coefficients},
                           nullptr)
                .ok());
    CHECK(far.equals(near.data(), kColumns * size_of(dtype)));
  }

  NearRows near(DType::kFloat16, 4);
  FarRows far(DType::kFloat16);
  far.copy_from(near.data());
  Array bias[2] = {{DType::kFloat32, kRows, "bias"}, {DType::kFloat32, kRows, "bias of far rows"}};
  for (const bool is_far : {false, true}) {
    for (int64_t v = 0; v < kRows; ++v) bias[is_far].set(v, 0.0);
    const StoredScores scores{is_far ? far.data() : near.data(), is_far ? kFarStride : kColumns,
                              static_cast<float*>(shift.data()), kColumns};
    CHECK(stored_gradient({kBlock,
                           scores,
                           DType::kBFloat16,
                           {},
                           {index.data()},
                           coefficients,
                           static_cast<const float*>(target_gradient.data()),
                           {static_cast<float*>(bias[is_far].data())}},
                          nullptr)
              .ok());
  }
  for (int64_t v = 0; v < kRows; ++v) CHECK(bias[0].at(v) == bias[1].at(v));
  CHECK(bias[0].at(kRows - 1) == 0.25 * kColumns);
  CHECK(far.equals(near.data(), kColumns * 2));
  CHECK(near.at((kRows - 1) * kColumns, DType::kBFloat16) == 0.25);

  NearRows near_floats(DType::kFloat32, 8);
  FarRows far_floats(DType::kFloat32);
  far_floats.copy_from(near_floats.data());
  Array sums(DType::kFloat32, kRows, "sums");
  for (int64_t v = 0; v < kRows; ++v) sums.set(v, 0.0);
  CHECK(add_bias_gradient(kBlock, far_floats.data(), kFarStride, DType::kFloat32, sums.data(),
                          nullptr)
            .ok());
  for (int64_t v = 0; v < kRows; ++v) {
    double expected = 0;
    for (int64_t n = 0; n < kColumns; ++n) expected += near_floats.at(v * kColumns + n);
    emulator::compare(sums.at(v), expected, 1e-5, "bias sum", DType::kFloat32);
  }
}

void test_rows() {
  NearRows near_sums(DType::kFloat32, 5), near(DType::kBFloat16, 6), near_low(DType::kFloat16, 7);
  FarRows far_sums(DType::kFloat32), far(DType::kBFloat16), far_low(DType::kFloat16);
  far_sums.copy_from(near_sums.data()), far.copy_from(near.data());
  far_low.copy_from(near_low.data());
  for (const bool is_far : {false, true}) {
    RowUpdate update;
    update.sums = is_far ? far_sums.data() : near_sums.data();
    update.gradient = is_far ? far.data() : near.data();
    update.split.remainder = static_cast<uint16_t*>(is_far ? far_low.data() : near_low.data());
    update.sums_stride = update.gradient_stride = update.split.remainder_stride =
        is_far ? kFarStride : kColumns;
    update.dtype = DType::kBFloat16, update.update = WeightUpdate::kSplitNext;
    update.rows = kRows, update.columns = kColumns;
    CHECK(update_rows(update, nullptr).ok());
  }
  CHECK(far.equals(near.data(), kColumns * 2) && far_low.equals(near_low.data(), kColumns * 2));

  NearRows copy(DType::kBFloat16, 8);
  CHECK(copy_rows({far.data(), kFarStride, DType::kBFloat16, copy.data(), kColumns,
                   DType::kBFloat16, kRows, kColumns},
                  nullptr)
            .ok());
  CHECK(far.equals(copy.data(), kColumns * 2));
  NearRows other(DType::kBFloat16, 9);
  CHECK(copy_rows({other.data(), kColumns, DType::kBFloat16, far.data(), kFarStride,
                   DType::kBFloat16, kRows, kColumns},
                  nullptr)
            .ok());
  CHECK(far.equals(other.data(), kColumns * 2));
}

}  // namespace

int main() {
  emulator::config().printed_reports = 0;
  test_statistics();
  test_gradients();
  test_rows();
  CHECK(emulator::reports().empty());
  emulator::print_reports();
  return emulator::finish("test_generic_far_kernels");
}
