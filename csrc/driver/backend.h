// What the driver asks of a device. The driver knows plans and loops; a backend knows memory and
// arithmetic. All work is stated in half-open ranges: classes of the vocabulary, and positions in
// the list of tokens that take part (tokens with target ignore_index are left out of it).
#pragma once

#include <cstdint>

#include "core/dtype.h"
#include "core/weight_update.h"

namespace memeff {

struct Range {
  int64_t begin = 0;
  int64_t end = 0;
  int64_t size() const { return end - begin; }
  bool operator==(const Range& other) const { return begin == other.begin && end == other.end; }
};

/// A block of scores, vocabulary-major: the score of class v and token t lies at
/// data[(v - classes.begin) * stride + (t - tokens.begin)] of the ranges it is used with. The element
/// type is the backend's own, and to_gradient() replaces scores by gradients with respect to the
/// logits in place.
struct ScoreBlock {
  void* data = nullptr;
  int64_t stride = 0;         // elements between classes
  void* maxima = nullptr;     // per tile of classes and token; null if the backend has none
  int64_t maxima_stride = 0;  // elements between tiles
  void* tiles = nullptr;      // which tiles must not be skipped; null if the backend skips none
  int64_t tiles_stride = 0;
};

/// What the ranks of a sharded vocabulary tell each other.
enum class Shared {
  kTotals,         // sums of class weights, before anything else
  kStatistics,     // of a block of tokens, after merge_statistics()
  kTargetWeights,  // of a block of tokens, after restore_statistics()
};

/// `count` numbers of this rank, and room for those of all ranks; on the device.
struct SharedNumbers {
  const double* own = nullptr;
  double* all = nullptr;
  int64_t count = 0;  // 0: there is nothing to exchange
};

/// Sums of grad_input, to be added up over the ranks.
struct InputSums {
  void* data = nullptr;
  DType dtype = DType::kFloat32;
  int64_t count = 0;
};

class Backend {
 public:
  virtual ~Backend() = default;

  /// Lists the tokens that take part and returns their number.
  virtual int64_t select_tokens() = 0;

  /// Computes the scores of all classes and their partial statistics; keeps the scores in `block` unless
  /// it is null.
  virtual void scores(Range tokens, const ScoreBlock* block) = 0;
  /// Turns partial statistics into lse and the other token statistics, and those into coefficients; of a
  /// sharded vocabulary, into those of this rank's classes.
  virtual void merge_statistics(Range tokens) = 0;
  /// Token statistics with gradients in the forward pass: has the caller set the upstream gradients of
  /// these tokens, and turns them into coefficients.
  virtual void differentiate_statistics(Range) {}
  /// Takes lse from the problem instead, for all tokens.
  virtual void restore_statistics() = 0;

  /// Sharded vocabulary: what this rank has to say, and what follows from what all ranks have said (after
  /// the exchange): statistics of all classes, coefficients.
  virtual SharedNumbers shared_numbers(Shared, Range) { return {}; }
  virtual void merge_ranks(Shared, Range) {}
  /// Sharded vocabulary: the tokens' sums as the ranks add them up, zeros on a rank without classes.
  /// finish_grad_input() goes on with them.
  virtual InputSums input_sums(Range) { return {}; }

  /// Loss (and token statistics, when asked for) from the statistics of all tokens.
  virtual void write_loss() = 0;

  /// dlogits of scores computed again, into `block`: scores() and to_gradient() in one.
  virtual void fresh_gradient(Range classes, Range tokens, const ScoreBlock& block,
                              bool add_bias) = 0;
  /// dlogits in place; adds them to the gradient of the bias when `add_bias` is set. A backend whose
  /// products take scores as they are may leave them so.
  virtual void to_gradient(Range classes, Range tokens, const ScoreBlock& block, bool add_bias) = 0;
  /// Adds dlogits^T W to the tokens' sums (sets them when `first`).
  virtual void add_grad_input(Range classes, Range tokens, const ScoreBlock& block, bool first) = 0;
  virtual void finish_grad_input(Range tokens) = 0;
  /// dlogits x of one slice of classes: `first` begins the sums over tokens, `last` ends them and
  /// updates the rows of grad_weight.
  virtual void grad_weight(Range classes, Range tokens, const ScoreBlock& block, bool first,
                           bool last, WeightUpdate update) = 0;
  /// Writes what remains: the bias gradient, zeros for tokens left out or when none takes part.
  virtual void finish_gradients() = 0;

  /// Storage for scores: rows of grad_weight, the workspace's chunk, or its slice (of so many tokens).
  virtual ScoreBlock block_in_gradient() = 0;
  virtual ScoreBlock block_in_workspace() = 0;
  virtual ScoreBlock slice_block(int64_t tokens) = 0;
  /// The part of a block that starts `classes` classes and `tokens` tokens further on.
  virtual ScoreBlock part(const ScoreBlock& block, int64_t classes, int64_t tokens) const = 0;
};

}  // namespace memeff
