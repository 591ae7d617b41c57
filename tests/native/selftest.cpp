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

// A random matrix of one form, and the memory that it points to.
class Weights {
 public:
  Weights(int kind, int bits, bool biased, int rows, int columns) : segment_{kind, bits, rows, columns, nullptr, nullptr, 0} {
    const size_t tiles = (rows + SWARMD_TILE - 1) / SWARMD_TILE;
    if (kind == SWARMD_QUANTIZED) {
      const size_t groups = columns / SWARMD_GROUP;
      const auto q = integers<uint32_t>(static_cast<size_t>(rows) * columns * bits / 32, 0, UINT32_MAX);
      const auto scale = halves(rows * groups), bias = halves(rows * groups);
      codes_.resize(tiles * groups * bits * 64);
      scales_.resize(tiles * groups * SWARMD_TILE * (biased ? 2 : 1));
      swarmd_pack(bits, rows, columns, q.data(), scale.data(), biased ? bias.data() : nullptr, codes_.data(), scales_.data());
    } else {
      const int width = kind == SWARMD_F32 ? 4 : 2;
      const size_t count = static_cast<size_t>(rows) * columns;
      std::vector<uint8_t> values(count * width);
      if (kind == SWARMD_F16) {
        std::memcpy(values.data(), halves(count).data(), values.size());
      } else {
        auto floats = normals(count);
        for (size_t i = 0; i < count; i++) {
          floats[i] /= std::sqrt(static_cast<float>(columns));
          uint32_t bits_of_value;
          std::memcpy(&bits_of_value, &floats[i], 4);
          if (kind == SWARMD_BF16) bits_of_value >>= 16;
          std::memcpy(values.data() + i * width, &bits_of_value, width);
        }
      }
      codes_.resize(tiles * SWARMD_TILE * columns * width);
      swarmd_pack_dense(width, rows, columns, values.data(), codes_.data());
    }
    segment_.codes = codes_.data();
    segment_.scales = scales_.data();
    segment_.biased = biased;
    matrix = {rows, columns, 1, &segment_};
  }
  Weights(const Weights &) = delete;

  SwarmdMatrix matrix;

 private:
  SwarmdSegment segment_;
  std::vector<uint8_t> codes_;
  std::vector<uint16_t> scales_;
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

bool check_products(const char *path, SwarmdPool *pool) {
  bool right = true;
  constexpr int kRows = 45, kOutputs = 83, kColumns = 192;
  const auto x = normals(kRows * kColumns);
  for (int form : {2, 3, 4, 5, 6, 8, -SWARMD_F32, -SWARMD_F16, -SWARMD_BF16}) {
    const bool quantized = form > 0;
    const Weights weights(quantized ? SWARMD_QUANTIZED : -form, quantized ? form : 0, form % 2 == 0 && quantized, kOutputs,
                          kColumns);
    const std::string what = std::string(path) + (quantized ? " bits " : " dense ") + std::to_string(std::abs(form));
    const auto all = product(path, pool, weights, x, kRows);
    right &= agree(what, kOfProduct, all, product("portable", pool, weights, x, kRows));
    for (int rows : {1, 2, 3, 7, 8, 19}) {
      const auto some = product(path, pool, weights, x, rows);
      if (std::memcmp(some.data(), all.data(), some.size() * sizeof(float)) != 0) {
        std::printf("WRONG  %s: %d rows alone differ\n", what.c_str(), rows);
        right = false;
      }
    }
  }
  return right;
}

// One layer, two sequences: prompts, then both go on by some tokens, then by one each. The hidden states of all steps.
constexpr int kBlocks = 6;

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

bool check_layer(const char *path, SwarmdPool *pool, int head_dim, int kind, const Features &features) {
  constexpr int kHeads = 6, kKvHeads = 2, kHidden = 96, kFfn = 160, kExperts = 5;
  const int attended = kHeads * head_dim, bits = kind == SWARMD_QUANTIZED ? 4 : 0;
  const int qkv_rows = attended + 2 * kKvHeads * head_dim;
  const Weights qkv(kind, bits, true, qkv_rows, kHidden), output(kind, bits, true, kHidden, attended),
      gate_up(kind, bits, true, 2 * kFfn, kHidden), down(kind, bits, true, kHidden, kFfn),
      router(kind, bits, true, kExperts, kHidden), shared_gate(kind, bits, true, 1, kHidden);
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
      for (int head_dim : {6, 16, 40, 64}) right &= check_layer(path, pool, head_dim, SWARMD_F32, features);
    right &= check_summary(path);
  }
  swarmd_pool_free(pool);
  if (!any) std::printf("this CPU has no other path than the portable one\n");
  return right && any ? 0 : 1;
}
