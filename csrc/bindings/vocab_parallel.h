// A call whose vocabulary the ranks of a process group share: the group, and what its ranks agree on.
//
// Before anything is computed every rank says in one all-gather what it is about to compute. Where they
// differ, and where one of them has found an error, all ranks raise the same error instead of waiting
// for each other; where they do not, they know the shards and make the same plan. The all-gather is one of
// the host's memory, and waits for no GPU. A group that knows GPUs alone (NCCL) compares the first call of
// a kind, and again when anything but the contents of tensors is new to this rank.
#pragma once

#include <cstdint>
#include <exception>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "bindings/arguments.h"
#include "bindings/device.h"
#include "core/plan.h"
#include "core/problem.h"
#include "core/vocab_shard.h"

namespace memeff {

class RankCall {
 public:
  /// Finds torch.distributed's group of that name. `device`: of the call's tensors.
  explicit RankCall(const std::string& group, at::Device device = at::kCPU);
  ~RankCall();

  /// In place of agree(), by a rank that cannot go on.
  void report_failure(const std::string& message);
  void report_failure(const std::exception& error);
  /// Exchanges what the ranks are about to compute; raises an error if they differ.
  void agree(const Device& device, const Arguments& arguments, const Problem& problem);
  /// The same for what is no operator of csrc, in words: facts with ';' between them. Returns the most
  /// classes and the smallest budget of a rank.
  std::pair<int64_t, int64_t> agree(const std::string& facts, int64_t classes, int64_t budget);

  const VocabShard& shard() const { return shard_; }
  /// What all ranks plan: the largest shard, the smallest budget, the most threads.
  void complete(PlanRequest* request) const;

 private:
  class Group;
  struct Record;

  /// What follows from the records of all ranks.
  struct Agreement {
    int64_t start = 0, vocab = 0, largest_shard = 0, memory_budget = -1;
    int most_threads = 0;
  };

  /// Exchanges the records; raises an error if a rank has failed.
  std::vector<Record> gather(const Record& own);
  void check_same_call(const Record& first, const Record& other, size_t rank) const;
  /// Exchanges and compares them.
  Agreement compare(const Record& own);
  /// The same, where that waits for a GPU: only of what is new to this rank and group. After
  /// destroy_process_group() another group may have the name of an earlier one.
  Agreement compare_once(const Record& own);
  Agreement place_shards(const std::vector<Record>& records) const;

  const std::string name_;
  std::unique_ptr<Group> group_;
  VocabShard shard_;
  Agreement agreement_;
};

}  // namespace memeff
