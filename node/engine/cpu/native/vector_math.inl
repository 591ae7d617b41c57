// Small functions over vectors, the same for every instruction set.

static inline float sum_of(Floats x) {
  float lanes[kLanes];
  store(lanes, x);
  for (int width = kLanes / 2; width > 0; width /= 2)
    for (int i = 0; i < width; i++) lanes[i] += lanes[i + width];
  return lanes[0];
}

static inline float largest_of(Floats x) {
  float lanes[kLanes];
  store(lanes, x);
  for (int i = 1; i < kLanes; i++) lanes[0] = lanes[i] > lanes[0] ? lanes[i] : lanes[0];
  return lanes[0];
}

// e^x to about 2 ulp for x <= 88, 0 below -87 (Cephes' expf: x = n ln 2 + r, |r| <= ln 2 / 2, a polynomial in r).
static inline Floats exponential(Floats x) {
  const Floats clamped = max(min(x, set1(88.0f)), set1(-87.0f));
  const Ints n = round_ints(mul(clamped, set1(1.44269504f)));
  const Floats whole = from_ints(n);
  Floats r = fma(whole, set1(-0.693359375f), clamped);
  r = fma(whole, set1(2.12194440e-4f), r);
  Floats p = set1(1.9875691500e-4f);
  p = fma(p, r, set1(1.3981999507e-3f));
  p = fma(p, r, set1(8.3334519073e-3f));
  p = fma(p, r, set1(4.1665795894e-2f));
  p = fma(p, r, set1(1.6666665459e-1f));
  p = fma(p, r, set1(5.0000001201e-1f));
  p = add(fma(mul(p, r), r, r), set1(1.0f));
  return zero_below(x, set1(-87.0f), mul(p, power_of_two(n)));
}

// 1 / (1 + e^-x).
static inline Floats sigmoid(Floats x) { return div(set1(1.0f), add(set1(1.0f), exponential(sub(zero(), x)))); }

// x / (1 + e^-x) (Elfwing et al. 2017, arXiv:1702.03118).
static inline Floats silu(Floats x) { return div(x, add(set1(1.0f), exponential(sub(zero(), x)))); }

// x / 2 (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))) (Hendrycks and Gimpel 2016, arXiv:1606.08415), as
// (1 + tanh(y)) / 2 = 1 / (1 + e^-2y).
static inline Floats gelu_tanh(Floats x) {
  const Floats y = fma(mul(mul(x, x), x), set1(0.044715f), x);
  return div(x, add(set1(1.0f), exponential(mul(y, set1(-1.5957691216f)))));
}

// cap tanh(x / cap), to about 2 u of the cap.
static inline Floats soft_capped(Floats x, float cap) {
  const Floats e = exponential(mul(x, set1(2.0f / cap)));
  return mul(set1(cap), sub(set1(1.0f), div(set1(2.0f), add(e, set1(1.0f)))));
}
