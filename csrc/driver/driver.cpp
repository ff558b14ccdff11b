#include "driver/driver.h"

#include <algorithm>
#include <utility>
#include <vector>

namespace memeff {
namespace {

/// A run of tokens whose scores are kept together; data is null where they are not kept.
struct Chunk {
  Range tokens;
  ScoreBlock block;
  bool kept = false;
};

template <class Body>
void for_each_block(Range range, int64_t size, const Body& body) {
  for (int64_t begin = range.begin; begin < range.end; begin += size) {
    body(Range{begin, std::min(begin + size, range.end)});
  }
}

class Run {
 public:
  Run(const Problem& problem, const Plan& plan, Backend& backend)
      : problem_(problem), plan_(plan), backend_(backend), all_classes_{0, problem.vocab} {
    tokens_ = backend.select_tokens();
    exchange(Shared::kTotals, {0, tokens_});
  }

  /// After an exception the sums' memory is given back: nothing may be adding up in it any more.
  ~Run() {
    if (reduced_.size() == 0) return;
    try {
      problem_.shard->group->finish_all_reduce();
    } catch (...) {
      // The call ends with the first exception.
    }
  }
  Run(const Run&) = delete;
  Run& operator=(const Run&) = delete;

  void statistics() {
    for_each_block({0, tokens_}, plan_.token_block, [&](Range tokens) {
      backend_.scores(tokens, nullptr);
      merge_statistics(tokens);
    });
    backend_.write_loss();
  }

  void token_chunks() {
    const std::vector<Chunk> chunks = split_tokens(/*keep_all=*/true);
    for (size_t i = 0; i < chunks.size(); ++i) {
      const Chunk& chunk = chunks[i];
      score_chunk(chunk);
      if (problem_.grad_input != nullptr) {
        input_gradient_of_kept(chunk);
      }
      if (problem_.grad_weight != nullptr) {
        weight_gradient_of_kept(chunk, update_of(i, chunks.size()));
      } else if (problem_.grad_input == nullptr) {
        for_each_block(all_classes_, plan_.slice_vocab, [&](Range classes) {
          backend_.to_gradient(classes, chunk.tokens, part(chunk, classes, chunk.tokens), true);
        });
      }
      finish_reduction();
    }
    backend_.write_loss();
    backend_.finish_gradients();
  }

  void vocab_slices(bool statistics_known) {
    const std::vector<Chunk> chunks = split_tokens(/*keep_all=*/false);
    if (statistics_known) {
      backend_.restore_statistics();
      for_each_block({0, tokens_}, plan_.token_block,
                     [&](Range tokens) { exchange(Shared::kTargetWeights, tokens); });
    } else {
      for (const Chunk& chunk : chunks) score_chunk(chunk);
      backend_.write_loss();
    }
    const bool input = problem_.grad_input != nullptr;
    const bool weight = problem_.grad_weight != nullptr;
    // grad_input of kept chunks needs no sums but those of one block; nor does that of the others in a
    // sweep of its own, which finishes them block by block.
    if (input) {
      for (const Chunk& chunk : chunks) {
        if (chunk.kept) input_gradient_of_kept(chunk);
      }
    }
    const bool together = weight && !plan_.separate_sweeps;
    if (input && !together) sweep_tokens(chunks, /*add_bias=*/!weight);
    finish_reduction();  // this sweep may take the memory of the sums
    if (weight || !input) sweep_classes(chunks, input && together);
    finish_reduction();
    backend_.finish_gradients();
  }

 private:
  std::vector<Chunk> split_tokens(bool keep_all) {
    std::vector<Chunk> chunks;
    int64_t begin = 0;
    const auto append = [&](int64_t size, ScoreBlock block, bool kept) {
      const int64_t end = std::min(begin + size, tokens_);
      if (end > begin) chunks.push_back({{begin, end}, block, kept});
      begin = end;
    };
    if (plan_.stored_in_gradient > 0) {
      append(plan_.stored_in_gradient, backend_.block_in_gradient(), true);
    }
    int64_t paid_chunks = keep_all ? INT64_MAX : plan_.stored_chunks;
    while (begin < tokens_ && paid_chunks-- > 0) {
      append(plan_.chunk_tokens, backend_.block_in_workspace(), true);
    }
    if (begin < tokens_) append(tokens_, {}, false);
    return chunks;
  }

  ScoreBlock part(const Chunk& chunk, Range classes, Range tokens) const {
    return backend_.part(chunk.block, classes.begin, tokens.begin - chunk.tokens.begin);
  }

  /// Lets the ranks of a sharded vocabulary know what each of them does.
  void exchange(Shared what, Range tokens) {
    if (problem_.shard == nullptr) return;
    const SharedNumbers numbers = backend_.shared_numbers(what, tokens);
    if (numbers.count == 0) return;
    problem_.shard->group->all_gather(numbers.own, numbers.all, numbers.count);
    backend_.merge_ranks(what, tokens);
  }

  void merge_statistics(Range tokens) {
    backend_.merge_statistics(tokens);
    exchange(Shared::kStatistics, tokens);
  }

  /// The tokens' sums are complete on this rank. Those of all ranks add up while it goes on, as far as that
  /// does not need the memory of the sums: finish_reduction().
  void finish_grad_input(Range tokens) {
    if (problem_.shard == nullptr) return backend_.finish_grad_input(tokens);
    finish_reduction();
    const InputSums sums = backend_.input_sums(tokens);
    if (!problem_.shard->reduce_input_grad) return backend_.finish_grad_input(tokens);
    problem_.shard->group->start_all_reduce(sums.data, sums.dtype, sums.count);
    reduced_ = tokens;
  }

