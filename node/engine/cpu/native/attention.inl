// Rotary embedding, the KV cache, and attention over it.

// Rotate-half (Su et al. 2021, arXiv:2104.09864): element i of a head is paired with element i + head_dim / 2.
static inline void rotate(float *head, int head_dim, const float *cos, const float *sin) {
  const int half = head_dim / 2, whole = half / kLanes * kLanes;
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

// Column `offset` of a block of keys [head_dim, 16], and row `offset` of a block of values [16, padded].
static void rotate_and_store(float *qkv, int heads, int kv_heads, int head_dim, size_t kv_blocks, const float *cos,
                             const float *sin, uint16_t *keys, uint16_t *values, int offset) {
  for (int head = 0; head < heads + kv_heads; head++) rotate(qkv + head * head_dim, head_dim, cos, sin);
  const float *k = qkv + heads * head_dim, *v = k + kv_heads * head_dim;
  const int padded = round_up(head_dim, kTile);
  for (int head = 0; head < kv_heads; head++) {
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

// Scores of N queries with all keys of the blocks up to key `n`: s = q k, the queries being scaled already.
template <int N>
static inline void scores(const Attention &t, int n) {
  const size_t block_size = static_cast<size_t>(t.head_dim) * kBlock;
  for (int begin = 0; begin < n; begin += kBlock) {
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

// Turns the scores of the first `n` keys into e^(s - largest), the rest of the padded row up to `stop` into 0; the sum.
static inline float soften(float *scores, int n, int stop) {
  for (int i = n; i < stop; i++) scores[i] = -__builtin_inff();
  Floats peak = load(scores);
  for (int i = kLanes; i < stop; i += kLanes) peak = max(peak, load(scores + i));
  const Floats largest = set1(largest_of(peak));
  Floats total = zero();
  for (int i = 0; i < stop; i += kLanes) {
    const Floats p = exponential(sub(load(scores + i), largest));
    store(scores + i, p);
    total = add(total, p);
  }
  return sum_of(total);
}

// Two vectors of the outputs, from dimension `d` on: sum over the keys of p v. Keys that a query may not see have p = 0.
template <int N>
static inline void mix(const Attention &t, int n, int d, Floats (*out)[2]) {
  const int padded = round_up(t.head_dim, kTile);
  const size_t block_size = static_cast<size_t>(padded) * kBlock;
  for (int i = 0; i < N; i++) out[i][0] = out[i][1] = zero();
  for (int begin = 0; begin < n; begin += kBlock) {
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
  const float factor = 1.0f / __builtin_sqrtf(static_cast<float>(head_dim));
  int seen[N], most = 0;
  float *to[N], inverse[N];
  for (int i = 0; i < N; i++) {
    const int row = t.first + (index + i) / group, head = t.kv_head * group + (index + i) % group;
    const float *q = t.qkv + (t.first_row + row) * t.qkv_stride + head * head_dim;
    for (int d = 0; d < head_dim; d++) t.queries[i * head_dim + d] = q[d] * factor;
    to[i] = t.out + (t.first_row + row) * t.out_stride + head * head_dim;
    seen[i] = t.start + row + 1;
    most = seen[i] > most ? seen[i] : most;
  }
  scores<N>(t, most);
  for (int i = 0; i < N; i++)
    inverse[i] = 1.0f / soften(t.scores + i * t.scores_stride, seen[i], round_up(most, kBlock));
  for (int d = 0; d < head_dim; d += 2 * kLanes) {
    Floats mixed[N][2];
    mix<N>(t, most, d, mixed);
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
