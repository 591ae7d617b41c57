// Vectors of 16 lanes with AVX-512 F, BW and VNNI. See simd_portable.h for what each function means.
constexpr int kLanes = 16;
constexpr int kMostRows = 16;  // rows of activations that one product keeps in registers
constexpr int kQueries = 8;    // queries that attention keeps in registers

using Floats = __m512;
using Ints = __m512i;
using Bytes = __m512i;

static inline Floats zero() { return _mm512_setzero_ps(); }
static inline Floats set1(float x) { return _mm512_set1_ps(x); }
static inline Floats load(const float *p) { return _mm512_loadu_ps(p); }
static inline void store(float *p, Floats x) { _mm512_storeu_ps(p, x); }
static inline Floats add(Floats a, Floats b) { return _mm512_add_ps(a, b); }
static inline Floats sub(Floats a, Floats b) { return _mm512_sub_ps(a, b); }
static inline Floats mul(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
static inline Floats div(Floats a, Floats b) { return _mm512_div_ps(a, b); }
static inline Floats fma(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
static inline Floats max(Floats a, Floats b) { return _mm512_max_ps(a, b); }
static inline Floats min(Floats a, Floats b) { return _mm512_min_ps(a, b); }
static inline Floats abs(Floats a) { return _mm512_abs_ps(a); }
static inline Floats zero_below(Floats x, Floats bound, Floats y) {
  return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x, bound, _CMP_GE_OQ), y);
}
static inline Floats load_half(const uint16_t *p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(p)));
}
static inline Floats load_bf16(const uint16_t *p) {
  const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(p)));
  return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}
static inline Floats load_signed_bytes(const uint8_t *p) {
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i *>(p))));
}
static inline Floats load_unsigned_bytes(const uint8_t *p) {
  return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i *>(p))));
}
static inline Ints round_ints(Floats x) { return _mm512_cvtps_epi32(x); }
static inline Floats from_ints(Ints x) { return _mm512_cvtepi32_ps(x); }
static inline void store_low_bytes(int8_t *p, Ints x) {
  _mm_storeu_si128(reinterpret_cast<__m128i *>(p), _mm512_cvtepi32_epi8(x));
}
static inline Floats power_of_two(Ints n) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_add_epi32(n, _mm512_set1_epi32(127)), 23));
}

static inline Bytes load_bytes(const uint8_t *p) { return _mm512_loadu_si512(p); }
template <int SHIFT, int MASK>
static inline Bytes field(Bytes x) {
  return _mm512_and_si512(SHIFT ? _mm512_srli_epi16(x, SHIFT) : x, _mm512_set1_epi8(MASK));
}
template <int SHIFT>
static inline Bytes join(Bytes low, Bytes high) {
  return _mm512_or_si512(low, _mm512_slli_epi16(high, SHIFT));
}

static inline Bytes load_table(const uint8_t *p) {
  return _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i *>(p)));
}
static inline Bytes look_up(Bytes table, Bytes x) { return _mm512_shuffle_epi8(table, x); }

template <int BITS>
struct Dot {
  Ints sum;
  Dot() : sum(_mm512_setzero_si512()) {}
  void add(Bytes w, const int8_t *x) {
    int32_t four;
    __builtin_memcpy(&four, x, 4);
    sum = _mm512_dpbusd_epi32(sum, w, _mm512_set1_epi32(four));
  }
  Floats total() const { return _mm512_cvtepi32_ps(sum); }
};
