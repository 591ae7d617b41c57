// Vectors of 4 lanes with NEON and the dot product extension (ARMv8.2). See simd_portable.h for the meanings.
constexpr int kLanes = 4;
constexpr int kMostRows = 8;
constexpr int kQueries = 8;

using Floats = float32x4_t;
using Ints = int32x4_t;
using Bytes = uint8x16_t;

static inline Floats zero() { return vdupq_n_f32(0); }
static inline Floats set1(float x) { return vdupq_n_f32(x); }
static inline Floats load(const float *p) { return vld1q_f32(p); }
static inline void store(float *p, Floats x) { vst1q_f32(p, x); }
static inline Floats add(Floats a, Floats b) { return vaddq_f32(a, b); }
static inline Floats sub(Floats a, Floats b) { return vsubq_f32(a, b); }
static inline Floats mul(Floats a, Floats b) { return vmulq_f32(a, b); }
static inline Floats div(Floats a, Floats b) { return vdivq_f32(a, b); }
static inline Floats fma(Floats a, Floats b, Floats c) { return vfmaq_f32(c, a, b); }
static inline Floats max(Floats a, Floats b) { return vmaxq_f32(a, b); }
static inline Floats min(Floats a, Floats b) { return vminq_f32(a, b); }
static inline Floats abs(Floats a) { return vabsq_f32(a); }
static inline Floats zero_below(Floats x, Floats bound, Floats y) {
  return vreinterpretq_f32_u32(vandq_u32(vcgeq_f32(x, bound), vreinterpretq_u32_f32(y)));
}
static inline Floats load_half(const uint16_t *p) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p))); }
static inline Floats load_bf16(const uint16_t *p) { return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p), 16)); }
static inline uint8x8_t load_four_bytes(const uint8_t *p) {
  uint32_t four;
  __builtin_memcpy(&four, p, 4);
  return vcreate_u8(four);
}
static inline Floats load_signed_bytes(const uint8_t *p) {
  return vcvtq_f32_s32(vmovl_s16(vget_low_s16(vmovl_s8(vreinterpret_s8_u8(load_four_bytes(p))))));
}
static inline Floats load_unsigned_bytes(const uint8_t *p) {
  return vcvtq_f32_u32(vmovl_u16(vget_low_u16(vmovl_u8(load_four_bytes(p)))));
}
static inline Ints round_ints(Floats x) { return vcvtnq_s32_f32(x); }
static inline Floats from_ints(Ints x) { return vcvtq_f32_s32(x); }
static inline void store_low_bytes(int8_t *p, Ints x) {
  const int16x4_t words = vmovn_s32(x);
  const int8x8_t bytes = vmovn_s16(vcombine_s16(words, words));
  vst1_lane_s32(reinterpret_cast<int32_t *>(p), vreinterpret_s32_s8(bytes), 0);
}
static inline Floats power_of_two(Ints n) {
  return vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(n, vdupq_n_s32(127)), 23));
}

static inline Bytes load_bytes(const uint8_t *p) { return vld1q_u8(p); }
template <int SHIFT, int MASK>
static inline Bytes field(Bytes x) {
  return vandq_u8(vshlq_u8(x, vdupq_n_s8(-SHIFT)), vdupq_n_u8(MASK));
}
template <int SHIFT>
static inline Bytes join(Bytes low, Bytes high) {
  return vorrq_u8(low, vshlq_u8(high, vdupq_n_s8(SHIFT)));
}

static inline Bytes load_table(const uint8_t *p) { return vld1q_u8(p); }
static inline Bytes look_up(Bytes table, Bytes x) { return vqtbl1q_u8(table, x); }

// The dot product takes both operands signed: codes of up to 6 bits are that as they are, 8-bit ones go by nibbles.
static inline int8x16_t four_of(const int8_t *x) {
  int32_t four;
  __builtin_memcpy(&four, x, 4);
  return vreinterpretq_s8_s32(vdupq_n_s32(four));
}

template <int BITS, bool WIDE = (BITS > 7)>
struct Dot {
  Ints sum;
  Dot() : sum(vdupq_n_s32(0)) {}
  void add(Bytes w, const int8_t *x) { sum = vdotq_s32(sum, vreinterpretq_s8_u8(w), four_of(x)); }
  Floats total() const { return vcvtq_f32_s32(sum); }
};

template <int BITS>
struct Dot<BITS, true> {
  Ints low, high;
  Dot() : low(vdupq_n_s32(0)), high(vdupq_n_s32(0)) {}
  void add(Bytes w, const int8_t *x) {
    const int8x16_t four = four_of(x);
    low = vdotq_s32(low, vreinterpretq_s8_u8(field<0, 15>(w)), four);
    high = vdotq_s32(high, vreinterpretq_s8_u8(field<4, 15>(w)), four);
  }
  Floats total() const { return vcvtq_f32_s32(vaddq_s32(low, vshlq_n_s32(high, 4))); }
};
