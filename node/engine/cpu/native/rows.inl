// What happens to one row of activations: normalizing, gating, quantizing, and its way over the wire.

// A group whose largest value is so many times the row's root mean square gets fine codes. A few values of transformers
// are very large (Dettmers et al. 2022, arXiv:2208.07339), and eight bits for their groups are what most of the error
// comes from.
constexpr float kStandsOut = 5.0f;

// The codes of one group: round(x / scale), where scale is `largest` / 127; the sums of the codes of its two halves times
// scale are added to `half_sums`. `rest` is what is left of x. Returns scale.
static inline float encode(const float *x, float largest, int8_t *codes, float *rest, float *half_sums) {
  const float scale = largest / 127.0f;
  const Floats inverse = set1(largest > 0 ? 127.0f / largest : 0.0f);
  for (int half = 0; half < 2; half++) {
    Floats total = zero();
    for (int i = half * kHalf; i < (half + 1) * kHalf; i += kLanes) {
      const Ints rounded = round_ints(mul(load(x + i), inverse));
      store_low_bytes(codes + i, rounded);
      total = add(total, from_ints(rounded));
      if (rest) store(rest + i, sub(load(x + i), mul(from_ints(rounded), set1(scale))));
    }
    half_sums[half] += scale * sum_of(total);
  }
  return scale;
}

static inline float largest_size(const float *x) {
  Floats peak = abs(load(x));
  for (int i = kLanes; i < kGroup; i += kLanes) peak = max(peak, abs(load(x + i)));
  return largest_of(peak);
}

// The codes of a row of activations from its values.
static inline void keep(const float *x, const Activations &out, int row) {
  if (!out.codes) return;
  const int groups = out.groups();
  const size_t at = static_cast<size_t>(row) * out.columns, first = static_cast<size_t>(row) * groups;
  Floats squares = zero();
  for (int i = 0; i < out.columns; i += kLanes) squares = fma(load(x + i), load(x + i), squares);
  const float bound = kStandsOut * __builtin_sqrtf(sum_of(squares) / static_cast<float>(out.columns));
  for (int g = 0; g < groups; g++) {
    const float *in = x + g * kGroup;
    const float largest = largest_size(in);
    const bool stands_out = largest > bound;
    float rest[kGroup], fine_scale = 0, *halves = out.half_sums + 2 * (first + g);
    halves[0] = halves[1] = 0;
    out.scale[first + g] = encode(in, largest, out.codes + at + g * kGroup, stands_out ? rest : nullptr, halves);
    if (stands_out) fine_scale = encode(rest, largest_size(rest), out.fine_codes + at + g * kGroup, nullptr, halves);
    out.fine_scale[first + g] = fine_scale;
    out.sum[first + g] = halves[0] + halves[1];
  }
}

// 1 / sqrt(mean(x^2) + eps) (Zhang and Sennrich 2019, arXiv:1910.07467).
static inline float norm_factor(const float *x, int n, float eps) {
  const int whole = n / kLanes * kLanes;
  Floats squares = zero();
  for (int i = 0; i < whole; i += kLanes) squares = fma(load(x + i), load(x + i), squares);
  float sum = sum_of(squares);
  for (int i = whole; i < n; i++) sum += x[i] * x[i];
  return 1.0f / __builtin_sqrtf(sum / static_cast<float>(n) + eps);
}

// y = x * factor * weight; y may be x.
static inline void weigh(const float *x, float factor, const float *weight, int n, float *y) {
  const int whole = n / kLanes * kLanes;
  for (int i = 0; i < whole; i += kLanes) store(y + i, mul(mul(load(x + i), set1(factor)), load(weight + i)));
  for (int i = whole; i < n; i++) y[i] = x[i] * factor * weight[i];
}

static inline void add_vector(float *x, const float *y, int n) {
  const int whole = n / kLanes * kLanes;
  for (int i = 0; i < whole; i += kLanes) store(x + i, add(load(x + i), load(y + i)));
  for (int i = whole; i < n; i++) x[i] += y[i];
}

static float *values_of(const Activations &out, int row) {
  return out.values + static_cast<size_t>(row) * out.columns;
}

// RMS norm. Without a weight the values are where they belong already.
static void prepare(const float *x, const float *weight, float eps, const Activations &out, int row) {
  float *y = values_of(out, row);
  if (weight) weigh(x, norm_factor(x, out.columns, eps), weight, out.columns, y);
  keep(y, out, row);
}

static void add_to(float *x, float *y, const float *bias, const float *norm, float eps, float factor, int n) {
  if (bias) add_vector(y, bias, n);
  if (norm) weigh(y, norm_factor(y, n, eps), norm, n, y);
  const int whole = n / kLanes * kLanes;
  for (int i = 0; i < whole; i += kLanes) store(x + i, fma(load(y + i), set1(factor), load(x + i)));
  for (int i = whole; i < n; i++) x[i] += y[i] * factor;
}

