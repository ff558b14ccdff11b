// Which CUDA kernels a problem gets.
#include <string>

#include "check.h"
#include "cuda/select.h"

namespace {

using namespace memeff;
using cuda::Gpu;

Problem problem(DType dtype) {
  Problem p;
  p.tokens = 64, p.features = 128, p.vocab = 1000, p.dtype = dtype;
  p.input_stride = p.weight_stride = 128;
  return p;
}

std::string selected(const Problem& p, int capability, const std::string& forced = "") {
  std::string error;
  const std::string name = name_of(select_kernels(p, Gpu{capability}, forced, &error));
  return error.empty() ? name : error;
}

void follows_the_gpu() {
  const Problem p = problem(DType::kBFloat16);
  CHECK_EQ(selected(p, 75), "generic,generic");
  for (const int capability : {80, 86, 89, 100, 120})
    CHECK_EQ(selected(p, capability), "sm80,generic");
  CHECK_EQ(selected(p, 90), "sm90,generic");
}

void follows_the_dtype() {
  CHECK_EQ(selected(problem(DType::kFloat16), 90), "sm90,generic");
  CHECK_EQ(selected(problem(DType::kFloat32), 90), "generic,generic");
  CHECK_EQ(selected(problem(DType::kFloat64), 80), "generic,generic");
}

void tma_needs_aligned_rows() {
  Problem p = problem(DType::kBFloat16);
  p.input_stride = 132;
  CHECK_EQ(selected(p, 90), "sm80,generic");
  p = problem(DType::kBFloat16);
  p.weight = reinterpret_cast<const void*>(uintptr_t{1000 * 16 + 2});
  CHECK_EQ(selected(p, 90), "sm80,generic");
  p = problem(DType::kBFloat16);
  p.features = 100;
  CHECK_EQ(selected(p, 90), "sm80,generic");
  p.features = 0;
  CHECK_EQ(selected(p, 90), "generic,generic");
}

void some_losses_need_stored_products() {
  Problem p = problem(DType::kBFloat16);
  p.softcap = 30;
  CHECK_EQ(selected(p, 80), "sm80,generic");
  p.label_smoothing = 0.1;
  CHECK_EQ(selected(p, 80), "generic,generic");
  p.softcap = 0;
  CHECK_EQ(selected(p, 80), "sm80,generic");
  p.probabilities = &p;
  CHECK_EQ(selected(p, 80), "generic,generic");
}

void skipping_needs_handwritten_products() {
  Problem p = problem(DType::kBFloat16);
  p.skip_mass = 1e-3;
  CHECK_EQ(selected(p, 90), "sm90,sm90");
  CHECK_EQ(selected(p, 80), "sm80,sm80");
  CHECK_EQ(selected(p, 75), "generic,generic");
}

void can_be_forced_where_possible() {
  const Problem p = problem(DType::kBFloat16);
  CHECK_EQ(selected(p, 90, "sm80,sm90"), "sm80,sm90");
  CHECK_EQ(selected(p, 90, "generic,generic"), "generic,generic");
  CHECK_EQ(selected(p, 90, "generic,sm80"), "generic,generic");
  CHECK_EQ(selected(p, 80, "sm90,sm90"), "sm80,generic");
  CHECK_EQ(selected(problem(DType::kFloat32), 90, "sm90,sm90"), "generic,generic");
  CHECK(selected(p, 90, "sm85,sm80").find("expected two of generic, sm80, sm90") !=
        std::string::npos);
  CHECK(selected(p, 90, "sm80").find("MEMEFF_CUDA_KERNELS='sm80'") != std::string::npos);
}

}  // namespace

int main() {
  follows_the_gpu();
  follows_the_dtype();
  tma_needs_aligned_rows();
  some_losses_need_stored_products();
  skipping_needs_handwritten_products();
  can_be_forced_where_possible();
  return memeff::test::result();
}
