// Gradient products into compact sums, every family, emulated: the bits that the scalar model makes of
// the same products' fp32 sums, over several chunks, down to the final rounding.
#include <optional>
#include "cuda/sm80/kernels.h"
#include "cuda/sm90/kernels.h"
#include "kernels/compact_gradient.h"
#include "kernels/work_list.h"

using namespace memeff;
using namespace memeff::cuda;

namespace {

struct Family {
  const char* name;
  FusedKernels kernels;
};
const Family kFamilies[] = {{"sm80", sm80::fused_kernels(1)},
                            {"sm90", sm90::fused_kernels(1)},
                            {"sm90x2", sm90::fused_kernels(2)}};

struct ProductCase {
  int64_t classes, tokens, features;
  int64_t padding = 0;  // between rows of everything in 16 bits
  bool marks = false;
};

// G and W or x of one chunk after another, and what launches make of them.
template <class T>
struct Chunks {
  Chunks(const Family& family, const ProductCase& c, bool of_weight)
      : c(c),
        launch(of_weight ? family.kernels.grad_weight_product : family.kernels.grad_input_product),
        product(of_weight ? ProductOfGradient::kGradWeight : ProductOfGradient::kGradInput),
        random(53),
        g("G", c.classes, c.tokens, (8 - c.tokens % 8) % 8, 0, BufferAccess::kReadOnly),
        other("W or x", of_weight ? c.tokens : c.classes, c.features, c.padding, 0,
              BufferAccess::kReadOnly),
        tiles("tiles", tile_count(c.classes) * tile_count(c.tokens)),
        sums("sums", of_weight ? c.classes : c.tokens, c.features, 0, 0, BufferAccess::kReadWrite) {
  }
  static int64_t tile_count(int64_t extent) { return (extent + 127) / 128; }

  // Columns of very different sizes, as in hidden states; with `special`, inf and NaN in some rows.
  void next(bool special) {
    std::normal_distribution<float> normal;
    for (int64_t v = 0; v < c.classes; ++v)
      for (int64_t n = 0; n < c.tokens; ++n) g.at(v, n) = T(normal(random));
    for (int64_t i = 0; i < other.rows; ++i)
      for (int64_t d = 0; d < c.features; ++d)
        other.at(i, d) = T(std::ldexp(normal(random), -static_cast<int>(d * 7 % 11)));
    for (uint8_t& tile : tiles) tile = random() % 2;
    if (!special) return;
    other.at(other.rows - 1, 0) = T(INFINITY);
    if (c.features > 64) other.at(0, c.features - 1) = T(NAN);
  }
  Status run(const ProductOutput& output) {
    GradientOperands operands{g.data(),     g.stride,   other.data(),
                              other.stride, c.features, dtype_of<T>()};
    std::optional<ListedWork> work;
    if (c.marks) {
      work.emplace(product, c.classes, c.tokens, tiles.data(), tile_count(c.tokens));
      operands.list = work->list;
    }
    return launch({{0, c.classes, c.tokens}, operands, output}, nullptr);
  }

  ProductCase c;
  FusedKernels::Product* launch;
  ProductOfGradient product;
  std::mt19937 random;
  GuardedMatrix<T> g, other;
  GuardedArray<uint8_t> tiles;
  GuardedMatrix<float> sums;
};

template <class T>
void test_product(const Family& family, const ProductCase& c, bool of_weight, bool special) {
  Chunks<T> chunks(family, c, of_weight);
  CompactGradient<T> compact(chunks.sums.rows, c.features, c.padding, 0);
  GuardedArray<float> scale("scale", 1);
  scale[0] = 0.37f;
  ProductOutput sums, output;
  sums.sums = chunks.sums.data();
  sums.sums_stride = chunks.sums.stride;
  output.gradient = compact.gradient.data();
  output.gradient_stride = compact.gradient.stride;
  output.split = compact.split();
  output.scale = scale.data();
  for (const WeightUpdate update : {WeightUpdate::kSplitFirst, WeightUpdate::kSplitNext,
                                    WeightUpdate::kSplitNext, WeightUpdate::kSplitLast}) {
    chunks.next(special && update == WeightUpdate::kSplitNext);
    output.update = update;
    CHECK(chunks.run(sums).ok() && chunks.run(output).ok());
    CHECK(compact.is_model_after(
        update, [&](int64_t row, int64_t column) { return chunks.sums.at(row, column); },
        scale[0]));
  }
}

void test_products(const Family& family) {
  const bool thorough = emulator::config().schedule == emulator::Schedule::kInOrder;
  for (const bool of_weight : {false, true}) {
    test_product<__nv_bfloat16>(family, {136, 150, 200, 8}, of_weight, true);
    if (!thorough) continue;
    test_product<__half>(family, {150, 136, 328}, of_weight, false);
    test_product<__half>(family, {20, 5, 72, 16, true}, of_weight, true);
    test_product<__nv_bfloat16>(family, {300, 290, 264, 8, true}, of_weight, false);
    test_product<__nv_bfloat16>(family, {3, 1, 8}, of_weight, false);
  }
}

// What sm90 demands of exponents, and what no family takes.
void test_refusals() {
  Chunks<__half> chunks(kFamilies[0], {8, 8, 64}, true);
  CompactGradient<__half> compact(8, 64, 0, 0);
  ProductOutput output;
  output.gradient = compact.gradient.data();
  output.gradient_stride = compact.gradient.stride;
  output.update = WeightUpdate::kSplitFirst;
  for (const Family& family : kFamilies) {
    chunks.launch = family.kernels.grad_weight_product;
    output.split = {};
    CHECK(!chunks.run(output).ok());
    output.split = compact.split();
    CHECK(chunks.run(output).ok());
  }
  GradientOperands operands;
  operands.gradient = chunks.g.data(), operands.other = chunks.other.data();
  operands.gradient_stride = operands.other_stride = operands.features = 64;
  operands.dtype = DType::kFloat16;
  CHECK(sm90::accepts(operands, output));
  output.split.exponents_stride += 1;
  CHECK(!sm90::accepts(operands, output) && !chunks.run(output).ok());
  output.split = compact.split();
  output.split.exponents += 1;
  CHECK(!sm90::accepts(operands, output) && !chunks.run(output).ok());
}

}  // namespace

int main() {
  for (const Family& family : kFamilies)
    for_clean_schedules(family.name, [&] { test_products(family); });
  test_refusals();
  CHECK(emulator::reports().empty());
  return emulator::finish("test_sm_compact_sums");
}
