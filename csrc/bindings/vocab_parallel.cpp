#include "bindings/vocab_parallel.h"

#include <ATen/ops/from_blob.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Exception.h>
#include <torch/csrc/distributed/c10d/GroupRegistry.hpp>
#include <torch/csrc/distributed/c10d/ProcessGroup.hpp>

#include <algorithm>
#include <cstring>
#include <vector>

namespace memeff {
namespace {

std::string message_of(const std::exception& error) {
  const auto* from_torch = dynamic_cast<const c10::Error*>(&error);
  return from_torch != nullptr ? from_torch->what_without_backtrace() : error.what();
}

}  // namespace

/// torch.distributed's process group, for numbers in the host's memory.
class RankCall::Group : public RankGroup {
 public:
  explicit Group(const std::string& name)
      : group_(c10d::resolve_process_group(name)), name_(name) {}

  int64_t rank() const { return group_->getRank(); }
  int64_t size() const { return group_->getSize(); }

  void all_gather(const double* own, double* all, int64_t count) override {
    gather(const_cast<double*>(own), all, count, at::kDouble);
  }

  void gather_bytes(const void* own, void* all, int64_t bytes) {
    gather(const_cast<void*>(own), all, bytes, at::kByte);
  }

  void all_reduce(void* sums, DType dtype, int64_t count) override {
    if (reduce_in_bfloat16 && dtype == DType::kFloat32) {
      narrow(static_cast<char*>(sums), count);
      all_reduce(sums, count, at::kBFloat16);
      widen(static_cast<char*>(sums), count);
    } else {
      all_reduce(sums, count, dtype == DType::kFloat64 ? at::kDouble : at::kFloat);
    }
  }

  bool reduce_in_bfloat16 = false;

 private:
  void all_reduce(void* sums, int64_t count, at::ScalarType type) {
    std::vector<at::Tensor> tensors{at::from_blob(sums, {count}, type)};
    wait("all-reduce", [&] { return group_->allreduce(tensors); });
  }

  // Between fp32 and bf16 in the same memory, which the plan knows of.
  static void narrow(char* numbers, int64_t count) {
    for (int64_t i = 0; i < count; ++i) {
      float wide;
      std::memcpy(&wide, numbers + i * 4, 4);
      const c10::BFloat16 rounded = wide;
      std::memcpy(numbers + i * 2, &rounded, 2);
    }
  }
  static void widen(char* numbers, int64_t count) {
    for (int64_t i = count - 1; i >= 0; --i) {
      c10::BFloat16 rounded;
      std::memcpy(&rounded, numbers + i * 2, 2);
      const float wide = rounded;
      std::memcpy(numbers + i * 4, &wide, 4);
    }
  }

  void gather(void* own, void* all, int64_t count, at::ScalarType type) {
    std::vector<at::Tensor> input{at::from_blob(own, {count}, type)};
    std::vector<std::vector<at::Tensor>> output(1);
    for (int64_t rank = 0; rank < size(); ++rank) {
      char* const place = static_cast<char*>(all) + rank * static_cast<int64_t>(input[0].nbytes());
      output[0].push_back(at::from_blob(place, {count}, type));
    }
    wait("all-gather", [&] { return group_->allgather(output, input); });
  }

  template <class Start>
  void wait(const char* what, const Start& start) {
    std::string reason;
    try {
      start()->wait();
      return;
    } catch (const std::exception& error) {
      reason = message_of(error);
    }
    TORCH_CHECK(
        false, "vocab_parallel: an ", what, " of process group '", name_, "' failed on rank ",
        rank(), " of ", size(),
        "; expected every rank to make the same call. A rank that is missing, has raised an "
        "error or has ended shows up like this: ",
        reason);
  }

  const c10::intrusive_ptr<c10d::ProcessGroup> group_;
  const std::string name_;
};

/// What a rank says before a call.
struct RankCall::Record {
  static constexpr size_t kMessage = 512, kKernels = 32;

  int64_t failed = 0;
  int64_t op = 0;
  int64_t vocab = 0, start = -1;
  int64_t memory_budget = -1;
  int64_t threads = 0;
  char kernels[kKernels] = {};
  ArgumentDigests arguments = {};
  char message[kMessage] = {};  // why it has failed