  void finish_reduction() {
    if (reduced_.size() == 0) return;
    const Range tokens = std::exchange(reduced_, {});
    problem_.shard->group->finish_all_reduce();
    backend_.finish_grad_input(tokens);
  }

  void score_chunk(const Chunk& chunk) {
    for_each_block(chunk.tokens, plan_.score_block, [&](Range tokens) {
      if (chunk.kept) {
        const ScoreBlock block = part(chunk, all_classes_, tokens);
        backend_.scores(tokens, &block);
      } else {
        backend_.scores(tokens, nullptr);
      }
      merge_statistics(tokens);
    });
    backend_.differentiate_statistics(chunk.tokens);
  }

  void input_gradient_of_kept(const Chunk& chunk) {
    for_each_block(chunk.tokens, plan_.input_block, [&](Range tokens) {
      for_each_block(all_classes_, plan_.input_slice, [&](Range classes) {
        const ScoreBlock block = part(chunk, classes, tokens);
        backend_.to_gradient(classes, tokens, block, true);
        finish_reduction();
        backend_.add_grad_input(classes, tokens, block, classes.begin == 0);
      });
      finish_grad_input(tokens);
    });
  }

  void weight_gradient_of_kept(const Chunk& chunk, WeightUpdate update) {
    // With grad_input wanted, its pass has already turned the scores into gradients.
    const bool fresh = problem_.grad_input == nullptr;
    for_each_block(all_classes_, plan_.slice_vocab, [&](Range classes) {
      for_each_block(chunk.tokens, plan_.weight_block, [&](Range tokens) {
        const ScoreBlock block = part(chunk, classes, tokens);
        if (fresh) backend_.to_gradient(classes, tokens, block, true);
        backend_.grad_weight(classes, tokens, block, tokens.begin == chunk.tokens.begin,
                             tokens.end == chunk.tokens.end, update);
      });
    });
  }

  WeightUpdate update_of(size_t chunk, size_t chunks) const {
    if (chunks == 1) return WeightUpdate::kWrite;
    const bool halves =
        plan_.accumulation == Accumulation::kFloat32 && problem_.dtype == DType::kBFloat16;
    if (halves || plan_.accumulation == Accumulation::kCompact)
      return split_update(chunk == 0, chunk + 1 == chunks);
    return chunk == 0 ? WeightUpdate::kWrite : WeightUpdate::kAccumulate;
  }

  /// Gradients with respect to the logits of one slice and block: from kept scores, unless these are
  /// gradients already, or from scores computed again.
  ScoreBlock slice_gradient(const Chunk& chunk, Range classes, Range tokens, bool fresh_scores,
                            bool add_bias) {
    ScoreBlock block;
    if (chunk.kept) {
      block = part(chunk, classes, tokens);
      if (fresh_scores) backend_.to_gradient(classes, tokens, block, add_bias);
    } else {
      block = backend_.slice_block(tokens.size());
      backend_.fresh_gradient(classes, tokens, block, add_bias);
    }
    return block;
  }

  void sweep_classes(const std::vector<Chunk>& chunks, bool input) {
    for_each_block(all_classes_, plan_.slice_vocab, [&](Range classes) {
      for (const Chunk& chunk : chunks) {
        for_each_block(chunk.tokens, plan_.token_block, [&](Range tokens) {
          const bool is_gradient = chunk.kept && problem_.grad_input != nullptr;
          const ScoreBlock block = slice_gradient(chunk, classes, tokens, !is_gradient, true);
          if (input && !chunk.kept) {
            backend_.add_grad_input(classes, tokens, block, classes.begin == 0);
          }
          if (problem_.grad_weight != nullptr) {
            backend_.grad_weight(classes, tokens, block, tokens.begin == 0, tokens.end == tokens_,
                                 WeightUpdate::kWrite);
          }
        });
      }
    });
    if (!input) return;
    for (const Chunk& chunk : chunks) {
      if (chunk.kept) continue;
      for_each_block(chunk.tokens, plan_.token_block,
                     [&](Range tokens) { finish_grad_input(tokens); });
    }
  }

  void sweep_tokens(const std::vector<Chunk>& chunks, bool add_bias) {
    for (const Chunk& chunk : chunks) {
      if (chunk.kept) continue;
      for_each_block(chunk.tokens, plan_.input_sweep_block, [&](Range tokens) {
        for_each_block(all_classes_, plan_.input_sweep_slice, [&](Range classes) {
          const ScoreBlock block = backend_.slice_block(tokens.size());
          backend_.fresh_gradient(classes, tokens, block, add_bias);
          finish_reduction();
          backend_.add_grad_input(classes, tokens, block, classes.begin == 0);
        });
        finish_grad_input(tokens);
      });
    }
  }

  const Problem& problem_;
  const Plan& plan_;
  Backend& backend_;
  const Range all_classes_;
  int64_t tokens_;
  Range reduced_;  // tokens whose sums of grad_input the ranks are adding up
};

}  // namespace

void run(const Problem& problem, const Plan& plan, bool statistics_known, Backend& backend) {
  Run run(problem, plan, backend);
  switch (plan.kind) {
    case PlanKind::kStatistics: return run.statistics();
    case PlanKind::kTokenChunks: return run.token_chunks();
    case PlanKind::kVocabSlices: return run.vocab_slices(statistics_known);
  }
}

}  // namespace memeff
