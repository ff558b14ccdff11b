#include "bindings/vocab_parallel.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <c10/util/Exception.h>
#include <torch/csrc/distributed/c10d/GroupRegistry.hpp>
#include <torch/csrc/distributed/c10d/ProcessGroup.hpp>

#include <algorithm>
#include <cstring>
#include <map>
#include <mutex>
#include <sstream>
#include <vector>

namespace memeff {
namespace {

std::string message_of(const std::exception& error) {
  const auto* from_torch = dynamic_cast<const c10::Error*>(&error);
  return from_torch != nullptr ? from_torch->what_without_backtrace() : error.what();
}

}  // namespace

/// torch.distributed's process group, for numbers in the memory of `device`.
class RankCall::Group : public RankGroup {
 public:
  Group(const std::string& name, at::Device device)
      : group_(c10d::resolve_process_group(name)), name_(name), device_(device) {}

  /// Without keeping it alive.
  c10::weak_intrusive_ptr<c10d::ProcessGroup> reference() const {
    return c10::weak_intrusive_ptr<c10d::ProcessGroup>(group_);
  }
  bool is(const c10::weak_intrusive_ptr<c10d::ProcessGroup>& other) const {
    return other.lock().get() == group_.get();
  }

  int64_t rank() const { return group_->getRank(); }
  int64_t size() const { return group_->getSize(); }

  void all_gather(const double* own, double* all, int64_t count) override {
    gather(tensor_of(own, count, at::kDouble, device_),
           tensor_of(all, size() * count, at::kDouble, device_));
  }

  void start_all_reduce(void* sums, DType dtype, int64_t count) override {
    reduced_ = {tensor_of(sums, count, scalar_type(dtype), device_)};
    attempt("all-reduce", [&] { reduction_ = group_->allreduce(reduced_); });
  }

  void finish_all_reduce() override {
    attempt("all-reduce", [&] { reduction_->wait(); });
    reduction_.reset();
    reduced_.clear();
  }

  /// Whether it has a backend for the host's memory, as gloo.
  bool reaches_hosts() const {
    const std::vector<c10::Device> types = group_->getDeviceTypes();
    return std::any_of(types.begin(), types.end(), [](c10::Device type) { return type.is_cpu(); });
  }

  /// Of bytes in the host's memory. A group that cannot exchange those takes the device's, and the host
  /// waits for it.
  void gather_bytes(const void* own, void* all, int64_t bytes) {
    at::Tensor given = tensor_of(own, bytes, at::kByte, at::kCPU);
    at::Tensor found = tensor_of(all, size() * bytes, at::kByte, at::kCPU);
    if (reaches_hosts()) return gather(given, found);
    at::Tensor on_device = at::empty(found.sizes(), found.options().device(device_));
    gather(given.to(device_), on_device);
    found.copy_(on_device);
  }

 private:
  static at::ScalarType scalar_type(DType dtype) {
    return dtype == DType::kBFloat16  ? at::kBFloat16
           : dtype == DType::kFloat64 ? at::kDouble
                                      : at::kFloat;
  }
  static at::Tensor tensor_of(const void* data, int64_t count, at::ScalarType type,
                              at::Device device) {
    const auto options = at::TensorOptions().dtype(type).device(device);
    return at::from_blob(const_cast<void*>(data), {count}, [](void*) {}, options, device);
  }

  void gather(const at::Tensor& own, const at::Tensor& all) {
    std::vector<at::Tensor> input{own};
    std::vector<std::vector<at::Tensor>> output{all.chunk(size())};
    attempt("all-gather", [&] { group_->allgather(output, input)->wait(); });
  }

