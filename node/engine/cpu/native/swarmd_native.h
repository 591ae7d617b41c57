/* The native engine's C interface: everything that Python calls, by ctypes (node/engine/cpu/bindings.py mirrors it).
 *
 * Matrices are [rows, columns] and multiply activations from the right: y = x * W^T. Rows are packed in tiles of
 * SWARMD_TILE, so that one vector lane belongs to one row; the last tile is filled up with zeros. Nothing here
 * allocates, except for the thread pool; all sizes were checked by the caller.
 */
#pragma once

#include <stddef.h>
#include <stdint.h>

#define SWARMD_ABI 5
#define SWARMD_TILE 16  /* rows of a matrix that are packed together */
#define SWARMD_GROUP 32 /* columns whose codes are packed together; activations share a scale */
#define SWARMD_BLOCK 16 /* tokens in one block of the KV cache */

#if defined(_WIN32)
#define SWARMD_API extern "C" __declspec(dllexport)
#else
#define SWARMD_API extern "C" __attribute__((visibility("default")))
#endif

/* What numbers are; the last two only below a super-scale. */
enum SwarmdKind {
  SWARMD_F32 = 0,
  SWARMD_F16 = 1,
  SWARMD_BF16 = 2,
  SWARMD_QUANTIZED = 3,
  SWARMD_I8 = 4,
  SWARMD_U8 = 5
};
enum SwarmdWire { SWARMD_WIRE_F32 = 0, SWARMD_WIRE_BF16 = 1 };

/* The scales or the biases of a segment: `values` [tile, group, 16] of `kind`, not quantized. With I8 or U8 each is to be
 * multiplied by its super-scale, of which `per_super` groups share one: `supers` fp16 [tile, group / per_super, 16]. */
struct SwarmdScales {
  int32_t kind, per_super;
  const uint8_t *values;
  const uint16_t *supers;
};

/* Some rows of a matrix in one form. Dense: `codes` holds the values [tile, column, 16]. Quantized:
 * w = level * scale + bias per `group_size` (16, 32, 64, 128) columns, of which there are a multiple of 32; `codes`
 * holds bits * 64 bytes per tile and 32 columns (pack.cpp draws the layout). The level is the code or, with `table` (of
 * 4 bits), levels[code]. Without `bias.values`, bias = -offset * scale. */
struct SwarmdSegment {
  int32_t kind, bits, rows, columns, group_size, offset, table;
  uint8_t levels[16];
  const uint8_t *codes;
  SwarmdScales scale, bias;
};

/* Segments stacked along the rows, all of the same columns. */
struct SwarmdMatrix {
  int32_t rows, columns, count;
  const SwarmdSegment *segments;
};

/* A matrix and what is added to its products: `bias` [rows], or NULL. */
struct SwarmdLinear {
  SwarmdMatrix matrix;
  const float *bias;
};

/* A gated MLP: `gate_up` is gate stacked on up, each of down's columns. */
struct SwarmdMlp {
  SwarmdLinear gate_up, down;
};

/* A mixture of experts, all of one size; which run is said by SwarmdRouting. `selection_bias` [experts], `shared` (an
 * expert that always runs) and `shared_gate` [1, hidden] (weighs it by a sigmoid) may be NULL. */
struct SwarmdMixture {
  SwarmdLinear router;
  const float *selection_bias;
  const SwarmdMlp *experts, *shared;
  const SwarmdMatrix *shared_gate;
};

/* One decoder layer with its KV pools, fp16: keys [kv head, block, head_dim, 16], values [kv head, block, 16,
 * head_dim rounded up to 16]. A sequence's blocks mostly follow each other, so attention reads a head's straight on.
 * Norm weights are NULL where the layer has none; `sinks` [heads] likewise. `mixture` is NULL, or there instead of `mlp`.
 * `window`: positions that a query sees, itself included, 0 for all; `rope`: which of the stage's, -1 for none. */
struct SwarmdLayer {
  const float *attention_norm, *q_norm, *k_norm, *sinks, *attention_post_norm;
  SwarmdLinear qkv, attention_output;
  const float *mlp_norm, *mlp_post_norm;
  SwarmdMlp mlp;
  const SwarmdMixture *mixture;
  uint16_t *keys, *values;
  int32_t window, rope;
};

enum SwarmdQkNorm { SWARMD_QK_NORM_NONE = 0, SWARMD_QK_NORM_HEAD = 1, SWARMD_QK_NORM_FULL = 2 };
enum SwarmdActivation { SWARMD_SILU = 0, SWARMD_GELU_TANH = 1, SWARMD_CLAMPED_SWIGLU = 2 };

