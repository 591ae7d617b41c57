// One step of a stage: all threads go through the same phases together, and meet where one phase needs what another
// thread did in the phase before.
#include "stage.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

namespace swarmd {

namespace {

// Up to so many rows every thread prepares the activations for itself: cheaper than waiting for each other.
constexpr int kRowsForEach = 2;
constexpr int kQueryRows = 8;  // rows of a sequence that make one piece of attention

struct Widths {
  int attended, qkv, most;
  explicit Widths(const SwarmdStage &stage)
      : attended(stage.heads * stage.head_dim),
        qkv((stage.heads + 2 * stage.kv_heads) * stage.head_dim),
        most(std::max({stage.hidden, stage.heads * stage.head_dim, stage.ffn})) {}
};

struct ThreadBuffers {
  Activations activations;  // of kRowsForEach rows
  float *scores, *queries;
};

struct Buffers {
  float *x, *qkv, *attended, *gate_up, *cos, *sin;
  Activations activations;
  std::vector<ThreadBuffers> threads;
  size_t scores_stride;
};

Buffers take_buffers(Arena &arena, const SwarmdStage &stage, int threads, int rows, int wanted, int context) {
  const Widths widths(stage);
  const size_t n = rows;
  Buffers out;
  out.x = arena.take<float>(n * stage.hidden);
  out.qkv = arena.take<float>(n * widths.qkv);
  out.attended = arena.take<float>(n * widths.attended);
  out.gate_up = arena.take<float>(n * 2 * stage.ffn);
  out.cos = arena.take<float>(n * (stage.head_dim / 2));
  out.sin = arena.take<float>(n * (stage.head_dim / 2));
  out.activations = take_activations(arena, std::max(rows, wanted), widths.most);
  out.scores_stride = round_up(context, kBlock);
  for (int i = 0; i < threads; i++)
    out.threads.push_back({take_activations(arena, kRowsForEach, widths.most),
                           arena.take<float>(kMostQueries * out.scores_stride),
                           arena.take<float>(static_cast<size_t>(kMostQueries) * stage.head_dim)});
  return out;
}

// One thread's way through a step.
class Step {
 public:
  Step(const SwarmdStage &stage, const SwarmdBatch &batch, const Buffers &buffers, Team &team, int thread)
      : stage_(stage), batch_(batch), buffers_(buffers), own_(buffers.threads[thread]), team_(team), widths_(stage) {}

  void run() {
    begin();
    for (int i = 0; i < stage_.n_layers; i++) layer(stage_.layers[i]);
    if (stage_.head) {
      head();
    } else {
      finish();
    }
  }

 private:
  void layer(const SwarmdLayer &layer) {
    const Activations normed = prepared(buffers_.x, layer.attention_norm, layer.qkv);
    multiply(team_, layer.qkv, normed, buffers_.qkv, widths_.qkv, false);
    team_.meet();
    each_row(batch_.rows, [&](int row) { store_keys_and_values(layer, row); });
    team_.meet();
    attention(layer);
    team_.meet();
    const Activations mixed = prepared(buffers_.attended, nullptr, layer.attention_output);
    multiply(team_, layer.attention_output, mixed, buffers_.x, stage_.hidden, true);
    team_.meet();
    const Activations normed_again = prepared(buffers_.x, layer.mlp_norm, layer.gate_up);
    multiply(team_, layer.gate_up, normed_again, buffers_.gate_up, 2 * stage_.ffn, false);
    team_.meet();
    const Activations gated = prepared_rows(stage_.ffn, layer.down, batch_.rows, [&](const Activations &out, int row) {
      kernels().gate(buffers_.gate_up + static_cast<size_t>(row) * 2 * stage_.ffn, out, row);
    });
    multiply(team_, layer.down, gated, buffers_.x, stage_.hidden, true);
    team_.meet();
  }

  // The input of a product: rows of `x` normed and quantized, or without a norm quantized where they stand.
  Activations prepared(float *x, const float *norm, const SwarmdMatrix &matrix) {
    const auto make = [&](const Activations &out, int row) {
      kernels().prepare(x + static_cast<size_t>(row) * matrix.columns, norm, stage_.eps, out, row);
    };
    return prepared_rows(matrix.columns, matrix, batch_.rows, make, norm ? nullptr : x);
  }

