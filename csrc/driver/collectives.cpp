#include "driver/collectives.h"

#include "core/vocab_shard.h"
#include "driver/driver.h"

namespace memeff {
namespace {

class CountingGroup : public RankGroup {
 public:
  void all_gather(const double*, double*, int64_t) override { ++counted.all_gathers; }
  void start_all_reduce(void*, DType, int64_t) override { ++counted.all_reduces; }
  void finish_all_reduce() override {}

  Collectives counted;
};

/// All tokens take part; blocks of scores are nowhere.
class IdleBackend : public Backend {
 public:
  IdleBackend(int64_t tokens, int64_t shared_numbers)
      : tokens_(tokens), shared_numbers_(shared_numbers) {}

  int64_t select_tokens() override { return tokens_; }
  SharedNumbers shared_numbers(Shared what, Range) override {
    return {nullptr, nullptr, what == Shared::kTotals ? 0 : shared_numbers_};
  }
  void scores(Range, const ScoreBlock*) override {}
  void merge_statistics(Range) override {}
  void restore_statistics() override {}
  void write_loss() override {}
  void fresh_gradient(Range, Range, const ScoreBlock&, bool) override {}
  void to_gradient(Range, Range, const ScoreBlock&, bool) override {}
  void add_grad_input(Range, Range, const ScoreBlock&, bool) override {}
  void finish_grad_input(Range) override {}
  void grad_weight(Range, Range, const ScoreBlock&, bool, bool, WeightUpdate) override {}
  void finish_gradients() override {}
  ScoreBlock block_in_gradient() override { return {}; }
  ScoreBlock block_in_workspace() override { return {}; }
  ScoreBlock slice_block(int64_t) override { return {}; }
  ScoreBlock part(const ScoreBlock&, int64_t, int64_t) const override { return {}; }

 private:
  const int64_t tokens_, shared_numbers_;
};

}  // namespace

Collectives count_collectives(const Problem& problem, const PlanRequest& request, const Plan& plan,
                              int64_t shared_numbers) {
  CountingGroup group;
  VocabShard shard;
  shard.group = &group;
  Problem counted = problem;
  counted.shard = &shard;
  // The driver only asks which gradients are wanted.
  counted.grad_input = request.grad_input ? &shard : nullptr;
  counted.grad_weight = request.grad_weight ? &shard : nullptr;
  IdleBackend backend(problem.tokens, shared_numbers);
  run(counted, plan, request.statistics_known, backend);
  return group.counted;
}

}  // namespace memeff