/* A rotary embedding of the first 2 * pairs dimensions of a head: radians per position [pairs], and a factor of cos, sin. */
struct SwarmdRope {
  const float *frequencies;
  int32_t pairs;
  float magnitude;
};

/* How experts are chosen and weighed (MoeSpec in node/engine/spec.py). top_k <= experts, top_groups <= groups, and groups
 * divide experts. `ffn` is the experts' width; experts == 0: no layer has any. */
struct SwarmdRouting {
  int32_t experts, top_k, ffn, sigmoid, normalize, groups, top_groups;
  float scale;
};

/* A stage, whose KV pools have `kv_blocks` blocks; `embedding` is there on the first one only, `output_norm` and `head` on
 * the last one only. `ffn` is the widest MLP beside the experts. Soft caps of 0 are none. */
struct SwarmdStage {
  int32_t n_layers, hidden, heads, kv_heads, head_dim, ffn, kv_blocks;
  int32_t qk_norm, activation, n_ropes;
  float eps, attention_scale, attention_softcap, logit_softcap;
  float embedding_multiplier, residual_multiplier, logit_multiplier;
  SwarmdRouting routing;
  const SwarmdRope *ropes;
  const SwarmdLayer *layers;
  const SwarmdMatrix *embedding;
  const float *output_norm;
  const SwarmdMatrix *head;
};

/* One step: rows [first_row[s], first_row[s+1]) belong to sequence s and stand at positions start[s], start[s]+1, ...;
 * its KV blocks are blocks[first_block[s]], blocks[first_block[s] + 1], ... The input is `tokens` [rows] on the first
 * stage, else `hidden` [rows, hidden] in `wire`'s type. The result is `out` [rows, hidden] likewise, or on the last stage
 * `logits` [wanted, vocab] of the rows in `wanted_rows`. */
struct SwarmdBatch {
  int32_t rows, sequences;
  const int32_t *first_row, *start, *first_block, *blocks;
  const int32_t *tokens;
  const void *hidden;
  int32_t wire;
  void *out;
  int32_t wanted;
  const int32_t *wanted_rows;
  float *logits;
};

/* What sampling needs of one row of logits: whether all are finite, the first largest, and ln(sum(exp(logits))). */
struct SwarmdSummary {
  int32_t finite, best;
  float largest;
  double log_normalizer;
};

struct SwarmdPool;

SWARMD_API int32_t swarmd_abi(void);

/* The code path in use: "avx512-vnni", "avx2", "neon-dotprod" or "portable". */
SWARMD_API const char *swarmd_isa(void);

/* Use another path from now on (for tests and measurements). Returns 0, or -1 when this CPU or build lacks it. */
SWARMD_API int32_t swarmd_select(const char *isa);

/* `threads` counts the calling one. Jobs of a pool run one at a time. */
SWARMD_API SwarmdPool *swarmd_pool_new(int32_t threads);
SWARMD_API void swarmd_pool_free(SwarmdPool *pool);

/* Canonical codes (LSB-first u32 [rows, columns*bits/32]) into a segment's `codes`; and numbers [rows, columns] of `width`
 * bytes each, 1, 2 or 4, into [tile, column, 16]: dense values, scales, super-scales. */
SWARMD_API void swarmd_pack(int32_t bits, int32_t rows, int32_t columns, const uint32_t *q, uint8_t *codes);
SWARMD_API void swarmd_pack_numbers(int32_t width, int32_t rows, int32_t columns, const uint8_t *values, uint8_t *out);

/* Rows `ids` of a matrix as fp32 [count, columns]. */
SWARMD_API void swarmd_rows(const SwarmdMatrix *matrix, const int32_t *ids, int32_t count, float *out);

/* y [rows, matrix rows] = x [rows, columns] * W^T, for tests and measurements; `workspace` as for one step. */
SWARMD_API void swarmd_linear(SwarmdPool *pool, const SwarmdMatrix *matrix, const float *x, int32_t rows, float *y,
                              void *workspace);
SWARMD_API size_t swarmd_linear_workspace(const SwarmdMatrix *matrix, int32_t rows);

/* Bytes that `swarmd_step` needs for steps of at most `rows` rows, `wanted` of them to be sampled, whose sequences end
 * at most at position `context`. */
SWARMD_API size_t swarmd_workspace(const SwarmdPool *pool, const SwarmdStage *stage, int32_t rows, int32_t wanted,
                                   int32_t context);
SWARMD_API void swarmd_step(SwarmdPool *pool, const SwarmdStage *stage, const SwarmdBatch *batch, void *workspace,
                            int32_t context);

SWARMD_API void swarmd_summarize(const float *logits, int32_t rows, int32_t vocab, SwarmdSummary *summaries);
