// A step's mixtures of experts (Shazeer et al. 2017, arXiv:1701.06538). Rows are brought together by expert, so that each
// expert's weights are read once; a row's experts are added up in the order of their numbers, whoever else is in the step.
#include <cmath>
#include <cstring>

#include "routing.h"
#include "step.h"

namespace swarmd {

namespace {

bool any_quantized_input(const SwarmdMixture &mixture, int experts) {
  const auto quantized = [](const SwarmdMlp &mlp) { return any_quantized(mlp.gate_up.matrix); };
  return any_quantized(mixture.router.matrix) || std::any_of(mixture.experts, mixture.experts + experts, quantized) ||
         (mixture.shared && quantized(*mixture.shared)) || (mixture.shared_gate && any_quantized(*mixture.shared_gate));
}

bool any_quantized_down(const SwarmdMixture &mixture, int experts) {
  return std::any_of(mixture.experts, mixture.experts + experts,
                     [](const SwarmdMlp &mlp) { return any_quantized(mlp.down.matrix); });
}

}  // namespace

void Step::mixture(const SwarmdLayer &layer) {
  const SwarmdMixture &mixture = *layer.mixture;
  const bool quantized = any_quantized_input(mixture, stage_.routing.experts);
  const Activations normed = prepared(buffers_.x, layer.mlp_norm, stage_.hidden, quantized);
  choose_experts(mixture, normed);
  order_pairs();
  run_experts(layer, normed);
  if (mixture.shared) run_shared_expert(*mixture.shared, normed);
  each_row(batch_.rows, [&](int i) {
    float *delta = row(buffers_.delta, i, stage_.hidden);
    if (mixture.shared)
      kernels().add(delta, row(buffers_.experts.shared, i, stage_.hidden), mixture.shared->down.bias, nullptr, 0,
                    buffers_.experts.shared_share[i], stage_.hidden);
    kernels().add(row(buffers_.x, i, stage_.hidden), delta, nullptr, layer.mlp_post_norm, stage_.eps,
                  stage_.residual_multiplier, stage_.hidden);
  });
  team_.meet();
}

void Step::choose_experts(const SwarmdMixture &mixture, const Activations &normed) {
  const ExpertBuffers &to = buffers_.experts;
  const SwarmdRouting &routing = stage_.routing;
  multiply(team_, mixture.router.matrix, normed, to.scores, routing.experts, false);
  team_.meet();
  each_row(batch_.rows, [&](int i) {
    float *scores = row(to.scores, i, routing.experts);
    if (mixture.router.bias)
      for (int e = 0; e < routing.experts; e++) scores[e] += mixture.router.bias[e];
    const size_t first = static_cast<size_t>(i) * routing.top_k;
    route(routing, mixture.selection_bias, scores, own_.candidates, to.chosen + first, to.shares + first);
    to.shared_share[i] = 1.0f;
    if (!mixture.shared_gate) return;
    float gate;
    multiply_tiles(*mixture.shared_gate, 0, tiles_of(*mixture.shared_gate), some_rows(normed, i, 1), {&gate, 1, false});
    to.shared_share[i] = 1.0f / (1.0f + std::exp(-gate));
  });
  team_.meet();
}

// By counting; one thread does it.
void Step::order_pairs() {
  const ExpertBuffers &to = buffers_.experts;
  const int experts = stage_.routing.experts, pairs = batch_.rows * stage_.routing.top_k;
  if (team_.take(1) == 0) {
    std::fill(to.counts, to.counts + experts + 1, 0);
    for (int i = 0; i < pairs; i++) to.counts[to.chosen[i] + 1]++;
    for (int e = 0; e < experts; e++) to.counts[e + 1] += to.counts[e];
    int n_groups = 0;
    for (int e = 0; e < experts; e++)
      for (int first = to.counts[e]; first < to.counts[e + 1];) {
        const int end = std::min(to.counts[e + 1], (first / kMostPairs + 1) * kMostPairs);
        to.groups[n_groups++] = {e, first, end - first};
        first = end;
      }
    *to.n_groups = n_groups;
    for (int i = 0; i < pairs; i++) {
      to.places[i] = to.counts[to.chosen[i]]++;
      to.row_of[to.places[i]] = i / stage_.routing.top_k;
    }
  }
  team_.meet();
}

// The outputs of consecutive groups of pairs, the first pair being row `begin` of what they read and write.
template <typename LinearOf, typename InputOf>
void Step::multiply_groups(const ExpertRows *groups, int n_groups, LinearOf linear_of, InputOf input_of, int begin,
                           float *y, size_t stride) {
  constexpr int kPiecesPerThread = 6;
  const int each = tiles_of(linear_of(groups[0].expert).matrix), total = each * n_groups;
  const int piece = std::max(1, total / (team_.threads() * kPiecesPerThread));
  for (int at = team_.take(piece); at < total; at = team_.take(piece)) {
    const int end = std::min(at + piece, total);
    for (int tile = at; tile < end;) {
      const ExpertRows &group = groups[tile / each];
      const int from = tile % each, to = std::min(each, from + end - tile);
      multiply_tiles(linear_of(group.expert).matrix, from, to, input_of(group),
                     {y + (group.first - begin) * stride, stride, false});
      tile += to - from;
    }
  }
}

void Step::run_experts(const SwarmdLayer &layer, const Activations &normed) {
  const SwarmdMixture &mixture = *layer.mixture;
  const ExpertBuffers &to = buffers_.experts;
  const int pairs = batch_.rows * stage_.routing.top_k, ffn = stage_.routing.ffn;
  const ExpertRows *groups = to.groups, *last = to.groups + *to.n_groups;
  const bool quantized_down = any_quantized_down(mixture, stage_.routing.experts);
  for (int begin = 0; begin < pairs; begin += kMostPairs) {
    const int end = std::min(begin + kMostPairs, pairs);
    int n_groups = 0;
    while (groups + n_groups < last && groups[n_groups].first < end) n_groups++;
    Activations in = to.in;
    in.rows = end - begin;
    in.columns = stage_.hidden;
    if (!normed.codes) in.codes = nullptr;
    if (!alone()) gather(layer, begin, end, in);
    // Of up to two rows, those that chose an expert are neighbours.
    const auto input = [&](const ExpertRows &group) {
      return alone() ? some_rows(normed, to.row_of[group.first], group.count) : some_rows(in, group.first - begin, group.count);
    };
    const auto gate_up = [&](int expert) -> const SwarmdLinear & { return mixture.experts[expert].gate_up; };
    multiply_groups(groups, n_groups, gate_up, input, begin, to.gate_up, 2 * ffn);
    team_.meet();
    Activations gated = to.in;
    gated.rows = end - begin;
    gated.columns = ffn;
    if (!quantized_down) gated.codes = nullptr;
    each_row(n_groups, [&](int g) {
      for (int i = groups[g].first - begin; i < groups[g].first - begin + groups[g].count; i++)
        kernels().gate(row(to.gate_up, i, 2 * ffn), gate_up(groups[g].expert).bias, stage_.activation, gated, i);
    });
    team_.meet();
    const auto middle = [&](const ExpertRows &group) { return some_rows(gated, group.first - begin, group.count); };
    const auto down = [&](int expert) -> const SwarmdLinear & { return mixture.experts[expert].down; };
    multiply_groups(groups, n_groups, down, middle, begin, to.out, stage_.hidden);
    team_.meet();
    add_experts(mixture, begin, end);
    team_.meet();
    groups += n_groups;
  }
}

// The rows of pairs [begin, end) as the experts read them.
void Step::gather(const SwarmdLayer &layer, int begin, int end, const Activations &in) {
  each_row(end - begin, [&](int i) {
    const float *x = row(buffers_.x, buffers_.experts.row_of[begin + i], stage_.hidden);
    if (!layer.mlp_norm) std::memcpy(row(in.values, i, stage_.hidden), x, sizeof(float) * stage_.hidden);
    kernels().prepare(x, layer.mlp_norm, stage_.eps, in, i);
  });
  team_.meet();
}

// What the experts of pairs [begin, end) say, by their weights.
void Step::add_experts(const SwarmdMixture &mixture, int begin, int end) {
  const ExpertBuffers &from = buffers_.experts;
  const int top_k = stage_.routing.top_k;
  each_row(batch_.rows, [&](int i) {
    float *delta = row(buffers_.delta, i, stage_.hidden);
    if (begin == 0) std::memset(delta, 0, sizeof(float) * stage_.hidden);
    for (int pair = i * top_k; pair < (i + 1) * top_k; pair++) {
      const int place = from.places[pair];
      if (place < begin || place >= end) continue;
      kernels().add(delta, row(from.out, place - begin, stage_.hidden), mixture.experts[from.chosen[pair]].down.bias,
                    nullptr, 0, from.shares[pair], stage_.hidden);
    }
  });
}

// Overwrites the activations that `normed` may lie in.
void Step::run_shared_expert(const SwarmdMlp &mlp, const Activations &normed) {
  const SwarmdMatrix &gate_up = mlp.gate_up.matrix;
  multiply(team_, gate_up, normed, buffers_.gate_up, gate_up.rows, false);
  team_.meet();
  multiply(team_, mlp.down.matrix, gated(mlp), buffers_.experts.shared, stage_.hidden, false);
  team_.meet();
}

}  // namespace swarmd
