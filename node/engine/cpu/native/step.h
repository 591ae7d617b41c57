// One step of a stage: all threads go through the same phases together, and meet where one phase needs what another
// thread did in the phase before.
#pragma once

#include <algorithm>
#include <vector>

#include "stage.h"

namespace swarmd {

// Up to so many rows every thread prepares the activations for itself: cheaper than waiting for each other.
constexpr int kRowsForEach = 2;
// So many pairs of a row and an expert that it chose go through the experts at a time.
constexpr int kMostPairs = 1024;

struct Widths {
  int attended, qkv, most, pairs_of_rope;
  explicit Widths(const SwarmdStage &stage);
};

struct ThreadBuffers {
  Activations activations;  // of kRowsForEach rows
  float *scores, *queries;
  float *candidates;  // [experts + groups]
};

// Consecutive pairs of one expert, the first of them number `first`.
struct ExpertRows {
  int expert, first, count;
};

// Which experts run for which rows. A pair is a row and an expert that it chose; pairs are ordered by expert, then by row.
// `chosen`, `shares` and `places` are [rows, top_k], each row's in the order of its experts: who they are, with what weight,
// and the numbers of their pairs.
struct ExpertBuffers {
  float *scores;  // the router's outputs [rows, experts]
  int *chosen, *places;
  float *shares, *shared_share;
  int *row_of;        // [pairs]
  ExpertRows *groups;  // runs of pairs, cut where kMostPairs are full
  int *n_groups, *counts;  // [1], [experts + 1]
  // Of one run of kMostPairs:
  Activations in;
  float *gate_up, *out;
  float *shared;  // [rows, hidden]
};

struct Buffers {
  float *x, *delta, *qkv, *attended, *gate_up, *cos, *sin;
  Activations activations;
  std::vector<ThreadBuffers> threads;
  size_t scores_stride;
  ExpertBuffers experts;
};

Buffers take_buffers(Arena &arena, const SwarmdStage &stage, int threads, int rows, int wanted, int context);

// One thread's way through a step.
class Step {
 public:
  Step(const SwarmdStage &stage, const SwarmdBatch &batch, const Buffers &buffers, Team &team, int thread)
      : stage_(stage), batch_(batch), buffers_(buffers), own_(buffers.threads[thread]), team_(team), widths_(stage) {}

  void run();

 private:
  void begin();
  void begin_row(int row);
  void layer(const SwarmdLayer &layer);
  void head();
  void finish();

  // step_attention.cpp
  void attention(const SwarmdLayer &layer);
  void ready_heads(const SwarmdLayer &layer);
  void attend(const SwarmdLayer &layer);
  int sequence_of(int row) const;
  int position_of(int row) const;
  int rows_of(int sequence) const { return batch_.first_row[sequence + 1] - batch_.first_row[sequence]; }
  bool find_piece(int piece, int &sequence, int &pieces_before) const;

  // mixture.cpp
  void mixture(const SwarmdLayer &layer);
  void choose_experts(const SwarmdMixture &mixture, const Activations &normed);
  void order_pairs();
  void run_experts(const SwarmdLayer &layer, const Activations &normed);
  void gather(const SwarmdLayer &layer, int begin, int end, const Activations &in);
  void add_experts(const SwarmdMixture &mixture, int begin, int end);
  void run_shared_expert(const SwarmdMlp &mlp, const Activations &normed);
  template <typename LinearOf, typename InputOf>
  void multiply_groups(const ExpertRows *groups, int n_groups, LinearOf linear_of, InputOf input_of, int begin, float *y,
                       size_t stride);

  bool alone() const { return batch_.rows <= kRowsForEach; }
  float *row(float *values, int row, int columns) const { return values + static_cast<size_t>(row) * columns; }

  // What gate and up make of rows; the input of `down`.
  Activations gated(const SwarmdMlp &mlp);
  // x += residual_multiplier * norm(W in + bias).
  void add_product(const SwarmdLinear &linear, const Activations &in, const float *post_norm);
  void add_delta(const float *bias, const float *post_norm);

  // The input of a product: rows of `x` normed and quantized, or without a norm quantized where they stand.
  Activations prepared(float *x, const float *norm, int columns, bool quantized) {
    const auto make = [&](const Activations &out, int row) {
      kernels().prepare(x + static_cast<size_t>(row) * columns, norm, stage_.eps, out, row);
    };
    return prepared_rows(columns, quantized, batch_.rows, make, norm ? nullptr : x);
  }

  // All threads have what `make` made of each row when this returns. `values` are the rows if they are there already.
  template <typename Make>
  Activations prepared_rows(int columns, bool quantized, int rows, const Make &make, float *values = nullptr) {
    const bool alone = rows <= kRowsForEach;
    Activations out = alone ? own_.activations : buffers_.activations;
    out.rows = rows;
    out.columns = columns;
    if (values) out.values = values;
    if (!quantized) out.codes = nullptr;
    if (alone) {
      for (int row = 0; row < rows; row++) make(out, row);
    } else {
      each_row(rows, [&](int row) { make(out, row); });
      team_.meet();
    }
    return out;
  }

  template <typename Do>
  void each_row(int rows, const Do &act) {
    const int piece = std::max(1, rows / (team_.threads() * 4));
    for (int begin = team_.take(piece); begin < rows; begin = team_.take(piece))
      for (int row = begin; row < std::min(begin + piece, rows); row++) act(row);
  }

  const SwarmdStage &stage_;
  const SwarmdBatch &batch_;
  const Buffers &buffers_;
  const ThreadBuffers &own_;
  Team &team_;
  const Widths widths_;
};

}  // namespace swarmd
