// What one instruction set offers to a step. Each isa_*.cpp compiles the same templates for its own instructions.
#pragma once

#include "swarmd_native.h"

// For what a product does for each group: a call would take its vectors through memory.
#define SWARMD_INLINE inline __attribute__((always_inline))

namespace swarmd {

constexpr int kTile = SWARMD_TILE;
constexpr int kGroup = SWARMD_GROUP;
constexpr int kHalf = kGroup / 2;
constexpr int kBlock = SWARMD_BLOCK;

// Rows of activations, as a product reads them. `values` [rows, columns] is there when a segment is dense; the others
// when one is quantized, group by group: x = scale * code + fine_scale * fine_code. Only groups that stand out have fine
// codes; in the others fine_scale is 0 and the fine codes are undefined. `sum` is that of the group's x as quantized,
// `half_sums` those of its two halves: weights may change their scale and bias in between.
struct Activations {
  int rows, columns;
  float *values;
  int8_t *codes, *fine_codes;  // [rows, columns]
  float *scale, *fine_scale, *sum;  // [rows, groups]
  float *half_sums;  // [rows, groups, 2]
  int groups() const { return columns / kGroup; }
};

// Rows [first, first + count) of activations.
inline Activations some_rows(Activations x, int first, int count) {
  static_assert(sizeof(Activations) == 2 * sizeof(int) + 7 * sizeof(void *), "a new array must be moved on here as well");
  const size_t values = static_cast<size_t>(first) * x.columns, groups = static_cast<size_t>(first) * x.groups();
  x.rows = count;
  x.values += values;
  x.scale += groups;
  x.fine_scale += groups;
  x.sum += groups;
  x.half_sums += 2 * groups;
  x.fine_codes += values;
  if (x.codes) x.codes += values;
  return x;
}

// Where a product goes: y[row * stride + output], added to what is there or stored.
struct Target {
  float *y;
  size_t stride;
  bool add;
};

// Which heads a layer has, and what becomes of a row's queries and keys before they meet.
struct Heads {
  int heads, kv_heads, head_dim;
  int qk_norm;  // SwarmdQkNorm
  float eps;
  const float *bias, *q_norm, *k_norm;  // of qkv, or null; the norms' weights
  int pairs;                            // rotated ones
};

// Queries [first, last) of one sequence's rows on one KV head. `qkv` is [rows, (heads + 2 * kv_heads) * head_dim].
struct Attention {
  const float *qkv;
  size_t qkv_stride;
  float *out;
  size_t out_stride;
  int first_row, first, last;  // rows of the sequence begin at first_row; the queries are first_row + [first, last)
  int start;                   // position of the sequence's first row
  int heads, kv_heads, head_dim, kv_head;
  float scale, softcap;  // scores are softcap(q k * scale); a cap of 0 is none
  int window;            // positions that a query sees, itself included; 0: all
  const float *sinks;    // [heads], or null
  const uint16_t *keys, *values;  // the KV head's pools
  const int32_t *blocks;
  float *scores, *queries;  // scratch: [kMostQueries, scores_stride], [kMostQueries, head_dim]
  size_t scores_stride;
};

constexpr int kMostQueries = 8;

struct Kernels {
  const char *name;
  // Row `row` of the activations: `x` normed by `weight`; or, when that is null, only quantized from what stands there.
  void (*prepare)(const float *x, const float *weight, float eps, const Activations &out, int row);
  // The activation (SwarmdActivation) of one row [2 * columns], plus `bias` unless null, into row `row` of the activations.
  void (*gate)(const float *gate_up, const float *bias, int activation, const Activations &out, int row);
  // x += factor * (y + bias), normed by `norm`; both may be null. `y` may be overwritten.
  void (*add)(float *x, float *y, const float *bias, const float *norm, float eps, float factor, int n);
  // x = softcap(x * factor); a cap of 0 is none.
  void (*scale)(float *x, float factor, float cap, int n);
  // The outputs of tiles [begin, end) of a segment for all rows of the activations; `y` begins at the segment's rows.
  void (*product)(const SwarmdSegment &segment, int begin, int end, const Activations &x, const Target &target);
  // Adds the bias to one row of qkv, norms and rotates its queries and keys in place, and stores its keys and values at
  // `offset` of a block. `keys` and `values` are the first head's; the other heads' blocks lie kv_blocks further on.
  void (*ready_heads)(const Heads &heads, float *qkv, const float *cos, const float *sin, size_t kv_blocks, uint16_t *keys,
                      uint16_t *values, int offset);
  void (*attend)(const Attention &task);
  void (*rows)(const SwarmdSegment &segment, int row, float *out);
  void (*to_wire)(const float *x, size_t count, uint16_t *bf16);
  void (*from_wire)(const uint16_t *bf16, size_t count, float *x);
  SwarmdSummary (*summarize)(const float *logits, int vocab);
};

// Null when it was not compiled in or the CPU lacks it.
const Kernels *kernels_avx512();
const Kernels *kernels_avx2();
const Kernels *kernels_neon();
const Kernels *kernels_portable();

// The best of them, or what was selected.
const Kernels &kernels();

inline int round_up(int value, int multiple) { return (value + multiple - 1) / multiple * multiple; }
inline int tiles_of(const SwarmdSegment &segment) { return (segment.rows + kTile - 1) / kTile; }

// Bytes of one number of a kind.
constexpr int width_of(int kind) { return kind == SWARMD_F32 ? 4 : kind == SWARMD_F16 || kind == SWARMD_BF16 ? 2 : 1; }

inline float half_to_float(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000) << 16;
  const uint32_t exponent = (half >> 10) & 31, fraction = half & 1023;
  union {
    uint32_t bits;
    float value;
  } out;
  if (exponent == 0) {
    out.value = static_cast<float>(fraction) * 0x1p-24f;  // zero and the subnormals
    out.bits |= sign;
  } else {
    out.bits = sign | (exponent == 31 ? 0x7f800000u : (exponent + 112) << 23) | fraction << 13;
  }
  return out.value;
}

// To nearest, ties to even; beyond the largest fp16 it saturates, because one infinite key would spoil a whole sequence.
inline uint16_t float_to_half(float value) {
  union {
    float value;
    uint32_t bits;
  } in = {value};
  const uint16_t sign = static_cast<uint16_t>((in.bits >> 16) & 0x8000);
  in.bits &= 0x7fffffff;
  if (in.bits > 0x7f800000) return sign | 0x7e00;  // not a number
  if (in.value >= 65504.0f) return sign | 0x7bff;
  if (in.value < 0x1p-14f) {  // subnormal: adding 0.5 leaves the rounded fraction in the low bits
    in.value += 0.5f;
    return sign | static_cast<uint16_t>(in.bits - 0x3f000000);
  }
  const uint32_t odd = (in.bits >> 13) & 1;
  in.bits += 0xfff + odd - (112u << 23);
  return sign | static_cast<uint16_t>(in.bits >> 13);
}

inline float bf16_to_float(uint16_t bits) {
  union {
    uint32_t bits;
    float value;
  } out = {static_cast<uint32_t>(bits) << 16};
  return out.value;
}

}  // namespace swarmd
