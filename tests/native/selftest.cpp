// Runs every code path that this CPU has against the portable one, on random data, through the C interface: products of
// all forms, a whole layer over a paged KV cache, summaries of logits. For machines that tests in Python do not reach: an
// emulator of another architecture (`make neon`). Exit status 0 means that all agree and one path besides the portable one
// was there.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "swarmd_native.h"

namespace {

// Of the largest value. In a product both paths see the same int8 activations: what is left is rounding in another order.
// In a layer a key or value may be rounded to the next fp16.
constexpr double kOfProduct = 2e-6, kOfLayer = 2e-4;
constexpr int kBlocks = 6;  // of the KV cache
constexpr const char *kPaths[] = {"neon-dotprod", "avx512-vnni", "avx2"};

std::mt19937 generator(5);

template <typename T>
std::vector<T> integers(size_t count, int64_t least, int64_t most) {
  std::uniform_int_distribution<int64_t> draw(least, most);
  std::vector<T> out(count);
  for (T &value : out) value = static_cast<T>(draw(generator));
  return out;
}

std::vector<float> normals(size_t count) {
  std::normal_distribution<float> draw;
  std::vector<float> out(count);
  for (float &value : out) value = draw(generator);
  return out;
}

// fp16 of 2^-6 .. 2^-2, of either sign.
std::vector<uint16_t> halves(size_t count) {
  std::vector<uint16_t> out = integers<uint16_t>(count, 9 << 10, (13 << 10) - 1);
  for (uint16_t &half : out) half |= generator() & 1 ? 0x8000 : 0;
  return out;
}

// How a matrix is kept; a dense one has only a kind.
struct Form {
  const char *name;
  int kind, bits, group_size, scale_kind, bias_kind, per_super, offset;
  bool table;
};

constexpr int kImplied = -1;
constexpr Form kDense[] = {{"f32", SWARMD_F32, 0, 0, 0, 0, 0, 0, false},
                           {"f16", SWARMD_F16, 0, 0, 0, 0, 0, 0, false},
                           {"bf16", SWARMD_BF16, 0, 0, 0, 0, 0, 0, false}};
constexpr Form kQuantized[] = {{"Q4_0", SWARMD_QUANTIZED, 4, 32, SWARMD_F16, kImplied, 0, 8, false},
                               {"Q5_1", SWARMD_QUANTIZED, 5, 32, SWARMD_F16, SWARMD_F16, 0, 0, false},
                               {"Q8_0", SWARMD_QUANTIZED, 8, 32, SWARMD_F16, kImplied, 0, 128, false},
                               {"Q2_K", SWARMD_QUANTIZED, 2, 16, SWARMD_U8, SWARMD_U8, 16, 0, false},
                               {"Q3_K", SWARMD_QUANTIZED, 3, 16, SWARMD_I8, kImplied, 16, 4, false},
                               {"Q4_K", SWARMD_QUANTIZED, 4, 32, SWARMD_U8, SWARMD_U8, 8, 0, false},
                               {"Q6_K", SWARMD_QUANTIZED, 6, 16, SWARMD_I8, kImplied, 16, 32, false},
                               {"MXFP4", SWARMD_QUANTIZED, 4, 32, SWARMD_BF16, kImplied, 0, 12, true},
                               {"levels, halves", SWARMD_QUANTIZED, 4, 16, SWARMD_F32, SWARMD_BF16, 0, 0, true},
                               {"8 bits, halves", SWARMD_QUANTIZED, 8, 16, SWARMD_F32, SWARMD_I8, 4, 0, false},
                               {"2 bits of 64", SWARMD_QUANTIZED, 2, 64, SWARMD_BF16, SWARMD_BF16, 0, 0, false},
                               {"3 bits of 128", SWARMD_QUANTIZED, 3, 128, SWARMD_F16, SWARMD_F16, 0, 0, false},
                               {"6 bits of 64", SWARMD_QUANTIZED, 6, 64, SWARMD_F32, SWARMD_F32, 0, 0, false}};

// A random matrix of one form, and the memory that it points to.
class Weights {
 public:
  Weights(const Form &form, int rows, int columns) : segment_{} {
    segment_.kind = form.kind;
    segment_.rows = rows;
    segment_.columns = columns;
    const size_t tiles = (rows + SWARMD_TILE - 1) / SWARMD_TILE;
    if (form.kind == SWARMD_QUANTIZED) {
      segment_.bits = form.bits;
      segment_.group_size = form.group_size;
      segment_.offset = form.offset;
      segment_.table = form.table;
      const auto levels = integers<uint8_t>(16, 0, 255);
      std::memcpy(segment_.levels, levels.data(), levels.size());
      const auto q = integers<uint32_t>(static_cast<size_t>(rows) * columns * form.bits / 32, 0, UINT32_MAX);
      codes_.resize(tiles * columns / SWARMD_GROUP * form.bits * 64);
      swarmd_pack(form.bits, rows, columns, q.data(), codes_.data());
      const int groups = columns / form.group_size;
      segment_.scale = scales(form.scale_kind, rows, groups, form.per_super);
      if (form.bias_kind != kImplied) segment_.bias = scales(form.bias_kind, rows, groups, form.per_super);
    } else {
      codes_ = numbers(form.kind, rows, columns, 1 / std::sqrt(static_cast<float>(columns)));
    }
    segment_.codes = codes_.data();
    matrix = {rows, columns, 1, &segment_};
  }
  Weights(const Weights &) = delete;

