// Rotary embedding, the KV cache, and attention over it.

// Rotate-half (Su et al. 2021, arXiv:2104.09864): element i of a head is paired with element i + half; what lies behind
// 2 * half stays.
static inline void rotate(float *head, int half, const float *cos, const float *sin) {
  const int whole = half / kLanes * kLanes;
  for (int i = 0; i < whole; i += kLanes) {
    const Floats a = load(head + i), b = load(head + half + i), c = load(cos + i), s = load(sin + i);
    store(head + i, sub(mul(a, c), mul(b, s)));
    store(head + half + i, add(mul(b, c), mul(a, s)));
  }
  for (int i = whole; i < half; i++) {
    const float a = head[i], b = head[half + i];
    head[i] = a * cos[i] - b * sin[i];
    head[half + i] = b * cos[i] + a * sin[i];
  }
}

// RMS norm of `count` heads, each by itself or all together.
static inline void norm_heads(float *x, int count, const float *weight, const Heads &h) {
  const bool full = h.qk_norm == SWARMD_QK_NORM_FULL;
  const int n = full ? count * h.head_dim : h.head_dim;
  for (int i = 0; i < (full ? 1 : count); i++) weigh(x + i * n, norm_factor(x + i * n, n, h.eps), weight, n, x + i * n);
}

// Column `offset` of a block of keys [head_dim, 16], and row `offset` of a block of values [16, padded].
static void ready_heads(const Heads &h, float *qkv, const float *cos, const float *sin, size_t kv_blocks, uint16_t *keys,
                        uint16_t *values, int offset) {
  const int head_dim = h.head_dim, padded = round_up(head_dim, kTile);
  float *k = qkv + h.heads * head_dim, *v = k + h.kv_heads * head_dim;
  if (h.bias) add_vector(qkv, h.bias, (h.heads + 2 * h.kv_heads) * head_dim);
  if (h.qk_norm != SWARMD_QK_NORM_NONE) {
    norm_heads(qkv, h.heads, h.q_norm, h);
    norm_heads(k, h.kv_heads, h.k_norm, h);
  }
  if (h.pairs)
    for (int head = 0; head < h.heads + h.kv_heads; head++) rotate(qkv + head * head_dim, h.pairs, cos, sin);
  for (int head = 0; head < h.kv_heads; head++) {
    for (int d = 0; d < head_dim; d++) keys[d * kBlock + offset] = float_to_half(k[head * head_dim + d]);
    for (int d = 0; d < padded; d++)
      values[offset * padded + d] = d < head_dim ? float_to_half(v[head * head_dim + d]) : 0;
    keys += kv_blocks * head_dim * kBlock;
    values += kv_blocks * padded * kBlock;
  }
}

// Blocks lie anywhere in the pool, so the processor does not guess the next one: it is asked for in time, line by line.
constexpr int kAhead = 4;  // blocks
static inline void fetch(const void *line) { __builtin_prefetch(line); }

// Scores of N queries with the keys of whole blocks, from key `from` to key `n`: s = q k, the queries being scaled already.
template <int N>
static inline void scores(const Attention &t, int from, int n) {
  const size_t block_size = static_cast<size_t>(t.head_dim) * kBlock;
  for (int begin = from; begin < n; begin += kBlock) {
    const int block = begin / kBlock, next = begin + kAhead * kBlock < n ? block + kAhead : block;
    const uint16_t *keys = t.keys + t.blocks[block] * block_size;
    const uint16_t *next_keys = t.keys + t.blocks[next] * block_size;
    for (int part = 0; part < kBlock; part += kLanes) {
      Floats s[N];
      for (int i = 0; i < N; i++) s[i] = zero();
      for (int d = 0; d < t.head_dim; d++) {
        if (part == 0) fetch(next_keys + d * kBlock);
        const Floats k = load_half(keys + d * kBlock + part);
        for (int i = 0; i < N; i++) s[i] = fma(k, set1(t.queries[i * t.head_dim + d]), s[i]);
      }
      for (int i = 0; i < N; i++) store(t.scores + i * t.scores_stride + begin + part, s[i]);
    }
  }
}

// Which of a row of scores, [begin, stop) in whole blocks, a query sees: [from, seen). And what else goes into its softmax:
// the logit of a sink, which gives nothing, or -infinity.
struct View {
  int begin, from, seen, stop;
  float sink;
};