  template <size_t size>
  static void copy(const std::string& text, char (&to)[size]) {
    std::strncpy(to, text.c_str(), size - 1);
  }
};

RankCall::RankCall(const std::string& group)
    : name_(group), group_(std::make_unique<Group>(group)) {
  shard_.group = group_.get();
  shard_.ranks = group_->size();
}

RankCall::~RankCall() = default;

std::vector<RankCall::Record> RankCall::gather(const Record& own) {
  std::vector<Record> records(static_cast<size_t>(group_->size()));
  group_->gather_bytes(&own, records.data(), sizeof own);
  if (own.failed) return records;  // this rank raises its own error
  for (size_t rank = 0; rank < records.size(); ++rank) {
    TORCH_CHECK(!records[rank].failed, "vocab_parallel: rank ", rank, " of process group '", name_,
                "' has raised an error in place of this call: ", records[rank].message);
  }
  return records;
}

void RankCall::report_failure(const std::string& message) {
  Record record;
  record.failed = 1;
  Record::copy(message, record.message);
  gather(record);
}

void RankCall::report_failure(const std::exception& error) { report_failure(message_of(error)); }

void RankCall::agree(const Device& device, const Arguments& arguments, const Problem& problem) {
  const DeviceFacts facts = device.facts(problem);
  Record own;
  own.op = arguments.op;
  own.vocab = problem.vocab;
  own.start = arguments.vocab_start;
  own.memory_budget = arguments.memory_budget;
  own.threads = facts.threads;
  Record::copy(facts.kernels, own.kernels);
  own.arguments = arguments.digests;
  const std::vector<Record> records = gather(own);

  const Record& first = records[0];
  for (size_t rank = 1; rank < records.size(); ++rank) {
    const Record& other = records[rank];
    TORCH_CHECK(first.op == other.op, "vocab_parallel: rank 0 calls ", name_of(Operators(first.op)),
                " and rank ", rank, " calls ", name_of(Operators(other.op)), " on process group '",
                name_, "'; expected every rank to make the same call");
    const std::string difference =
        describe_difference(Operators(first.op), first.arguments, other.arguments, rank);
    TORCH_CHECK(
        difference.empty(), "vocab_parallel: ", difference,
        "; expected the same on every rank of process group '", name_,
        "', whose ranks have the same tokens. If these are ranks of FSDP, each with tokens of "
        "its own, call the function inside of the module's forward, where the weight is "
        "whole, or use memeff.patch");
    TORCH_CHECK(std::strcmp(first.kernels, other.kernels) == 0,
                "vocab_parallel: rank 0 computes with '", first.kernels, "' and rank ", rank,
                " with '", other.kernels,
                "'; expected the same kernels: set MEMEFF_CPU_KERNELS alike on every rank");
  }
  place_shards(records);
  shard_.reduce_input_grad = arguments.reduce_input_grad;
  group_->reduce_in_bfloat16 = arguments.reduce_in_bfloat16;
}

void RankCall::place_shards(const std::vector<Record>& records) {
  std::vector<int64_t> starts;
  int64_t vocab = 0;
  memory_budget_ = -1;
  for (const Record& record : records) {
    starts.push_back(record.start >= 0 ? record.start : vocab);
    vocab += record.vocab;
    largest_shard_ = std::max(largest_shard_, record.vocab);
    most_threads_ = std::max(most_threads_, static_cast<int>(record.threads));
    if (record.memory_budget >= 0 && (memory_budget_ < 0 || record.memory_budget < memory_budget_))
      memory_budget_ = record.memory_budget;
  }
  // In the order of their classes the shards must follow one another.
  std::vector<size_t> order(records.size());
  for (size_t rank = 0; rank < order.size(); ++rank) order[rank] = rank;
  std::sort(order.begin(), order.end(), [&](size_t a, size_t b) {
    return std::make_pair(starts[a], records[a].vocab) <
           std::make_pair(starts[b], records[b].vocab);
  });
  int64_t next = 0;
  for (const size_t rank : order) {
    if (records[rank].vocab == 0) continue;
    TORCH_CHECK_VALUE(starts[rank] == next, "vocab_parallel: the shard of rank ", rank,
                      " starts at class ", starts[rank], ", expected ", next,
                      ": the shards of all ranks must cover ", vocab,
                      " classes without gaps or overlaps");
    next += records[rank].vocab;
  }
  shard_.start = starts[static_cast<size_t>(group_->rank())];
  shard_.vocab = vocab;
}

void RankCall::complete(PlanRequest* request) const {
  request->vocab = largest_shard_;
  request->ranks = shard_.ranks;
  request->memory_budget = memory_budget_;
  request->most_threads = most_threads_;
}

}  // namespace memeff
