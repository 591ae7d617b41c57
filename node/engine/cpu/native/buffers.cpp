// The workspace of a step. node/models/costs.py counts the same, before anything is loaded.
#include "step.h"

namespace swarmd {

namespace {

// Whether a layer's outputs go through a buffer of their own before they are added to the hidden states.
bool any_delta(const SwarmdStage &stage) {
  if (stage.residual_multiplier != 1.0f) return true;
  return std::any_of(stage.layers, stage.layers + stage.n_layers, [](const SwarmdLayer &layer) {
    return layer.mixture || layer.attention_post_norm || layer.mlp_post_norm || layer.attention_output.bias ||
           layer.mlp.down.bias;
  });
}

ExpertBuffers take_expert_buffers(Arena &arena, const SwarmdStage &stage, size_t rows) {
  const SwarmdRouting &routing = stage.routing;
  const size_t pairs = rows * routing.top_k, some = std::min<size_t>(pairs, kMostPairs);
  ExpertBuffers out = {};
  out.scores = arena.take<float>(rows * routing.experts);
  out.chosen = arena.take<int>(pairs);
  out.places = arena.take<int>(pairs);
  out.shares = arena.take<float>(pairs);
  out.shared_share = arena.take<float>(rows);
  out.row_of = arena.take<int>(pairs);
  out.groups = arena.take<ExpertRows>(std::min<size_t>(pairs, routing.experts + pairs / kMostPairs));
  out.n_groups = arena.take<int>(1);
  out.counts = arena.take<int>(routing.experts + 1);
  out.in = take_activations(arena, static_cast<int>(some), std::max(stage.hidden, routing.ffn));
  out.gate_up = arena.take<float>(some * 2 * routing.ffn);
  out.out = arena.take<float>(some * stage.hidden);
  out.shared = arena.take<float>(rows * stage.hidden);
  return out;
}

}  // namespace

Widths::Widths(const SwarmdStage &stage)
    : attended(stage.heads * stage.head_dim),
      qkv((stage.heads + 2 * stage.kv_heads) * stage.head_dim),
      most(std::max({stage.hidden, stage.heads * stage.head_dim, stage.ffn})),
      pairs_of_rope(0) {
  for (int i = 0; i < stage.n_ropes; i++) pairs_of_rope += stage.ropes[i].pairs;
}

Buffers take_buffers(Arena &arena, const SwarmdStage &stage, int threads, int rows, int wanted, int context) {
  const Widths widths(stage);
  const size_t n = rows;
  Buffers out = {};
  out.x = arena.take<float>(n * stage.hidden);
  if (any_delta(stage)) out.delta = arena.take<float>(n * stage.hidden);
  out.qkv = arena.take<float>(n * widths.qkv);
  out.attended = arena.take<float>(n * widths.attended);
  out.gate_up = arena.take<float>(n * 2 * stage.ffn);
  out.cos = arena.take<float>(n * widths.pairs_of_rope);
  out.sin = arena.take<float>(n * widths.pairs_of_rope);
  out.activations = take_activations(arena, std::max(rows, wanted), widths.most);
  out.scores_stride = round_up(context, kBlock);
  for (int i = 0; i < threads; i++)
    out.threads.push_back({take_activations(arena, kRowsForEach, widths.most),
                           arena.take<float>(kMostQueries * out.scores_stride),
                           arena.take<float>(static_cast<size_t>(kMostQueries) * stage.head_dim),
                           arena.take<float>(stage.routing.experts + stage.routing.groups)});
  if (stage.routing.experts) out.experts = take_expert_buffers(arena, stage, n);
  return out;
}

}  // namespace swarmd

using namespace swarmd;

size_t swarmd_workspace(const SwarmdPool *pool, const SwarmdStage *stage, int32_t rows, int32_t wanted,
                        int32_t context) {
  Arena arena(nullptr);
  take_buffers(arena, *stage, pool->threads(), rows, wanted, context);
  return arena.used();
}
