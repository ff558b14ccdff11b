// Times each bf16 CPU kernel alone on one thread, with no torch in the process: GFLOP/s of the tile
// products against the best that the micro-tile reaches from the first-level cache, nanoseconds per
// element of the rest. Time is the thread's CPU time, so that other programs disturb little.
//
//   cmake -S . -B build -DCMAKE_BUILD_TYPE=Release && cmake --build build --target bench_cpu_kernels
//   build/bench_cpu_kernels
#include <time.h>

#include <algorithm>
#include <cstdio>
#include <functional>
#include <vector>

#include "cpu/bf16_kernels.h"
#include "cpu/features.h"
#include "cpu/layout.h"
#include "cpu/tiling.h"

#if defined(__x86_64__)

namespace {

using namespace memeff;

constexpr int64_t kSlice = 4 * kTileVocab;  // classes whose gradients are packed together

double cpu_seconds() {
  timespec now;
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
  return static_cast<double>(now.tv_sec) + 1e-9 * static_cast<double>(now.tv_nsec);
}

/// Median seconds of one call, over runs of at least 20 ms each.
double measure(const std::function<void()>& call) {
  call();
  int repeats = 1;
  std::vector<double> seconds;
  while (seconds.size() < 7) {
    const double start = cpu_seconds();
    for (int i = 0; i < repeats; ++i) call();
    const double elapsed = cpu_seconds() - start;
    if (elapsed < 0.02) {
      repeats *= 2;
    } else {
      seconds.push_back(elapsed / repeats);
    }
  }
  std::sort(seconds.begin(), seconds.end());
  return seconds[seconds.size() / 2];
}

void report_product(const char* name, double flops, double seconds, double best) {
  std::printf("%-34s %8.1f GFLOP/s", name, flops / seconds * 1e-9);
  if (best > 0) std::printf("   %5.1f %% of the micro-tile", 100 * flops / seconds / best);
  std::printf("\n");
}

void report_pass(const char* name, double elements, double seconds) {
  std::printf("%-34s %8.3f ns/element\n", name, seconds / elements * 1e9);
}

/// Small numbers of both signs; denormals and NaN would be timed as something else.
std::vector<uint16_t> random_bf16(int64_t count) {
  std::vector<uint16_t> values(static_cast<size_t>(count));
  uint32_t state = 12345;
  for (uint16_t& value : values) {
    state = state * 1664525u + 1013904223u;
    value = static_cast<uint16_t>((state >> 31 << 15) | (0x3c00u + ((state >> 16) & 0xffu)));
  }
  return values;
}

void run(int64_t features) {
  const Bf16Kernels kernels = bf16_kernels_avx512bf16();
  const int64_t tokens = 1024;
  const int64_t padded = round_up(features, kPanel);
  const int64_t stride = sum_stride(features);
  const std::vector<uint16_t> weight = random_bf16(kSlice * features);
  const std::vector<uint16_t> input = random_bf16(tokens * features);
  std::vector<uint16_t> scores = random_bf16(kSlice * tokens);
  std::vector<uint16_t> panels(static_cast<size_t>(tokens * padded));
  std::vector<uint16_t> weight_panels(static_cast<size_t>(kSlice * padded));
  std::vector<uint16_t> pairs(static_cast<size_t>(kSlice * (tokens + kMicroRows)));
  std::vector<float> sums(static_cast<size_t>(tokens * stride));
  std::vector<float> scratch(kScoreScratchBytes / sizeof(float));
  std::vector<float> maxima(tokens), partial(tokens);
  std::vector<int64_t> rows(tokens);
  for (int64_t i = 0; i < tokens; ++i) rows[static_cast<size_t>(i)] = i;
  std::printf("D = %lld, %lld tokens\n", static_cast<long long>(features),
              static_cast<long long>(tokens));

  Product small;  // everything in the first-level cache: what the micro-tile can do at best
  small.a = pairs.data(), small.a_stride = 2 * 128 * kMicroRows, small.rows = kMicroRows;
  small.panels = panels.data(), small.panel_stride = 128 * kPanel, small.columns = kPanel;
  small.inner = 128, small.c = sums.data(), small.c_stride = stride, small.accumulate = false;
  const double best_seconds = measure([&] { kernels.multiply_pairs(small); });
  const double best =
      2.0 * static_cast<double>(small.rows * small.columns * small.inner) / best_seconds;
  report_product("micro-tile", best * best_seconds, best_seconds, 0);

  const double pack = measure([&] {
    for (int64_t t = 0; t < tokens; t += kPanel) {
      kernels.pack_transposed(input.data(), features, rows.data() + t, kPanel, features,
                              panels.data() + t * round_up(features, 2));
    }
  });
  report_pass("pack hidden states along features", static_cast<double>(tokens * features), pack);

  ScoreTile tile;
  tile.weight = weight.data(), tile.weight_stride = features, tile.classes = kTileVocab;
  tile.features = features, tile.panels = panels.data(),
  tile.panel_stride = round_up(features, 2) * kPanel;
  tile.tokens = kTileTokens, tile.partials.maximum = maxima.data(),
  tile.partials.sum = partial.data();
  tile.exponentials = scores.data(), tile.exponentials_stride = tokens,
  tile.scratch = scratch.data();
  const double score = measure([&] {  // over all token strips, as the backend walks them
    for (int64_t t = 0; t < tokens; t += kTileTokens) {
      tile.panels = panels.data() + t * round_up(features, 2);
      tile.exponentials = scores.data() + t;
      kernels.score_tile(tile);
    }
  });
  report_product("scores + statistics", 2.0 * static_cast<double>(kTileVocab * tokens * features),
                 score, best);

  const std::vector<float> coefficient(tokens, 0.5f);
  GradientTile gradient = {};
  gradient.data = scores.data(), gradient.stride = tokens, gradient.classes = kTileVocab;
  gradient.tokens = tokens, gradient.maxima = maxima.data(), gradient.shift = maxima.data();
  gradient.scale_p = coefficient.data(), gradient.factors = scratch.data();
  report_pass("dlogits in place", static_cast<double>(kTileVocab * tokens),
              measure([&] { kernels.gradient_tile(gradient); }));
  scores = random_bf16(kSlice * tokens);

  report_pass("pack weight rows", static_cast<double>(kSlice * features), measure([&] {
                for (int64_t d = 0; d < padded; d += kPanel) {
                  kernels.interleave_rows(weight.data() + d, features, nullptr, kSlice,
                                          std::min(kPanel, features - d), kPanel,
                                          weight_panels.data() + d * kSlice);
                }
              }));
  report_pass("pack dlogits", static_cast<double>(kSlice * tokens), measure([&] {
                for (int64_t t = 0; t < tokens; t += kMicroRows) {
                  kernels.interleave_rows(scores.data() + t, tokens, nullptr, kSlice,
                                          std::min(kMicroRows, tokens - t), kMicroRows,
                                          pairs.data() + t * kSlice);
                }
              }));
  Product product;
  product.a = pairs.data(), product.a_stride = kSlice * kMicroRows, product.rows = tokens;
  product.panels = weight_panels.data(), product.panel_stride = kSlice * kPanel;
  product.columns = std::min<int64_t>(512, padded), product.inner = kSlice;
  product.c = sums.data(), product.c_stride = stride, product.accumulate = true;
  const double products = 2.0 * static_cast<double>(product.columns);
  report_product("grad_input product", products * static_cast<double>(tokens * kSlice),
                 measure([&] { kernels.multiply_pairs(product); }), best);

  for (int64_t d = 0; d < padded; d += kPanel) {
    kernels.interleave_rows(input.data() + d, features, rows.data(), tokens,
                            std::min(kPanel, features - d), kPanel, panels.data() + d * tokens);
  }
  std::vector<uint16_t> copy(static_cast<size_t>(kTaskRows * copy_stride(tokens)));
  product.a = copy.data(), product.a_stride = copy_stride(tokens), product.rows = kTaskRows;
  product.panels = panels.data(), product.panel_stride = tokens * kPanel, product.inner = tokens;
  product.c_stride = sum_stride(kTaskColumns), product.accumulate = false;
  report_product("grad_weight product with its copy",
                 products * static_cast<double>(kTaskRows * tokens), measure([&] {
                   kernels.copy_rows(scores.data(), tokens, kTaskRows, tokens, copy.data());
                   kernels.multiply_rows(product);
                 }),
                 best);
}

}  // namespace

int main() {
  if (!memeff::cpu_features().avx512_bf16) {
    std::printf("skipped: this processor has no AVX512-BF16\n");
    return 0;
  }
  for (int64_t features : {1024, 2048, 4096}) run(features);
  return 0;
}

#else
int main() { std::printf("skipped: not an x86-64 processor\n"); }
#endif
