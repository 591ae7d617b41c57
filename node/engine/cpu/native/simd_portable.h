// Vectors as plain arrays, for CPUs that have no path of their own; also the definition of what the others must do.
constexpr int kLanes = 4;
constexpr int kMostRows = 2;
constexpr int kQueries = 4;

struct Floats {
  float v[kLanes];
};
struct Ints {
  int32_t v[kLanes];
};
struct Bytes {
  uint8_t v[4 * kLanes];
};

template <typename Op>
static inline Floats each(Op op) {
  Floats out;
  for (int i = 0; i < kLanes; i++) out.v[i] = op(i);
  return out;
}

static inline Floats set1(float x) {
  return each([&](int) { return x; });
}
static inline Floats zero() { return set1(0); }
static inline Floats load(const float *p) {
  return each([&](int i) { return p[i]; });
}
static inline void store(float *p, Floats x) {
  for (int i = 0; i < kLanes; i++) p[i] = x.v[i];
}
static inline Floats add(Floats a, Floats b) {
  return each([&](int i) { return a.v[i] + b.v[i]; });
}
static inline Floats sub(Floats a, Floats b) {
  return each([&](int i) { return a.v[i] - b.v[i]; });
}
static inline Floats mul(Floats a, Floats b) {
  return each([&](int i) { return a.v[i] * b.v[i]; });
}
static inline Floats div(Floats a, Floats b) {
  return each([&](int i) { return a.v[i] / b.v[i]; });
}
// a * b + c; elsewhere rounded once.
static inline Floats fma(Floats a, Floats b, Floats c) {
  return each([&](int i) { return a.v[i] * b.v[i] + c.v[i]; });
}
static inline Floats max(Floats a, Floats b) {
  return each([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; });
}
static inline Floats min(Floats a, Floats b) {
  return each([&](int i) { return a.v[i] < b.v[i] ? a.v[i] : b.v[i]; });
}
static inline Floats abs(Floats a) {
  return each([&](int i) { return __builtin_fabsf(a.v[i]); });
}
// y where x >= bound, else 0.
static inline Floats zero_below(Floats x, Floats bound, Floats y) {
  return each([&](int i) { return x.v[i] >= bound.v[i] ? y.v[i] : 0.0f; });
}
static inline Floats load_half(const uint16_t *p) {
  return each([&](int i) { return half_to_float(p[i]); });
}
static inline Floats load_bf16(const uint16_t *p) {
  return each([&](int i) { return bf16_to_float(p[i]); });
}
static inline Floats load_signed_bytes(const uint8_t *p) {
  return each([&](int i) { return static_cast<float>(static_cast<int8_t>(p[i])); });
}
static inline Floats load_unsigned_bytes(const uint8_t *p) {
  return each([&](int i) { return static_cast<float>(p[i]); });
}
// To nearest, ties to even, for |x| < 2^22: adding 1.5 * 2^23 leaves the integer in the low bits of the fraction.
static inline Ints round_ints(Floats x) {
  Ints out;
  for (int i = 0; i < kLanes; i++) out.v[i] = static_cast<int32_t>((x.v[i] + 12582912.0f) - 12582912.0f);
  return out;
}
static inline Floats from_ints(Ints x) {
  return each([&](int i) { return static_cast<float>(x.v[i]); });
}
// One byte for each lane; the values fit.
static inline void store_low_bytes(int8_t *p, Ints x) {
  for (int i = 0; i < kLanes; i++) p[i] = static_cast<int8_t>(x.v[i]);
}
// 2^n for -127 < n < 128; 0 for n = -127.
static inline Floats power_of_two(Ints n) {
  return each([&](int i) {
    const uint32_t bits = static_cast<uint32_t>(n.v[i] + 127) << 23;
    float out;
    __builtin_memcpy(&out, &bits, 4);
    return out;
  });
}

static inline Bytes load_bytes(const uint8_t *p) {
  Bytes out;
  __builtin_memcpy(out.v, p, sizeof out.v);
  return out;
}
// The bits of each byte from SHIFT on, masked.
template <int SHIFT, int MASK>
static inline Bytes field(Bytes x) {
  for (uint8_t &byte : x.v) byte = (byte >> SHIFT) & MASK;
  return x;
}
// low | high << SHIFT, byte by byte.
template <int SHIFT>
static inline Bytes join(Bytes low, Bytes high) {
  for (int i = 0; i < 4 * kLanes; i++) low.v[i] |= static_cast<uint8_t>(high.v[i] << SHIFT);
  return low;
}

// A table of 16 bytes, and for each byte below 16 what the table has there.
static inline Bytes load_table(const uint8_t *p) {
  Bytes out;
  for (int i = 0; i < 4 * kLanes; i++) out.v[i] = p[i % 16];
  return out;
}
static inline Bytes look_up(Bytes table, Bytes x) {
  for (uint8_t &byte : x.v) byte = table.v[byte & 15];
  return x;
}

// Sums of products of codes (unsigned) with four int8 activations that all lanes share.
template <int BITS>
struct Dot {
  Ints sum = {};
  void add(Bytes w, const int8_t *x) {
    for (int i = 0; i < kLanes; i++)
      for (int j = 0; j < 4; j++) sum.v[i] += w.v[4 * i + j] * x[j];
  }
  Floats total() const { return from_ints(sum); }
};
