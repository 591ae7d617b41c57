// Vectors of 8 lanes with AVX2, FMA and F16C. See simd_portable.h for what each function means.
constexpr int kLanes = 8;
constexpr int kMostRows = 4;
constexpr int kQueries = 4;

using Floats = __m256;
using Ints = __m256i;
using Bytes = __m256i;

static inline Floats zero() { return _mm256_setzero_ps(); }
static inline Floats set1(float x) { return _mm256_set1_ps(x); }
static inline Floats load(const float *p) { return _mm256_loadu_ps(p); }
static inline void store(float *p, Floats x) { _mm256_storeu_ps(p, x); }
static inline Floats add(Floats a, Floats b) { return _mm256_add_ps(a, b); }
static inline Floats sub(Floats a, Floats b) { return _mm256_sub_ps(a, b); }
static inline Floats mul(Floats a, Floats b) { return _mm256_mul_ps(a, b); }
static inline Floats div(Floats a, Floats b) { return _mm256_div_ps(a, b); }
static inline Floats fma(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
static inline Floats max(Floats a, Floats b) { return _mm256_max_ps(a, b); }
static inline Floats min(Floats a, Floats b) { return _mm256_min_ps(a, b); }
static inline Floats abs(Floats a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a); }
static inline Floats zero_below(Floats x, Floats bound, Floats y) {
  return _mm256_and_ps(_mm256_cmp_ps(x, bound, _CMP_GE_OQ), y);
}
static inline Floats load_half(const uint16_t *p) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i *>(p)));
}
static inline Floats load_bf16(const uint16_t *p) {
  const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i *>(p)));
  return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}
static inline Floats load_signed_bytes(const uint8_t *p) {
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i *>(p))));
}
static inline Floats load_unsigned_bytes(const uint8_t *p) {
  return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i *>(p))));
}
static inline Ints round_ints(Floats x) { return _mm256_cvtps_epi32(x); }
static inline Floats from_ints(Ints x) { return _mm256_cvtepi32_ps(x); }
static inline void store_low_bytes(int8_t *p, Ints x) {
  const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
  _mm_storel_epi64(reinterpret_cast<__m128i *>(p), _mm_packs_epi16(words, words));
}
static inline Floats power_of_two(Ints n) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(n, _mm256_set1_epi32(127)), 23));
}

static inline Bytes load_bytes(const uint8_t *p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i *>(p)); }
template <int SHIFT, int MASK>
static inline Bytes field(Bytes x) {
  return _mm256_and_si256(SHIFT ? _mm256_srli_epi16(x, SHIFT) : x, _mm256_set1_epi8(MASK));
}
template <int SHIFT>
static inline Bytes join(Bytes low, Bytes high) {
  return _mm256_or_si256(low, _mm256_slli_epi16(high, SHIFT));
}

static inline Bytes load_table(const uint8_t *p) {
  return _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i *>(p)));
}
static inline Bytes look_up(Bytes table, Bytes x) { return _mm256_shuffle_epi8(table, x); }

// maddubs adds pairs of products into int16, each at most 2 * 127 * the largest code: of 4 bits 3810, which leaves room for
// eight of them, all of a group; of 5 bits 7874, for four; of 6 bits 16002, for two. Then they are added up in int32.
// Bytes are split into nibbles.
static inline __m256i four_of(const int8_t *x) {
  int32_t four;
  __builtin_memcpy(&four, x, 4);
  return _mm256_set1_epi32(four);
}

// Constructors are written out because implicit ones are compiled without this file's instructions.
template <int BITS, bool WIDE = (BITS > 6)>
struct Dot {
  static constexpr int kMost = BITS == 6 ? 2 : BITS == 5 ? 4 : 8;
  __m256i sum, done;
  int count;  // known when compiled: products are unrolled
  Dot() : sum(_mm256_setzero_si256()), done(_mm256_setzero_si256()), count(0) {}
  void add(Bytes w, const int8_t *x) {
    if (count == kMost) {
      done = total_ints();
      sum = _mm256_setzero_si256();
      count = 0;
    }
    sum = _mm256_add_epi16(sum, _mm256_maddubs_epi16(w, four_of(x)));
    count++;
  }
  Ints total_ints() const { return _mm256_add_epi32(done, _mm256_madd_epi16(sum, _mm256_set1_epi16(1))); }
  Floats total() const { return _mm256_cvtepi32_ps(total_ints()); }
};

template <int BITS>
struct Dot<BITS, true> {
  __m256i low, high;
  Dot() : low(_mm256_setzero_si256()), high(_mm256_setzero_si256()) {}
  void add(Bytes w, const int8_t *x) {
    const __m256i four = four_of(x);
    low = _mm256_add_epi16(low, _mm256_maddubs_epi16(field<0, 15>(w), four));
    high = _mm256_add_epi16(high, _mm256_maddubs_epi16(field<4, 15>(w), four));
  }
  Floats total() const {
    const __m256i ones = _mm256_madd_epi16(low, _mm256_set1_epi16(1));
    return _mm256_cvtepi32_ps(_mm256_add_epi32(ones, _mm256_madd_epi16(high, _mm256_set1_epi16(16))));
  }
};
