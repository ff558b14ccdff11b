// Which CUDA kernels a problem gets.
#include <atomic>
#include <string>
#include <thread>
#include <vector>

#include "check.h"
#include "cuda/select.h"

namespace {

using namespace memeff;
using cuda::Gpu;
using cuda::MeasuredChoice;

Problem problem(DType dtype) {
  Problem p;
  p.tokens = 64, p.features = 128, p.vocab = 1000, p.dtype = dtype;
  p.input_stride = p.weight_stride = 128;
  return p;
}

std::string selected(const Problem& p, int capability, const std::string& forced = "") {
  std::string error;
  const cuda::Selection selection = select_kernels(p, Gpu{capability, ""}, forced, {}, &error);
  const std::string name = name_of(selection);
  return error.empty() ? name : error;
}

/// Kernels and reason.
std::string chosen(const Problem& p, const Gpu& gpu, const cuda::MeasuredChoices& measured,
                   const std::string& forced = "") {
  std::string error;
  const cuda::Selection selection = select_kernels(p, gpu, forced, measured, &error);
  return error + name_of(selection) + " " + reason_of(selection);
}
std::string chosen(const Problem& p, const Gpu& gpu, const std::vector<MeasuredChoice>& rows,
                   const std::string& forced = "") {
  return chosen(p, gpu, cuda::MeasuredChoices{rows}, forced);
}

/// What runs where nothing was measured, and other kernels could.
const std::string kDefault = "generic,generic default; run memeff-tune to use faster ones";

/// A measurement at the shape of problem() times the factors.
MeasuredChoice row(const char* gpu, double tokens, double features, double vocab,
                   const char* kernels) {
  MeasuredChoice measured;
  measured.gpu = gpu, measured.capability = 90;
  measured.tokens = static_cast<int64_t>(64 * tokens);
  measured.features = static_cast<int64_t>(128 * features);
  measured.vocab = static_cast<int64_t>(1000 * vocab);
  measured.kernels = kernels;
  return measured;
}

// Unless somebody asked for them or measured them, no handwritten products run on any GPU.
void is_generic_by_default() {
  for (const DType dtype : {DType::kBFloat16, DType::kFloat16, DType::kFloat32, DType::kFloat64})
    for (const int capability : {75, 80, 86, 87, 89, 90, 100, 103, 110, 120, 121})
      for (const double mass : {0.0, 1e-3}) {
        Problem p = problem(dtype);
        p.skip_mass = mass;
        const bool others = is_16_bit(dtype) && capability >= 80;
        CHECK_EQ(chosen(p, {capability, "NVIDIA"}, cuda::MeasuredChoices{}),
                 others ? kDefault : "generic,generic default");
      }
}

// The newest architecture that can run, where the one that is asked for cannot.
void follows_the_gpu() {
  const Problem p = problem(DType::kBFloat16);
  const char* const wanted = "sm90x2,sm90x2";
  CHECK_EQ(selected(p, 75, wanted), "generic,generic");
  for (const int capability : {80, 86, 89, 100, 120})
    CHECK_EQ(selected(p, capability, wanted), "sm80,generic");
  CHECK_EQ(selected(p, 90, wanted), wanted);
}

void follows_the_dtype() {
  CHECK_EQ(selected(problem(DType::kFloat16), 90, "sm90,sm90"), "sm90,sm90");
  CHECK_EQ(selected(problem(DType::kFloat32), 90, "sm90,sm90"), "generic,generic");
  CHECK_EQ(selected(problem(DType::kFloat64), 80, "sm80,sm80"), "generic,generic");
}

void tma_needs_aligned_rows() {
  const auto with_sm90 = [](const Problem& p) { return selected(p, 90, "sm90,sm90"); };
  Problem p = problem(DType::kBFloat16);
  p.input_stride = 132;
  CHECK_EQ(with_sm90(p), "sm80,generic");
  p = problem(DType::kBFloat16);
  p.weight = reinterpret_cast<const void*>(uintptr_t{1000 * 16 + 2});
  CHECK_EQ(with_sm90(p), "sm80,generic");
  p = problem(DType::kBFloat16);
  p.weight_stride = 0;  // an expanded row: rows overlap
  CHECK_EQ(with_sm90(p), "sm80,generic");
  p = problem(DType::kBFloat16);
  p.features = 100;
  CHECK_EQ(with_sm90(p), "sm80,generic");
  p.features = 0;
  CHECK_EQ(with_sm90(p), "generic,generic");
}

void some_losses_need_stored_products() {
  const auto with_sm80 = [](const Problem& p) { return selected(p, 80, "sm80,sm80"); };
  Problem p = problem(DType::kBFloat16);
  p.softcap = 30;
  CHECK_EQ(with_sm80(p), "sm80,sm80");
  p.label_smoothing = 0.1;
  CHECK_EQ(with_sm80(p), "generic,generic");
  p.softcap = 0;
  CHECK_EQ(with_sm80(p), "sm80,sm80");
  p.probabilities = &p;
  CHECK_EQ(with_sm80(p), "generic,generic");
}

void every_variant_has_a_name_of_its_own() {
  const std::vector<cuda::KernelSet> all = cuda::all_kernel_sets();
  for (const cuda::KernelSet& kernels : all) {
    test::context() = name_of(kernels);
    cuda::Selection named;
    CHECK(parse_kernels("generic," + name_of(kernels), &named) && named.products == kernels);
    CHECK_EQ(parse_kernels(name_of(kernels) + ",generic", &named), !kernels.reads_scores);
    CHECK(kernels.fused() || kernels == cuda::KernelSet{});
    // The default is plain: fallbacks rest on it.
    CHECK_EQ(kernels.architecture->variants[0].suffix[0], '\0');
    CHECK(kernels.architecture->variants[0].cluster == 1);
  }
  CHECK(all.size() > 3 && all[0] == cuda::KernelSet{});
}

void can_be_forced_where_possible() {
  const Problem p = problem(DType::kBFloat16);
  CHECK_EQ(selected(p, 90, "sm80,sm90"), "sm80,sm90");
  CHECK_EQ(selected(p, 90, "generic,generic"), "generic,generic");
  CHECK_EQ(selected(p, 90, "generic,sm80"), "generic,generic");
  CHECK_EQ(selected(p, 90, "sm90,sm90rs"), "sm90,sm90rs");
  CHECK_EQ(selected(p, 90, "sm90x2,sm90x2"), "sm90x2,sm90x2");
  CHECK_EQ(selected(p, 80, "sm90x2,sm90x2"), "sm80,generic");
  CHECK_EQ(selected(p, 80, "sm90,sm90"), "sm80,generic");
  CHECK_EQ(selected(p, 80, "sm80,sm90rs"), "sm80,generic");
  CHECK_EQ(selected(problem(DType::kFloat32), 90, "sm90,sm90"), "generic,generic");
  CHECK(selected(p, 90, "sm85,sm80").find("expected one of generic, sm80, sm90") !=
        std::string::npos);
  CHECK(selected(p, 90, "sm90rs,sm90rs")
            .find("expected one of generic, sm80, sm90, sm90x2 for "
                  "scores, a comma, and one of generic, sm80, sm90, sm90x2, sm90rs") !=
        std::string::npos);
  CHECK(selected(p, 90, "sm80").find("MEMEFF_CUDA_KERNELS='sm80'") != std::string::npos);
}

const Gpu kH200{90, "NVIDIA H200"};

void measurements_decide() {
  const Problem p = problem(DType::kBFloat16);
  CHECK_EQ(chosen(p, kH200, std::vector<MeasuredChoice>{}), kDefault);
  CHECK_EQ(chosen(p, kH200, {row("NVIDIA H200", 1, 1, 1, "sm80,sm80")}),
           "sm80,sm80 measured on NVIDIA H200 at 64x128x1000");
  // An environment variable is stronger.
  CHECK_EQ(chosen(p, kH200, {row("NVIDIA H200", 1, 1, 1, "sm80,sm80")}, "sm90,generic"),
           "sm90,generic MEMEFF_CUDA_KERNELS");
}

void measurements_of_something_else_do_not_count() {
  const MeasuredChoice here = row("NVIDIA H200", 1, 1, 1, "sm80,sm80");
  CHECK_EQ(chosen(problem(DType::kFloat16), kH200, {here}), kDefault);
  CHECK_EQ(chosen(problem(DType::kBFloat16), {80, "NVIDIA H200"}, {here}), kDefault);
  Problem skips = problem(DType::kBFloat16);
  skips.skip_mass = 1e-3;
  CHECK_EQ(chosen(skips, kH200, {here}), kDefault);
  MeasuredChoice skipping = here;
  skipping.skips = true;
  CHECK_EQ(chosen(skips, kH200, {skipping}), "sm80,sm80 measured on NVIDIA H200 at 64x128x1000");
  CHECK_EQ(chosen(problem(DType::kBFloat16), kH200, {skipping}), kDefault);
}

void shapes_within_a_factor_of_four_count() {
  const Problem p = problem(DType::kBFloat16);
  for (const double factor : {0.25, 4.0}) {
    const char* const f = "sm80,sm80";
    CHECK_EQ(chosen(p, kH200, {row("", factor, 1, 1, f)}).substr(0, 9), "sm80,sm80");
    CHECK_EQ(chosen(p, kH200, {row("", factor, factor, factor, f)}).substr(0, 9), "sm80,sm80");
    for (int i = 0; i < 3; ++i) {
      double factors[3] = {1, 1, 1};
      factors[i] = factor < 1 ? factor * 0.9 : factor * 1.1;
      CHECK_EQ(chosen(p, kH200, {row("", factors[0], factors[1], factors[2], f)}), kDefault);
    }
  }
  CHECK_EQ(chosen(p, kH200, {row("", 0, 1, 1, "sm80,sm80")}), kDefault);
}

void the_nearest_measurement_counts() {
  const Problem p = problem(DType::kBFloat16);
  const MeasuredChoice far = row("NVIDIA H200", 2, 2, 1, "sm80,sm80");
  const MeasuredChoice near = row("NVIDIA H200", 2, 1, 1, "sm90,sm90");
  for (const auto& table : {std::vector{far, near}, std::vector{near, far}})
    CHECK_EQ(chosen(p, kH200, table), "sm90,sm90 measured on NVIDIA H200 at 128x128x1000");
  // Where two are equally near, the first is taken.
  const MeasuredChoice below = row("NVIDIA H200", 0.5, 1, 1, "sm80,generic");
  CHECK_EQ(chosen(p, kH200, {below, near}), "sm80,generic measured on NVIDIA H200 at 32x128x1000");
  CHECK_EQ(chosen(p, kH200, {near, below}), "sm90,sm90 measured on NVIDIA H200 at 128x128x1000");
}

void a_gpu_of_the_same_name_comes_first() {
  const Problem p = problem(DType::kBFloat16);
  const MeasuredChoice other = row("NVIDIA H100", 1, 1, 1, "sm80,sm80");
  const MeasuredChoice own = row("NVIDIA H200", 3, 3, 3, "sm90,sm90");
  for (const auto& table : {std::vector{other, own}, std::vector{own, other}}) {
    CHECK_EQ(chosen(p, kH200, table), "sm90,sm90 measured on NVIDIA H200 at 192x384x3000");
    CHECK_EQ(chosen(p, {90, ""}, table), "sm80,sm80 measured on NVIDIA H100 at 64x128x1000");
  }
}

void measured_families_must_be_able_to_run() {
  Problem p = problem(DType::kBFloat16);
  p.input_stride = 132;
  CHECK_EQ(
      chosen(p, kH200,
             {row("NVIDIA H200", 1, 1, 1, "sm80,sm90"), row("NVIDIA H200", 2, 1, 1, "sm80,sm80")}),
      "sm80,sm80 measured on NVIDIA H200 at 128x128x1000");
  CHECK_EQ(chosen(problem(DType::kBFloat16), kH200, {row("NVIDIA H200", 1, 1, 1, "generic,sm80")}),
           kDefault);
}

void what_was_tuned_here_comes_first() {
  const Problem p = problem(DType::kBFloat16);
  const MeasuredChoice committed = row("NVIDIA H200", 1, 1, 1, "sm80,sm80");
  MeasuredChoice own = row("NVIDIA H200", 3, 3, 3, "sm90,sm90");
  own.here = true;
  for (const auto& table : {std::vector{committed, own}, std::vector{own, committed}}) {
    CHECK_EQ(chosen(p, kH200, table), "sm90,sm90 tuned on NVIDIA H200 at 192x384x3000");
    // Another GPU of the machine is not the one that was tuned.
    CHECK_EQ(chosen(p, {90, "NVIDIA H100"}, table),
             "sm80,sm80 measured on NVIDIA H200 at 64x128x1000");
  }
  CHECK_EQ(chosen(p, {90, "NVIDIA H100"}, {own}), kDefault);
}

void what_failed_here_does_not_run() {
  const Problem p = problem(DType::kBFloat16);
  const std::vector<MeasuredChoice> rows = {row("NVIDIA H200", 1, 1, 1, "sm90x2,sm90"),
                                            row("NVIDIA H200", 2, 1, 1, "sm80,generic")};
  const std::string second = "sm80,generic measured on NVIDIA H200 at 128x128x1000";
  for (const char* const failed : {"sm90", "sm90x2"}) {
    const cuda::MeasuredChoices known{rows, {{"NVIDIA H200", failed}}};
    CHECK_EQ(chosen(p, kH200, known), second);
    CHECK_EQ(chosen(p, {90, "NVIDIA H100"}, known).substr(0, 11), "sm90x2,sm90");
    // Somebody may want to know why.
    CHECK_EQ(chosen(p, kH200, known, "sm90x2,sm90"), "sm90x2,sm90 MEMEFF_CUDA_KERNELS");
  }
  CHECK_EQ(chosen(p, kH200, {rows, {{"NVIDIA H200", "sm90"}, {"NVIDIA H200", "sm80"}}}), kDefault);
}

/// While others plan calls, and what these have found stays where it is. (For the sanitizers.)
void choices_are_added_at_any_time() {
  std::atomic<bool> ends{false};
  std::string last;
  std::thread planner([&] {
    const Problem p = problem(DType::kBFloat16);
    while (!ends) last = chosen(p, kH200, cuda::measured_choices());
  });
  MeasuredChoice own = row("NVIDIA H200", 1, 1, 1, "sm90,sm90");
  own.here = true;
  const cuda::MeasuredChoices* before = &cuda::measured_choices();
  const size_t count = before->rows.size();
  for (size_t i = 1; i <= 50; ++i) {
    cuda::add_tuned({{own}, {}});
    CHECK_EQ(cuda::measured_choices().rows.size(), count + i);
  }
  CHECK_EQ(before->rows.size(), count);
  ends = true;
  planner.join();
  const std::string now = chosen(problem(DType::kBFloat16), kH200, cuda::measured_choices());
  CHECK_EQ(now, "sm90,sm90 tuned on NVIDIA H200 at 64x128x1000");
  CHECK(last == now || last == kDefault || last.empty());
}

void rows_of_the_table_make_sense() {
  const cuda::MeasuredChoices table{cuda::committed_choices()};
  for (const MeasuredChoice& measured : table.rows) {
    Problem p = problem(measured.dtype);
    p.tokens = measured.tokens, p.vocab = measured.vocab;
    p.features = p.input_stride = p.weight_stride = measured.features;
    p.skip_mass = measured.skips ? 1e-3 : 0;
    const Gpu gpu{measured.capability, measured.gpu};
    std::string error;
    const cuda::Selection selection = select_kernels(p, gpu, "", table, &error);
    test::context() = measured.gpu;
    CHECK(selection.measured == &measured);  // else another row hides it, or it cannot run
  }
}

}  // namespace

int main() {
  is_generic_by_default();
  follows_the_gpu();
  follows_the_dtype();
  tma_needs_aligned_rows();
  some_losses_need_stored_products();
  every_variant_has_a_name_of_its_own();
  can_be_forced_where_possible();
  measurements_decide();
  measurements_of_something_else_do_not_count();
  shapes_within_a_factor_of_four_count();
  the_nearest_measurement_counts();
  a_gpu_of_the_same_name_comes_first();
  measured_families_must_be_able_to_run();
  what_was_tuned_here_comes_first();
  what_failed_here_does_not_run();
  rows_of_the_table_make_sense();
  choices_are_added_at_any_time();
  return memeff::test::result();
}