// Turns the scores that are seen into e^(s - largest), the others into 0; the sum.
static inline float soften(float *scores, const View &view, float cap) {
  if (cap > 0)
    for (int i = view.begin; i < view.stop; i += kLanes) store(scores + i, soft_capped(load(scores + i), cap));
  for (int i = view.begin; i < view.from; i++) scores[i] = -__builtin_inff();
  for (int i = view.seen; i < view.stop; i++) scores[i] = -__builtin_inff();
  Floats peak = set1(view.sink);
  for (int i = view.begin; i < view.stop; i += kLanes) peak = max(peak, load(scores + i));
  const float top = largest_of(peak);
  const Floats largest = set1(top);
  Floats total = zero();
  for (int i = view.begin; i < view.stop; i += kLanes) {
    const Floats p = exponential(sub(load(scores + i), largest));
    store(scores + i, p);
    total = add(total, p);
  }
  return sum_of(total) + __builtin_expf(view.sink - top);
}

// Two vectors of the outputs, from dimension `d` on: sum over the keys from `from` to `n` of p v. Keys
// that a query may not see have p = 0.
template <int N>
static inline void mix(const Attention &t, int from, int n, int d, Floats (*out)[2]) {
  const int padded = round_up(t.head_dim, kTile);
  const size_t block_size = static_cast<size_t>(padded) * kBlock;
  for (int i = 0; i < N; i++) out[i][0] = out[i][1] = zero();
  for (int begin = from; begin < n; begin += kBlock) {
    const int block = begin / kBlock, next = begin + kAhead * kBlock < n ? block + kAhead : block;
    const uint16_t *values = t.values + t.blocks[block] * block_size + d;
    const uint16_t *next_values = t.values + t.blocks[next] * block_size + d;
    const int count = n - begin < kBlock ? n - begin : kBlock;
    for (int key = 0; key < count; key++) {
      fetch(next_values + key * padded);
      const Floats v0 = load_half(values + key * padded);
      const Floats v1 = d + kLanes < padded ? load_half(values + key * padded + kLanes) : zero();
      for (int i = 0; i < N; i++) {
        const Floats p = set1(t.scores[i * t.scores_stride + begin + key]);
        out[i][0] = fma(p, v0, out[i][0]);
        out[i][1] = fma(p, v1, out[i][1]);
      }
    }
  }
}

// N queries: number `index` of a task is head index % group of row index / group.
template <int N>
static inline void attend_some(const Attention &t, int index) {
  const int group = t.heads / t.kv_heads, head_dim = t.head_dim;
  View view[N];
  int most = 0, least = t.start + t.last;
  float *to[N], inverse[N];
  for (int i = 0; i < N; i++) {
    const int row = t.first + (index + i) / group, head = t.kv_head * group + (index + i) % group;
    const float *q = t.qkv + (t.first_row + row) * t.qkv_stride + head * head_dim;
    for (int d = 0; d < head_dim; d++) t.queries[i * head_dim + d] = q[d] * t.scale;
    to[i] = t.out + (t.first_row + row) * t.out_stride + head * head_dim;
    const int seen = t.start + row + 1, from = t.window && seen > t.window ? seen - t.window : 0;
    view[i] = {0, from, seen, 0, t.sinks ? t.sinks[head] : -__builtin_inff()};
    most = seen > most ? seen : most;
    least = from < least ? from : least;
  }
  const int begin = least / kBlock * kBlock;
  scores<N>(t, begin, most);
  for (int i = 0; i < N; i++) {
    view[i].begin = begin;
    view[i].stop = round_up(most, kBlock);
    inverse[i] = 1.0f / soften(t.scores + i * t.scores_stride, view[i], t.softcap);
  }
  for (int d = 0; d < head_dim; d += 2 * kLanes) {
    Floats mixed[N][2];
    mix<N>(t, begin, most, d, mixed);
    for (int i = 0; i < N; i++) {
      put(mul(mixed[i][0], set1(inverse[i])), to[i] + d, head_dim - d, false);
      if (d + kLanes < head_dim) put(mul(mixed[i][1], set1(inverse[i])), to[i] + d + kLanes, head_dim - d - kLanes, false);
    }
  }
}

static void attend(const Attention &task) {
  const int count = (task.last - task.first) * (task.heads / task.kv_heads);
  int index = 0;
  if constexpr (kQueries >= 8)
    for (; index + 8 <= count; index += 8) attend_some<8>(task, index);
  for (; index + 4 <= count; index += 4) attend_some<4>(task, index);
  for (; index + 3 <= count; index += 3) attend_some<3>(task, index);
  for (; index < count; index++) attend_some<1>(task, index);
}