static void scale_and_cap(float *x, float factor, float cap, int n) {
  const int whole = n / kLanes * kLanes;
  for (int i = 0; i < whole; i += kLanes) {
    const Floats scaled = mul(load(x + i), set1(factor));
    store(x + i, cap > 0 ? soft_capped(scaled, cap) : scaled);
  }
  for (int i = whole; i < n; i++) {
    x[i] *= factor;
    if (cap > 0) x[i] = cap * __builtin_tanhf(x[i] / cap);
  }
}

// gpt-oss' activation: g sigmoid(1.702 g) (u + 1), g cut at 7 and u at 7 and -7.
static inline Floats clamped_swiglu(Floats gate, Floats up) {
  const Floats most = set1(7.0f), g = min(gate, most), u = max(min(up, most), set1(-7.0f));
  return mul(mul(g, sigmoid(mul(g, set1(1.702f)))), add(u, set1(1.0f)));
}

template <int ACTIVATION>
static inline Floats activated(Floats gate, Floats up) {
  if constexpr (ACTIVATION == SWARMD_SILU) return mul(silu(gate), up);
  if constexpr (ACTIVATION == SWARMD_GELU_TANH) return mul(gelu_tanh(gate), up);
  return clamped_swiglu(gate, up);
}

template <int ACTIVATION, bool BIASED>
static void gate_row(const float *gate_up, const float *bias, int n, float *y) {
  const int whole = n / kLanes * kLanes;
  for (int i = 0; i < whole; i += kLanes) {
    Floats g = load(gate_up + i), u = load(gate_up + n + i);
    if constexpr (BIASED) {
      g = add(g, load(bias + i));
      u = add(u, load(bias + n + i));
    }
    store(y + i, activated<ACTIVATION>(g, u));
  }
  for (int i = whole; i < n; i++) {
    const float g = gate_up[i] + (BIASED ? bias[i] : 0.0f), u = gate_up[n + i] + (BIASED ? bias[n + i] : 0.0f);
    float lanes[kLanes];
    store(lanes, activated<ACTIVATION>(set1(g), set1(u)));
    y[i] = lanes[0];
  }
}

template <int ACTIVATION>
static void gate_row(const float *gate_up, const float *bias, int n, float *y) {
  if (bias) return gate_row<ACTIVATION, true>(gate_up, bias, n, y);
  gate_row<ACTIVATION, false>(gate_up, bias, n, y);
}

// `gate_up` is gate and up side by side (Shazeer 2020, arXiv:2002.05202).
static void gate(const float *gate_up, const float *bias, int activation, const Activations &out, int row) {
  float *y = values_of(out, row);
  switch (activation) {
    case SWARMD_SILU: gate_row<SWARMD_SILU>(gate_up, bias, out.columns, y); break;
    case SWARMD_GELU_TANH: gate_row<SWARMD_GELU_TANH>(gate_up, bias, out.columns, y); break;
    case SWARMD_CLAMPED_SWIGLU: gate_row<SWARMD_CLAMPED_SWIGLU>(gate_up, bias, out.columns, y); break;
  }
  keep(y, out, row);
}

static void to_wire(const float *x, size_t count, uint16_t *bf16) {
  for (size_t i = 0; i < count; i++) {
    uint32_t bits;
    __builtin_memcpy(&bits, x + i, 4);
    const bool nan = (bits & 0x7fffffff) > 0x7f800000;
    bf16[i] = static_cast<uint16_t>((nan ? bits | 0x400000 : bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
  }
}

static void from_wire(const uint16_t *bf16, size_t count, float *x) {
  for (size_t i = 0; i < count; i++) x[i] = bf16_to_float(bf16[i]);
}

// The largest logit, the first place of it, and the logarithm of the sum of exponentials, summed up in double.
static SwarmdSummary summarize(const float *logits, int vocab) {
  const int whole = vocab / kLanes * kLanes;
  Floats peak = set1(logits[0]), check = zero();
  for (int i = 0; i < whole; i += kLanes) {
    const Floats x = load(logits + i);
    peak = max(peak, x);
    check = fma(x, zero(), check);  // 0 * x is 0 for finite numbers, and not a number for the others
  }
  float largest = largest_of(peak), odd = sum_of(check);
  for (int i = whole; i < vocab; i++) {
    largest = logits[i] > largest ? logits[i] : largest;
    odd += logits[i] * 0.0f;
  }
  SwarmdSummary out = {odd == 0.0f, 0, largest, 0};
  if (!out.finite) return out;
  while (logits[out.best] != largest) out.best++;
  constexpr int kRun = 64 * kLanes;  // so many are added up in float, the sums of runs in double
  double total = 0;
  for (int begin = 0; begin < whole; begin += kRun) {
    Floats run = zero();
    for (int i = begin; i < whole && i < begin + kRun; i += kLanes)
      run = add(run, exponential(sub(load(logits + i), set1(largest))));
    total += sum_of(run);
  }
  for (int i = whole; i < vocab; i++) total += __builtin_exp(static_cast<double>(logits[i]) - largest);
  out.log_normalizer = largest + __builtin_log(total);
  return out;
}