  SwarmdMatrix matrix;

 private:
  // Random numbers of a kind in tiles.
  static std::vector<uint8_t> numbers(int kind, int rows, int columns, float size) {
    const int width = kind == SWARMD_F32 ? 4 : kind == SWARMD_F16 || kind == SWARMD_BF16 ? 2 : 1;
    const size_t count = static_cast<size_t>(rows) * columns;
    std::vector<uint8_t> values = integers<uint8_t>(count * width, 0, 255);
    if (kind == SWARMD_F16) {
      std::memcpy(values.data(), halves(count).data(), values.size());
    } else if (width > 1) {
      const auto floats = normals(count);
      for (size_t i = 0; i < count; i++) {
        const float value = floats[i] * size;
        uint32_t bits;
        std::memcpy(&bits, &value, 4);
        if (kind == SWARMD_BF16) bits >>= 16;
        std::memcpy(values.data() + i * width, &bits, width);
      }
    }
    std::vector<uint8_t> tiled((rows + SWARMD_TILE - 1) / SWARMD_TILE * SWARMD_TILE * static_cast<size_t>(columns) * width);
    swarmd_pack_numbers(width, rows, columns, values.data(), tiled.data());
    return tiled;
  }

  SwarmdScales scales(int kind, int rows, int groups, int per_super) {
    scales_.push_back(numbers(kind, rows, groups, 0.1f));
    SwarmdScales out = {kind, 0, scales_.back().data(), nullptr};
    if (kind != SWARMD_I8 && kind != SWARMD_U8) return out;
    out.per_super = per_super;
    scales_.push_back(numbers(SWARMD_F16, rows, groups / per_super, 1));
    out.supers = reinterpret_cast<const uint16_t *>(scales_.back().data());
    return out;
  }