  template <class Body>
  void attempt(const char* what, const Body& body) const {
    std::string reason;
    try {
      return body();
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
  const at::Device device_;
  std::vector<at::Tensor> reduced_;  // what start_all_reduce() was given
  c10::intrusive_ptr<c10d::Work> reduction_;
};

/// What a rank says before a call.
struct RankCall::Record {
  static constexpr size_t kMessage = 1024, kKernels = 64;

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

RankCall::RankCall(const std::string& group, at::Device device)
    : name_(group), group_(std::make_unique<Group>(group, device)) {
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
  agreement_ = group_->reaches_hosts() ? compare(own) : compare_once(own);
  shard_.start = agreement_.start;
  shard_.vocab = agreement_.vocab;
  shard_.reduce_input_grad = arguments.reduce_input_grad;
  shard_.reduce_in_bfloat16 = arguments.reduce_in_bfloat16 && arguments.reduce_input_grad;
}

std::pair<int64_t, int64_t> RankCall::agree(const std::string& facts, int64_t classes,
                                            int64_t budget) {
  Record own;
  own.vocab = classes;
  own.memory_budget = budget;
  TORCH_CHECK(facts.size() < Record::kMessage, "vocab_parallel: ", facts.size(),
              " characters to compare, expected fewer than ", Record::kMessage);
  Record::copy(facts, own.message);
  const std::vector<Record> records = gather(own);
  for (size_t rank = 1; rank < records.size(); ++rank) {
    check_same_call(records[0], records[rank], rank);
    std::istringstream all(records[0].message), others(records[rank].message);
    std::string fact, other;
    while (std::getline(all, fact, ';') && std::getline(others, other, ';')) {
      TORCH_CHECK(fact == other, "vocab_parallel: ", fact, " on rank 0, and ", other, " on rank ",
                  rank, "; expected the same on every rank of process group '", name_, "'");
    }
  }
  const Agreement found = place_shards(records);
  return {found.largest_shard, found.memory_budget};
}

void RankCall::check_same_call(const Record& first, const Record& other, size_t rank) const {
  TORCH_CHECK(first.op == other.op, "vocab_parallel: rank 0 calls ", name_of(Operators(first.op)),
              " and rank ", rank, " calls ", name_of(Operators(other.op)), " on process group '",
              name_, "'; expected every rank to make the same call");
}

RankCall::Agreement RankCall::compare_once(const Record& own) {
  struct Known {
    c10::weak_intrusive_ptr<c10d::ProcessGroup> group;
    std::map<std::string, Agreement> agreements;  // by this rank's record
  };
  constexpr size_t kMost = 4096;  // of 3 KiB each; ranks forget them at the same call
  static std::mutex mutex;
  static std::map<std::string, Known> groups;
  const std::string key(reinterpret_cast<const char*>(&own), sizeof own);
  {
    const std::lock_guard<std::mutex> lock(mutex);
    const auto known = groups.find(name_);
    if (known != groups.end()) {
      auto& [group, agreements] = known->second;
      const auto earlier = agreements.find(key);
      const bool ended = !group_->is(group);
      if (!ended && earlier != agreements.end()) return earlier->second;
      if (ended || agreements.size() == kMost) groups.erase(known);
    }
  }
  const Agreement agreement = compare(own);
  const std::lock_guard<std::mutex> lock(mutex);
  Known& known = groups.try_emplace(name_, Known{group_->reference(), {}}).first->second;
  known.agreements[key] = agreement;
  return agreement;
}

RankCall::Agreement RankCall::compare(const Record& own) {
  const std::vector<Record> records = gather(own);
  const Record& first = records[0];
  for (size_t rank = 1; rank < records.size(); ++rank) {
    const Record& other = records[rank];
    check_same_call(first, other, rank);
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
                "'; expected the same kernels: set MEMEFF_CPU_KERNELS or MEMEFF_CUDA_KERNELS alike "
                "on every rank, whose GPUs and layouts of tensors are the same");
  }
  return place_shards(records);
}

RankCall::Agreement RankCall::place_shards(const std::vector<Record>& records) const {
  std::vector<int64_t> starts;
  Agreement found;
  int64_t vocab = 0;
  for (const Record& record : records) {
    starts.push_back(record.start >= 0 ? record.start : vocab);
    vocab += record.vocab;
    found.largest_shard = std::max(found.largest_shard, record.vocab);
    found.most_threads = std::max(found.most_threads, static_cast<int>(record.threads));
    const int64_t budget = record.memory_budget;
    if (budget >= 0 && (found.memory_budget < 0 || budget < found.memory_budget))
      found.memory_budget = budget;
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
  found.start = starts[static_cast<size_t>(group_->rank())];
  found.vocab = vocab;
  return found;
}

void RankCall::complete(PlanRequest* request) const {
  request->vocab = agreement_.largest_shard;
  request->ranks = shard_.ranks;
  request->memory_budget = agreement_.memory_budget;
  request->most_threads = agreement_.most_threads;
}

}  // namespace memeff
