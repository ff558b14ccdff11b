// The order in which the driver works where ranks share a vocabulary: the sums of grad_input are added up
// over the ranks while grad_weight is computed, and nothing touches them in the meantime.
#include <stdexcept>
#include <string>
#include <vector>

#include "check.h"
#include "driver/driver.h"

using namespace memeff;

namespace {

using Log = std::vector<std::string>;

class RecordingGroup : public RankGroup {
 public:
  explicit RecordingGroup(Log* log) : log_(*log) {}
  void all_gather(const double*, double*, int64_t) override { log_.push_back("gather"); }
  void start_all_reduce(void*, DType, int64_t count) override {
    log_.push_back("start " + std::to_string(count));
  }
  void finish_all_reduce() override { log_.push_back("finish"); }

 private:
  Log& log_;
};

/// Writes down what is asked of it, with the tokens.
class RecordingBackend : public Backend {
 public:
  RecordingBackend(const Problem& problem, Log* log, bool fails)
      : problem_(problem), log_(*log), fails_(fails) {}

  int64_t select_tokens() override { return problem_.tokens; }
  void scores(Range tokens, const ScoreBlock*) override { note("scores", tokens); }
  void merge_statistics(Range) override {}
  void restore_statistics() override {}
  SharedNumbers shared_numbers(Shared what, Range) override {
    return {nullptr, nullptr, what == Shared::kStatistics ? 1 : 0};
  }
  void merge_ranks(Shared, Range tokens) override { note("merge", tokens); }
  InputSums input_sums(Range tokens) override {
    return {nullptr, DType::kFloat32, tokens.size() * problem_.features};
  }
  void write_loss() override {}
  void fresh_gradient(Range, Range, const ScoreBlock&, bool) override { log_.push_back("fresh"); }
  void to_gradient(Range, Range, const ScoreBlock&, bool) override {}
  void add_grad_input(Range, Range tokens, const ScoreBlock&, bool) override { note("dx", tokens); }
  void finish_grad_input(Range tokens) override { note("write", tokens); }
  void grad_weight(Range, Range tokens, const ScoreBlock&, bool, bool, WeightUpdate) override {
    note("dw", tokens);
    if (fails_) throw std::runtime_error("dw");
  }
  void finish_gradients() override { log_.push_back("end"); }
  ScoreBlock block_in_gradient() override { return {}; }
  ScoreBlock block_in_workspace() override { return {}; }
  ScoreBlock slice_block(int64_t) override { return {}; }
  ScoreBlock part(const ScoreBlock& block, int64_t, int64_t) const override { return block; }

 private:
  void note(const char* what, Range tokens) {
    log_.push_back(std::string(what) + " " + std::to_string(tokens.begin));
  }
  const Problem& problem_;
  Log& log_;
  const bool fails_;
};

/// 8 tokens of 3 features in blocks of 2, one slice of classes. `fails`: at the first part of grad_weight.
Log run(PlanKind kind, bool reduce, bool separate, bool fails = false) {
  Log log;
  RecordingGroup group(&log);
  VocabShard shard;
  shard.group = &group, shard.ranks = 2, shard.vocab = 20, shard.reduce_input_grad = reduce;
  Problem problem;
  problem.tokens = 8, problem.features = 3, problem.vocab = 10, problem.shard = &shard;
  problem.grad_input = problem.grad_weight = &problem;  // any address
  Plan plan;
  plan.kind = kind, plan.chunk_tokens = 4, plan.separate_sweeps = separate;
  plan.token_block = plan.score_block = plan.weight_block = 4;
  plan.input_block = plan.input_sweep_block = 2;
  plan.slice_vocab = plan.input_slice = plan.input_sweep_slice = 10;
  RecordingBackend backend(problem, &log, fails);
  try {
    memeff::run(problem, plan, /*statistics_known=*/false, backend);
  } catch (const std::runtime_error& error) {
    log.push_back(std::string("error ") + error.what());
  }
  return log;
}

std::string text_of(const Log& log) {
  std::string text;
  for (const std::string& step : log) text += (text.empty() ? "" : ", ") + step;
  return text;
}

}  // namespace

int main() {
  // Each chunk: scores, one exchange, products of grad_input block by block, each of which adds up until
  // the next one needs the memory; the last one while grad_weight is computed.
  CHECK_EQ(
      text_of(run(PlanKind::kTokenChunks, true, false)),
      "scores 0, gather, merge 0, dx 0, start 6, finish, write 0, dx 2, start 6, dw 0, finish, "
      "write 2, scores 4, gather, merge 4, dx 4, start 6, finish, write 4, dx 6, start 6, dw 4, "
      "finish, write 6, end");
  // Without the reduction nothing is started.
  CHECK_EQ(
      text_of(run(PlanKind::kTokenChunks, false, false)),
      "scores 0, gather, merge 0, dx 0, write 0, dx 2, write 2, dw 0, scores 4, gather, merge 4, "
      "dx 4, write 4, dx 6, write 6, dw 4, end");
  // Scores computed again: the next block's while this one's sums add up. The sweep for grad_weight has
  // the memory of the sums.
  CHECK_EQ(
      text_of(run(PlanKind::kVocabSlices, true, true)),
      "scores 0, gather, merge 0, scores 4, gather, merge 4, fresh, dx 0, start 6, fresh, finish, "
      "write 0, dx 2, start 6, fresh, finish, write 2, dx 4, start 6, fresh, finish, write 4, "
      "dx 6, start 6, finish, write 6, fresh, dw 0, fresh, dw 4, end");
  CHECK_EQ(
      text_of(run(PlanKind::kVocabSlices, true, false)),
      "scores 0, gather, merge 0, scores 4, gather, merge 4, fresh, dx 0, dw 0, fresh, dx 4, dw 4, "
      "start 12, finish, write 0, start 12, finish, write 4, end");
  // After an exception nothing adds up any more in memory that the caller then frees.
  CHECK_EQ(
      text_of(run(PlanKind::kTokenChunks, true, false, true)),
      "scores 0, gather, merge 0, dx 0, start 6, finish, write 0, dx 2, start 6, dw 0, finish, "
      "error dw");
  return memeff::test::result();
}
