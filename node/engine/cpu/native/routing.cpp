#include "routing.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace swarmd {

namespace {

constexpr float kNever = -std::numeric_limits<float>::infinity();

void to_shares(const SwarmdRouting &routing, float *scores) {
  if (routing.sigmoid) {
    for (int e = 0; e < routing.experts; e++) scores[e] = 1.0f / (1.0f + std::exp(-scores[e]));
    return;
  }
  const float largest = *std::max_element(scores, scores + routing.experts);
  float sum = 0;
  for (int e = 0; e < routing.experts; e++) sum += scores[e] = std::exp(scores[e] - largest);
  for (int e = 0; e < routing.experts; e++) scores[e] /= sum;
}

// The first of the largest values, which is then out of the question; -1 when none is left.
int take_best(float *values, int count) {
  int best = -1;
  for (int i = 0; i < count; i++)
    if (values[i] > (best < 0 ? kNever : values[best])) best = i;
  if (best >= 0) values[best] = kNever;
  return best;
}

// Those outside of the groups whose two best sum highest are out of the question (DeepSeek-V3, arXiv:2412.19437).
void keep_best_groups(const SwarmdRouting &routing, float *candidates, float *sums) {
  const int size = routing.experts / routing.groups;
  for (int group = 0; group < routing.groups; group++) {
    float first = kNever, second = kNever;
    for (int e = group * size; e < (group + 1) * size; e++) {
      second = std::max(second, std::min(first, candidates[e]));
      first = std::max(first, candidates[e]);
    }
    sums[group] = size > 1 ? first + second : first;
  }
  for (int i = 0; i < routing.top_groups; i++) take_best(sums, routing.groups);
  for (int group = 0; group < routing.groups; group++)
    if (sums[group] != kNever) std::fill(candidates + group * size, candidates + (group + 1) * size, kNever);
}

}  // namespace

void route(const SwarmdRouting &routing, const float *selection_bias, float *scores, float *candidates, int *chosen,
           float *shares) {
  to_shares(routing, scores);
  for (int e = 0; e < routing.experts; e++) {
    // What is no number is chosen last, and spoils the row then. It must not stand in the way: experts are chosen once each.
    const float candidate = scores[e] + (selection_bias ? selection_bias[e] : 0.0f);
    candidates[e] = std::isfinite(candidate) ? candidate : std::numeric_limits<float>::lowest();
  }
  if (routing.groups > 1) keep_best_groups(routing, candidates, candidates + routing.experts);
  float sum = 0;
  for (int i = 0; i < routing.top_k; i++) {
    chosen[i] = take_best(candidates, routing.experts);
    sum += scores[chosen[i]];
  }
  std::sort(chosen, chosen + routing.top_k);
  const float factor = routing.normalize ? routing.scale / sum : routing.scale;
  for (int i = 0; i < routing.top_k; i++) shares[i] = scores[chosen[i]] * factor;
}

}  // namespace swarmd