  SwarmdSegment segment_;
  std::vector<uint8_t> codes_;
  std::vector<std::vector<uint8_t>> scales_;
};

bool agree(const std::string &what, double tolerance, const std::vector<float> &found, const std::vector<float> &expected) {
  double largest = 0, worst = 0;
  for (size_t i = 0; i < expected.size(); i++) {
    largest = std::fmax(largest, std::fabs(expected[i]));
    const double error = std::fabs(static_cast<double>(found[i]) - expected[i]);
    worst = error <= worst ? worst : error;  // what is not a number counts as the worst
  }
  const bool right = worst <= tolerance * largest && largest > 0;
  std::printf("%-6s %s: off by %.1e of %.1e\n", right ? "ok" : "WRONG", what.c_str(), worst, largest);
  return right;
}

std::vector<float> product(const char *path, SwarmdPool *pool, const Weights &weights, const std::vector<float> &x, int rows) {
  swarmd_select(path);
  std::vector<float> y(static_cast<size_t>(rows) * weights.matrix.rows);
  std::vector<char> workspace(swarmd_linear_workspace(&weights.matrix, rows) + 64);
  swarmd_linear(pool, &weights.matrix, x.data(), rows, y.data(), workspace.data());
  return y;
}

bool check_form(const char *path, SwarmdPool *pool, const Form &form) {
  constexpr int kRows = 45, kOutputs = 83, kColumns = 256;
  const auto x = normals(kRows * kColumns);
  const Weights weights(form, kOutputs, kColumns);
  const std::string what = std::string(path) + " " + form.name;
  const auto all = product(path, pool, weights, x, kRows);
  bool right = agree(what, kOfProduct, all, product("portable", pool, weights, x, kRows));
  for (int rows : {1, 2, 3, 7, 8, 19}) {
    const auto some = product(path, pool, weights, x, rows);
    if (std::memcmp(some.data(), all.data(), some.size() * sizeof(float)) != 0) {
      std::printf("WRONG  %s: %d rows alone differ\n", what.c_str(), rows);
      right = false;
    }
  }
  return right;
}

bool check_products(const char *path, SwarmdPool *pool) {
  bool right = true;
  for (const Form &form : kDense) right &= check_form(path, pool, form);
  for (const Form &form : kQuantized) right &= check_form(path, pool, form);
  return right;
}

// One layer, two sequences: prompts, then both go on by some tokens, then by one each. The hidden states of all steps.
std::vector<float> run_layer(const char *path, SwarmdPool *pool, SwarmdStage stage, const std::vector<float> &x) {
  swarmd_select(path);
  const size_t padded = (stage.head_dim + 15) / 16 * 16;
  SwarmdLayer layer = stage.layers[0];
  std::vector<uint16_t> keys(static_cast<size_t>(kBlocks) * stage.kv_heads * stage.head_dim * SWARMD_BLOCK, 0x7e00);
  std::vector<uint16_t> values(kBlocks * stage.kv_heads * padded * SWARMD_BLOCK, 0x7e00);
  layer.keys = keys.data();
  layer.values = values.data();
  stage.layers = &layer;
  const int32_t first_block[] = {0, 3, 6}, blocks[] = {4, 0, 2, 5, 1, 3};
  const int32_t first_rows[][3] = {{0, 29, 40}, {0, 1, 6}, {0, 1, 2}}, starts[][2] = {{0, 0}, {29, 11}, {30, 16}};
  std::vector<float> out;
  for (int step = 0, first = 0; step < 3; first += first_rows[step++][2]) {
    const int rows = first_rows[step][2];
    std::vector<float> result(static_cast<size_t>(rows) * stage.hidden);
    SwarmdBatch batch = {};
    batch.rows = rows;
    batch.sequences = 2;
    batch.first_row = first_rows[step];
    batch.start = starts[step];
    batch.first_block = first_block;
    batch.blocks = blocks;
    batch.hidden = x.data() + first * stage.hidden;
    batch.wire = SWARMD_WIRE_F32;
    batch.out = result.data();
    std::vector<char> workspace(swarmd_workspace(pool, &stage, rows, 0, 48) + 64);
    swarmd_step(pool, &stage, &batch, workspace.data(), 48);
    out.insert(out.end(), result.begin(), result.end());
  }
  return out;
}

// What a layer has beyond Llama's.
struct Features {
  const char *name;
  int qk_norm, activation, window, pairs;  // pairs 0: half a head
  float softcap;
  bool vectors;  // biases, sinks and norms after the blocks
  bool experts;
};

constexpr Features kFeatures[] = {
    {"layer", SWARMD_QK_NORM_NONE, SWARMD_SILU, 0, 0, 0, false, false},
    {"layer with a window", SWARMD_QK_NORM_HEAD, SWARMD_GELU_TANH, 7, 0, 20, true, false},
    {"layer with experts", SWARMD_QK_NORM_FULL, SWARMD_CLAMPED_SWIGLU, 19, 3, 0, true, true},
};

bool check_layer(const char *path, SwarmdPool *pool, int head_dim, const Form &form, const Features &features) {
  constexpr int kHeads = 6, kKvHeads = 2, kHidden = 96, kFfn = 160, kExperts = 5;
  const int attended = kHeads * head_dim, qkv_rows = attended + 2 * kKvHeads * head_dim;
  const Weights qkv(form, qkv_rows, kHidden), output(form, kHidden, attended), gate_up(form, 2 * kFfn, kHidden),
      down(form, kHidden, kFfn), router(form, kExperts, kHidden), shared_gate(form, 1, kHidden);
  const auto vector = normals(std::max(2 * kFfn, qkv_rows));
  const float *some = features.vectors ? vector.data() : nullptr;
  const auto frequencies = normals(head_dim / 2);
  const SwarmdMlp mlp = {{gate_up.matrix, some}, {down.matrix, some}};
  const SwarmdMlp experts[kExperts] = {mlp, mlp, mlp, mlp, mlp};
  const SwarmdMixture mixture = {{router.matrix, some}, some, experts, &mlp, &shared_gate.matrix};
  const SwarmdRope rope = {frequencies.data(), features.pairs ? features.pairs : head_dim / 2, 1.25f};
  SwarmdLayer layer = {};
  layer.attention_norm = layer.q_norm = layer.k_norm = layer.mlp_norm = vector.data();
  layer.sinks = layer.attention_post_norm = layer.mlp_post_norm = some;
  layer.qkv = {qkv.matrix, some};
  layer.attention_output = {output.matrix, some};
  layer.mlp = mlp;
  layer.mixture = features.experts ? &mixture : nullptr;
  layer.window = features.window;
  SwarmdStage stage = {};
  stage.n_layers = stage.n_ropes = 1;
  stage.hidden = kHidden;
  stage.heads = kHeads;
  stage.kv_heads = kKvHeads;
  stage.head_dim = head_dim;
  stage.ffn = kFfn;
  stage.kv_blocks = kBlocks;
  stage.qk_norm = features.qk_norm;
  stage.activation = features.activation;
  stage.eps = 1e-5f;
  stage.attention_scale = 1.0f / std::sqrt(static_cast<float>(head_dim));
  stage.attention_softcap = features.softcap;
  stage.embedding_multiplier = stage.residual_multiplier = stage.logit_multiplier = 1.0f;
  if (features.experts) stage.routing = {kExperts, 3, kFfn, 1, 1, 1, 1, 1.5f};
  stage.ropes = &rope;
  stage.layers = &layer;
  const auto x = normals(48 * kHidden);
  return agree(std::string(path) + ' ' + features.name + ", heads of " + std::to_string(head_dim), kOfLayer,
               run_layer(path, pool, stage, x), run_layer("portable", pool, stage, x));
}

bool check_summary(const char *path) {
  constexpr int kVocab = 5003;
  auto logits = normals(kVocab);
  logits[4999] = logits[77] = 9.0f;
  std::vector<float> results[2];
  for (int i = 0; i < 2; i++) {
    swarmd_select(i ? "portable" : path);
    SwarmdSummary summary;
    swarmd_summarize(logits.data(), 1, kVocab, &summary);
    results[i] = {static_cast<float>(summary.best), summary.largest, static_cast<float>(summary.log_normalizer)};
  }
  return agree(std::string(path) + " summary", kOfProduct, results[0], results[1]) && results[0][0] == 77;
}

}  // namespace

int main() {
  SwarmdPool *pool = swarmd_pool_new(3);
  bool right = true, any = false;
  for (const char *path : kPaths) {
    if (swarmd_select(path) != 0) continue;
    any = true;
    right &= check_products(path, pool);
    // Dense: a layer of them has no jumps, which a code of the activations makes when its last bit flips.
    for (const Features &features : kFeatures)
      for (int head_dim : {6, 16, 40, 64}) right &= check_layer(path, pool, head_dim, kDense[0], features);
    right &= check_summary(path);
  }
  swarmd_pool_free(pool);
  if (!any) std::printf("this CPU has no other path than the portable one\n");
  return right && any ? 0 : 1;
}
