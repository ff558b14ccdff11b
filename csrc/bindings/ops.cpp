#include "bindings/ops.h"

#include <ATen/core/dispatch/Dispatcher.h>

#include "bindings/call.h"
#include "bindings/statistics_call.h"

namespace memeff {
namespace {

std::vector<at::Tensor> gradients_of(const Call& call) {
  return {call.grad_input, call.grad_weight, call.grad_bias};
}

void check_one_target(const Call& call, const Arguments& arguments) {
  TORCH_CHECK(call.problem().targets == 1, "target has shape ", arguments.target->sizes(),
              ": expected [", call.problem().tokens, "], one class index per token");
}

}  // namespace

std::vector<at::Tensor> loss_forward(const Device& device, const Arguments& arguments) {
  Call call(device, arguments);
  check_one_target(call, arguments);
  call.allocate_statistics();
  const bool in_forward = gradient_in_forward(arguments.reduction, call.problem().dtype);
  if (!in_forward) call.check_budget();
  call.allocate_gradients(in_forward);
  call.run(false);
  return {call.loss,       call.lse,         call.statistics, call.argmax,
          call.grad_input, call.grad_weight, call.grad_bias};
}

std::vector<at::Tensor> loss_backward(const Device& device, const Arguments& arguments) {
  Call call(device, arguments);
  check_one_target(call, arguments);
  call.use_statistics();
  call.allocate_gradients(true);
  call.run(true);
  return gradients_of(call);
}

std::vector<at::Tensor> statistics_forward(const Device& device, const Arguments& arguments) {
  StatisticsCall call(device, arguments);
  call.allocate_outputs();
  call.check_budget();
  call.run(false);
  return {call.logprob,   call.lse,    call.entropy,      call.logit_sum,
          call.max_logit, call.argmax, call.top_logprobs, call.top_ids};
}

std::vector<at::Tensor> statistics_backward(const Device& device, const Arguments& arguments) {
  StatisticsCall call(device, arguments);
  call.use_gradients();
  call.allocate_gradients(true);
  call.run(true);
  return gradients_of(call);
}

std::vector<at::Tensor> custom_loss(const Device& device, const Arguments& arguments) {
  StatisticsCall call(device, arguments);
  call.allocate_outputs();
  // The operator is implemented in Python; the dispatcher takes care of the interpreter's lock.
  using Chunk = std::vector<at::Tensor>(int64_t, int64_t, const at::Tensor&, const at::Tensor&,
                                        const at::Tensor&, const at::Tensor&, const at::Tensor&);
  static const auto chunk = c10::Dispatcher::singleton()
                                .findSchemaOrThrow("memeff::differentiate_chunk", "")
                                .typed<Chunk>();
  call.differentiate_in_forward([&](int64_t begin, const at::Tensor& logprob, const at::Tensor& lse,
                                    const at::Tensor& entropy, const at::Tensor& logit_sum,
                                    const at::Tensor& max_logit) {
    return chunk.call(arguments.handle, begin, logprob, lse, entropy, logit_sum, max_logit);
  });
  call.allocate_gradients(true);
  call.run(false);
  return gradients_of(call);
}

}  // namespace memeff