  // All threads have what `make` made of each row when this returns. `values` are the rows if they are there already.
  template <typename Make>
  Activations prepared_rows(int columns, const SwarmdMatrix &matrix, int rows, const Make &make,
                            float *values = nullptr) {
    const bool alone = rows <= kRowsForEach;
    Activations out = alone ? own_.activations : buffers_.activations;
    out.rows = rows;
    out.columns = columns;
    if (values) out.values = values;
    if (!any_quantized(matrix)) out.codes = nullptr;
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

  // Hidden states and rotations of all rows.
  void begin() {
    each_row(batch_.rows, [&](int row) {
      const size_t n = stage_.hidden, at = row * n;
      if (batch_.tokens) {
        swarmd_rows(stage_.embedding, batch_.tokens + row, 1, buffers_.x + at);
      } else if (batch_.wire == SWARMD_WIRE_F32) {
        std::memcpy(buffers_.x + at, static_cast<const float *>(batch_.hidden) + at, n * sizeof(float));
      } else {
        kernels().from_wire(static_cast<const uint16_t *>(batch_.hidden) + at, n, buffers_.x + at);
      }
      const int half = stage_.head_dim / 2;
      const float position = static_cast<float>(position_of(row));
      for (int i = 0; i < half; i++) {
        const float angle = position * stage_.frequencies[i];
        buffers_.cos[static_cast<size_t>(row) * half + i] = std::cos(angle);
        buffers_.sin[static_cast<size_t>(row) * half + i] = std::sin(angle);
      }
    });
    team_.meet();
  }

  int sequence_of(int row) const {
    return static_cast<int>(std::upper_bound(batch_.first_row, batch_.first_row + batch_.sequences, row) -
                            batch_.first_row) - 1;
  }
  int position_of(int row) const {
    const int sequence = sequence_of(row);
    return batch_.start[sequence] + row - batch_.first_row[sequence];
  }

  void store_keys_and_values(const SwarmdLayer &layer, int row) {
    const int sequence = sequence_of(row), position = position_of(row), head_dim = stage_.head_dim;
    const size_t block = batch_.blocks[batch_.first_block[sequence] + position / kBlock];
    const size_t rotation = static_cast<size_t>(row) * (head_dim / 2);
    kernels().rotate_and_store(buffers_.qkv + static_cast<size_t>(row) * widths_.qkv, stage_.heads, stage_.kv_heads,
                               head_dim, stage_.kv_blocks, buffers_.cos + rotation, buffers_.sin + rotation,
                               layer.keys + block * head_dim * kBlock,
                               layer.values + block * round_up(head_dim, kTile) * kBlock, position % kBlock);
  }

  void attention(const SwarmdLayer &layer) {
    Attention task = {};
    task.qkv = buffers_.qkv;
    task.qkv_stride = widths_.qkv;
    task.out = buffers_.attended;
    task.out_stride = widths_.attended;
    task.heads = stage_.heads;
    task.kv_heads = stage_.kv_heads;
    task.head_dim = stage_.head_dim;
    task.scores = own_.scores;
    task.queries = own_.queries;
    task.scores_stride = buffers_.scores_stride;
    int sequence = 0, pieces_before = 0;
    for (int piece = team_.take(1); find_piece(piece, sequence, pieces_before); piece = team_.take(1)) {
      const int index = piece - pieces_before, count = rows_of(sequence);
      const size_t pool = static_cast<size_t>(index % stage_.kv_heads) * stage_.kv_blocks * kBlock;
      task.kv_head = index % stage_.kv_heads;
      task.keys = layer.keys + pool * stage_.head_dim;
      task.values = layer.values + pool * round_up(stage_.head_dim, kTile);
      task.first = index / stage_.kv_heads * kQueryRows;
      task.last = std::min(task.first + kQueryRows, count);
      task.first_row = batch_.first_row[sequence];
      task.start = batch_.start[sequence];
      task.blocks = batch_.blocks + batch_.first_block[sequence];
      kernels().attend(task);
    }
  }

  int rows_of(int sequence) const { return batch_.first_row[sequence + 1] - batch_.first_row[sequence]; }

  // Moves on to the sequence that a piece of attention belongs to; false behind the last one. Pieces only grow.
  bool find_piece(int piece, int &sequence, int &pieces_before) const {
    for (; sequence < batch_.sequences; sequence++) {
      const int pieces = (rows_of(sequence) + kQueryRows - 1) / kQueryRows * stage_.kv_heads;
      if (piece < pieces_before + pieces) return true;
      pieces_before += pieces;
    }
    return false;
  }

  void head() {
    const SwarmdMatrix &head = *stage_.head;
    const Activations normed = prepared_rows(stage_.hidden, head, batch_.wanted, [&](const Activations &out, int row) {
      const size_t from = static_cast<size_t>(batch_.wanted_rows[row]) * stage_.hidden;
      kernels().prepare(buffers_.x + from, stage_.output_norm, stage_.eps, out, row);
    });
    multiply(team_, head, normed, batch_.logits, head.rows, false);
  }

  void finish() {
    each_row(batch_.rows, [&](int row) {
      const size_t n = stage_.hidden, at = row * n;
      if (batch_.wire == SWARMD_WIRE_F32) {
        std::memcpy(static_cast<float *>(batch_.out) + at, buffers_.x + at, n * sizeof(float));
      } else {
        kernels().to_wire(buffers_.x + at, n, static_cast<uint16_t *>(batch_.out) + at);
      }
    });
  }

  const SwarmdStage &stage_;
  const SwarmdBatch &batch_;
  const Buffers &buffers_;
  const ThreadBuffers &own_;
  Team &team_;
  const Widths widths_;
};

}  // namespace
}  // namespace swarmd

using namespace swarmd;

SwarmdPool *swarmd_pool_new(int32_t threads) { return new SwarmdPool(threads); }

void swarmd_pool_free(SwarmdPool *pool) { delete pool; }

size_t swarmd_workspace(const SwarmdPool *pool, const SwarmdStage *stage, int32_t rows, int32_t wanted,
                        int32_t context) {
  Arena arena(nullptr);
  take_buffers(arena, *stage, pool->threads(), rows, wanted, context);
  return arena.used();
}

void swarmd_step(SwarmdPool *pool, const SwarmdStage *stage, const SwarmdBatch *batch, void *workspace,
                 int32_t context) {
  Arena arena(workspace);
  const Buffers buffers = take_buffers(arena, *stage, pool->threads(), batch->rows, batch->wanted, context);
  pool->run([&](Team &team, int thread) { Step(*stage, *batch, buffers, team, thread).run(); });
}
