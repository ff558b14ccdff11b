#include "core/planning.h"

#include <cstdio>

namespace memeff {
namespace {

std::string megabytes(int64_t bytes) {
  char text[64];
  std::snprintf(text, sizeof text, "%lld bytes (%.1f MiB)", static_cast<long long>(bytes),
                static_cast<double>(bytes) / (1 << 20));
  return text;
}

}  // namespace

PlanRequest plan_request(const Problem& problem, const PlanOptions& options) {
  PlanRequest request{options};
  request.tokens = problem.tokens;
  request.features = problem.features;
  request.vocab = problem.vocab;
  request.dtype = problem.dtype;
  return request;
}

int64_t first_chunk(const PlanRequest& r, int64_t score_bytes) {
  if (!r.grad_weight || r.statistics_known) return 0;
  int64_t most = tokens_in_gradient_row(r, score_bytes);
  if (r.chunk_size > 0) most = std::min(most, r.chunk_size);
  return std::min(r.tokens, most);
}

std::vector<Area> united(std::vector<Area> areas) {
  std::sort(areas.begin(), areas.end(),
            [](const Area& a, const Area& b) { return a.begin < b.begin; });
  std::vector<Area> result;
  for (const Area& area : areas) {
    if (result.empty() || area.begin > result.back().end) {
      result.push_back(area);
    } else {
      result.back().end = std::max(result.back().end, area.end);
    }
  }
  return result;
}

void count_work(const PlanRequest& r, int64_t fresh_tokens, Plan* plan) {
  const double product = product_flops(r);
  const int gradients = (r.grad_input ? 1 : 0) + (r.grad_weight ? 1 : 0);
  const double fresh =
      r.tokens == 0 ? 0.0 : static_cast<double>(fresh_tokens) / static_cast<double>(r.tokens);
  const double scores = (r.statistics_known ? 0 : 1) + fresh * (plan->separate_sweeps ? 2 : 1);
  plan->flops = product * (scores + gradients);
  plan->floor_flops = product * ((r.statistics_known ? 0 : 1) + gradients);
  const int64_t elements = (r.grad_input ? r.tokens * r.features : 0) +
                           (r.grad_weight ? r.vocab * r.features : 0) + (r.grad_bias ? r.vocab : 0);
  plan->floor_bytes = elements * size_of(r.dtype);
  plan->num_slices = plan->slice_vocab == 0 ? 0 : ceil_div(r.vocab, plan->slice_vocab);
  const int64_t rest = std::max<int64_t>(0, r.tokens - plan->stored_in_gradient);
  const int64_t per_chunk =
      plan->kind == PlanKind::kTokenChunks ? plan->chunk_tokens : plan->token_block;
  plan->num_chunks =
      (plan->stored_in_gradient > 0 ? 1 : 0) + (per_chunk > 0 ? ceil_div(rest, per_chunk) : 0);
}

std::string budget_error(const PlanRequest& r, const char* where, const Plan& smallest) {
  std::string error = "memory_budget=" + megabytes(r.memory_budget) + " is too small for " +
                      std::to_string(r.tokens) + " tokens, " + std::to_string(r.features) +
                      " features and " + std::to_string(r.vocab) + " classes" + where +
                      ": the minimum is " +
                      megabytes(smallest.workspace_bytes + smallest.library_bytes);
  if (smallest.library_bytes > 0)
    error += ", of which torch's matrix products take " + megabytes(smallest.library_bytes);
  return error;
}

}  // namespace memeff
