// A step from its input to its output, layer by layer.
#include <cmath>
#include <cstring>

#include "step.h"

namespace swarmd {

namespace {

constexpr int kLogitsAtATime = 4096;

}  // namespace

void Step::run() {
  begin();
  for (int i = 0; i < stage_.n_layers; i++) layer(stage_.layers[i]);
  if (stage_.head) {
    head();
  } else {
    finish();
  }
}

void Step::layer(const SwarmdLayer &layer) {
  attention(layer);
  if (layer.mixture) return mixture(layer);
  const SwarmdMatrix &gate_up = layer.mlp.gate_up.matrix;
  const Activations normed = prepared(buffers_.x, layer.mlp_norm, stage_.hidden, any_quantized(gate_up));
  multiply(team_, gate_up, normed, buffers_.gate_up, gate_up.rows, false);
  team_.meet();
  add_product(layer.mlp.down, gated(layer.mlp), layer.mlp_post_norm);
}

Activations Step::gated(const SwarmdMlp &mlp) {
  const int ffn = mlp.down.matrix.columns;
  return prepared_rows(ffn, any_quantized(mlp.down.matrix), batch_.rows, [&](const Activations &out, int i) {
    kernels().gate(row(buffers_.gate_up, i, 2 * ffn), mlp.gate_up.bias, stage_.activation, out, i);
  });
}

void Step::add_product(const SwarmdLinear &linear, const Activations &in, const float *post_norm) {
  const bool straight = !linear.bias && !post_norm && stage_.residual_multiplier == 1.0f;
  multiply(team_, linear.matrix, in, straight ? buffers_.x : buffers_.delta, stage_.hidden, straight);
  team_.meet();
  if (!straight) add_delta(linear.bias, post_norm);
}

void Step::add_delta(const float *bias, const float *post_norm) {
  each_row(batch_.rows, [&](int i) {
    kernels().add(row(buffers_.x, i, stage_.hidden), row(buffers_.delta, i, stage_.hidden), bias, post_norm, stage_.eps,
                  stage_.residual_multiplier, stage_.hidden);
  });
  team_.meet();
}

// Hidden states and rotations of all rows.
void Step::begin() {
  each_row(batch_.rows, [&](int row) { begin_row(row); });
  team_.meet();
}

void Step::begin_row(int row) {
  const size_t n = stage_.hidden, at = row * n;
  if (batch_.tokens) {
    swarmd_rows(stage_.embedding, batch_.tokens + row, 1, buffers_.x + at);
    if (stage_.embedding_multiplier != 1.0f) kernels().scale(buffers_.x + at, stage_.embedding_multiplier, 0, stage_.hidden);
  } else if (batch_.wire == SWARMD_WIRE_F32) {
    std::memcpy(buffers_.x + at, static_cast<const float *>(batch_.hidden) + at, n * sizeof(float));
  } else {
    kernels().from_wire(static_cast<const uint16_t *>(batch_.hidden) + at, n, buffers_.x + at);
  }
  const float position = static_cast<float>(position_of(row));
  float *cos = this->row(buffers_.cos, row, widths_.pairs_of_rope), *sin = this->row(buffers_.sin, row, widths_.pairs_of_rope);
  for (int rope = 0; rope < stage_.n_ropes; rope++) {
    const SwarmdRope &table = stage_.ropes[rope];
    for (int i = 0; i < table.pairs; i++) {
      const float angle = position * table.frequencies[i];
      *cos++ = std::cos(angle) * table.magnitude;
      *sin++ = std::sin(angle) * table.magnitude;
    }
  }
}

void Step::head() {
  const SwarmdMatrix &head = *stage_.head;
  const bool quantized = any_quantized(head);
  const Activations normed = prepared_rows(stage_.hidden, quantized, batch_.wanted, [&](const Activations &out, int i) {
    kernels().prepare(row(buffers_.x, batch_.wanted_rows[i], stage_.hidden), stage_.output_norm, stage_.eps, out, i);
  });
  multiply(team_, head, normed, batch_.logits, head.rows, false);
  if (stage_.logit_multiplier == 1.0f && stage_.logit_softcap == 0) return;
  team_.meet();
  const int pieces = (head.rows + kLogitsAtATime - 1) / kLogitsAtATime;
  each_row(batch_.wanted * pieces, [&](int piece) {
    const int first = piece % pieces * kLogitsAtATime;
    kernels().scale(row(batch_.logits, piece / pieces, head.rows) + first, stage_.logit_multiplier, stage_.logit_softcap,
                    std::min(kLogitsAtATime, head.rows - first));
  });
}

void Step::finish() {
  each_row(batch_.rows, [&](int row) {
    const size_t n = stage_.hidden, at = row * n;
    if (batch_.wire == SWARMD_WIRE_F32) {
      std::memcpy(static_cast<float *>(batch_.out) + at, buffers_.x + at, n * sizeof(float));
    } else {
      kernels().to_wire(buffers_.x + at, n, static_cast<uint16_t *>(batch_.out) + at);
    }
  });
}

}  // namespace swarmd

using namespace swarmd;

SwarmdPool *swarmd_pool_new(int32_t threads) { return new SwarmdPool(threads); }

void swarmd_pool_free(SwarmdPool *pool) { delete pool; }

void swarmd_step(SwarmdPool *pool, const SwarmdStage *stage, const SwarmdBatch *batch, void *workspace,
                 int32_t context) {
  Arena arena(workspace);
  const Buffers buffers = take_buffers(arena, *stage, pool->threads(), batch->rows, batch->wanted, context);
  pool->run([&](Team &team, int thread) { Step(*stage, *batch, buffers, team, thread).run(); });
}
