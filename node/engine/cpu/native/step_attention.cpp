// A step's attention: queries and keys made ready row by row, then attention sequence by sequence and head by head.
#include "step.h"

namespace swarmd {

namespace {

constexpr int kQueryRows = 8;  // rows of a sequence that make one piece of attention

}  // namespace

void Step::attention(const SwarmdLayer &layer) {
  const Activations normed =
      prepared(buffers_.x, layer.attention_norm, stage_.hidden, any_quantized(layer.qkv.matrix));
  multiply(team_, layer.qkv.matrix, normed, buffers_.qkv, widths_.qkv, false);
  team_.meet();
  ready_heads(layer);
  team_.meet();
  attend(layer);
  team_.meet();
  const Activations mixed =
      prepared(buffers_.attended, nullptr, widths_.attended, any_quantized(layer.attention_output.matrix));
  add_product(layer.attention_output, mixed, layer.attention_post_norm);
}

int Step::sequence_of(int row) const {
  return static_cast<int>(std::upper_bound(batch_.first_row, batch_.first_row + batch_.sequences, row) -
                          batch_.first_row) - 1;
}

int Step::position_of(int row) const {
  const int sequence = sequence_of(row);
  return batch_.start[sequence] + row - batch_.first_row[sequence];
}

void Step::ready_heads(const SwarmdLayer &layer) {
  Heads heads = {stage_.heads, stage_.kv_heads, stage_.head_dim, stage_.qk_norm, stage_.eps,
                 layer.qkv.bias, layer.q_norm,   layer.k_norm,    0};
  int rotation = 0;
  if (layer.rope >= 0) heads.pairs = stage_.ropes[layer.rope].pairs;
  for (int rope = 0; rope < layer.rope; rope++) rotation += stage_.ropes[rope].pairs;
  each_row(batch_.rows, [&](int i) {
    const int sequence = sequence_of(i), position = position_of(i);
    const size_t block = batch_.blocks[batch_.first_block[sequence] + position / kBlock];
    kernels().ready_heads(heads, row(buffers_.qkv, i, widths_.qkv), row(buffers_.cos, i, widths_.pairs_of_rope) + rotation,
                          row(buffers_.sin, i, widths_.pairs_of_rope) + rotation, stage_.kv_blocks,
                          layer.keys + block * stage_.head_dim * kBlock,
                          layer.values + block * round_up(stage_.head_dim, kTile) * kBlock, position % kBlock);
  });
}

void Step::attend(const SwarmdLayer &layer) {
  Attention task = {};
  task.qkv = buffers_.qkv;
  task.qkv_stride = widths_.qkv;
  task.out = buffers_.attended;
  task.out_stride = widths_.attended;
  task.heads = stage_.heads;
  task.kv_heads = stage_.kv_heads;
  task.head_dim = stage_.head_dim;
  task.scale = stage_.attention_scale;
  task.softcap = stage_.attention_softcap;
  task.window = layer.window;
  task.sinks = layer.sinks;
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

// Moves on to the sequence that a piece of attention belongs to; false behind the last one. Pieces only grow.
bool Step::find_piece(int piece, int &sequence, int &pieces_before) const {
  for (; sequence < batch_.sequences; sequence++) {
    const int pieces = (rows_of(sequence) + kQueryRows - 1) / kQueryRows * stage_.kv_heads;
    if (piece < pieces_before + pieces) return true;
    pieces_before += pieces;
  }
  return false;
}

}  // namespace swarmd
