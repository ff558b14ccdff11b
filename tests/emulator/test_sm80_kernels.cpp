// The sm_80 kernels, emulated, against double precision: both dtypes, ragged and unaligned shapes.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cmath>
#include <random>
#include <vector>

#include "cuda/launch.h"
#include "emulator/check.h"

using namespace memeff;
using namespace memeff::cuda;
using emulator::BufferAccess;
using emulator::GlobalBuffer;

namespace {

struct Case {
  int64_t tokens, features, classes;
  int64_t padding = 0;   // between rows of both inputs, in elements
  bool options = false;  // bias, class weights, scale, cap
  bool full = false;     // all statistics
  int slices = 1;        // of the vocabulary
};

double to_double(__nv_bfloat16 x) { return __bfloat162float(x); }
double to_double(__half x) { return __half2float(x); }

template <class T>
void test_case(const Case& c, DType dtype) {
  std::mt19937 random(13);
  std::normal_distribution<float> normal;
  const int64_t stride = c.features + c.padding;
  std::vector<T> x(c.tokens * stride), w(c.classes * stride);
  std::vector<float> bias(c.classes), weight(c.classes);
  std::vector<int64_t> target(c.tokens);
  for (T& value : x) value = T(normal(random));
  for (T& value : w) value = T(normal(random) * 0.3f);
  for (float& value : bias) value = normal(random);
  for (float& value : weight) value = std::abs(normal(random));
  for (int64_t& value : target) value = static_cast<int64_t>(random() % c.classes);
  if (c.tokens > 3) target[3] = -100;

  // Padding lies between rows, not after the last: reading it would be out of bounds.
  const GlobalBuffer guard_x(x.data(), (x.size() - c.padding) * 2, "x", BufferAccess::kReadOnly);
  const GlobalBuffer guard_w(w.data(), (w.size() - c.padding) * 2, "w", BufferAccess::kReadOnly);
  const GlobalBuffer guard_b(bias.data(), bias.size() * 4, "bias", BufferAccess::kReadOnly);
  const GlobalBuffer guard_c(weight.data(), weight.size() * 4, "weight", BufferAccess::kReadOnly);
  const GlobalBuffer guard_t(target.data(), target.size() * 8, "target", BufferAccess::kReadOnly);

  LinearLogits logits;
  logits.input = x.data();
  logits.tokens = c.tokens;
  logits.features = c.features;
  logits.input_stride = logits.weight_stride = stride;
  logits.dtype = dtype;
  logits.target = target.data();
  if (c.options) {
    logits.bias = bias.data();
    logits.class_weight = weight.data();
    logits.logit_scale = 0.7;
    logits.softcap = 9.0;
  }

  std::vector<float> max(c.tokens), sum(c.tokens), hit(c.tokens), weighted(c.tokens),
      entropy(c.tokens);
  std::vector<int64_t> argmax(c.tokens);
  const auto bytes = c.tokens * sizeof(float);
  const GlobalBuffer guard_max(max.data(), bytes, "max"), guard_sum(sum.data(), bytes, "sum"),
      guard_hit(hit.data(), bytes, "hit"), guard_weighted(weighted.data(), bytes, "weighted"),
      guard_entropy(entropy.data(), bytes, "entropy"),
      guard_argmax(argmax.data(), c.tokens * 8, "argmax");
  TokenStatistics statistics;
  statistics.max = max.data();
  statistics.sum = sum.data();
  statistics.target = hit.data();
  if (c.full) {
    statistics.weighted = weighted.data();
    statistics.entropy = entropy.data();
    statistics.argmax = argmax.data();
  }
  for (int s = 0; s < c.slices; ++s) {
    const int64_t begin = c.classes * s / c.slices, end = c.classes * (s + 1) / c.slices;
    logits.weight = w.data() + begin * stride;
    logits.classes = end - begin;
    logits.first_class = begin;
    std::vector<double> workspace(linear_statistics_workspace(c.tokens, end - begin) / 8 + 1);
    const GlobalBuffer guard(workspace.data(), workspace.size() * 8, "workspace");
    const Status status = linear_statistics(logits, statistics, s > 0, workspace.data(), nullptr);
    CHECK(status.ok());
  }

  for (int64_t n = 0; n < c.tokens; ++n) {
    std::vector<double> z(c.classes);
    double top = -INFINITY, total = 0, mean = 0, wanted_weighted = 0;
    for (int64_t v = 0; v < c.classes; ++v) {
      double u = 0;
      for (int64_t k = 0; k < c.features; ++k)
        u += to_double(x[n * stride + k]) * to_double(w[v * stride + k]);
      z[v] = c.options ? 9.0 * std::tanh(0.7 * (u + bias[v]) / 9.0) : u;
      top = std::max(top, z[v]);
      wanted_weighted += (c.options ? weight[v] : 1.0) * z[v];
    }
    for (const double value : z) total += std::exp(value - top);
    for (const double value : z) mean += std::exp(value - top) / total * value;
    const double tolerance = 2e-5 * (1 + std::abs(top));
    CHECK(std::abs(max[n] - top) < tolerance);
    CHECK(std::abs(max[n] + std::log(sum[n]) - (top + std::log(total))) < tolerance);
    const double wanted_hit = target[n] < 0 ? 0.0 : z[target[n]];
    CHECK(std::abs(hit[n] - wanted_hit) < tolerance);
    if (!c.full) continue;
    CHECK(std::abs(entropy[n] / sum[n] - mean) < tolerance);
    CHECK(std::abs(weighted[n] - wanted_weighted) < tolerance * c.classes);
    CHECK(argmax[n] >= 0 && argmax[n] < c.classes && z[argmax[n]] > top - tolerance);
  }
}

void test_linear_statistics() {
  const Case cases[] = {
      {1, 8, 5},
      {130, 72, 300, 0, true, true},
      {5, 33, 130, 0, false, true},    // features not a multiple of 8: unaligned rows
      {129, 40, 129, 3, true, false},  // unaligned padding
      {7, 104, 700, 8, true, true, 3},
  };
  emulator::for_every_schedule([&](const char* variant) {
    for (const Case& c : cases) {
      test_case<__nv_bfloat16>(c, DType::kBFloat16);
      if (emulator::config().schedule == emulator::Schedule::kInOrder)
        test_case<__half>(c, DType::kFloat16);
    }
    if (emulator::reports().empty()) return;
    ++emulator::failed_checks;
    std::printf("FAILED: reports under %s\n", variant);
    emulator::print_reports();
  });
}

}  // namespace

int main() {
  emulator::config().printed_reports = 0;
  test_linear_statistics();
  return emulator::finish("test_sm80_kernels");
}
