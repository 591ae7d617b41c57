// Products of a segment's tiles with rows of activations. A vector lane is a row of the matrix; every output is summed
// up group by group in the same order whatever else is in the step, so rows do not depend on each other's company.

// The codes of one group of 32 columns: chunk c of the result holds columns 4c..4c+3 of each lane's row. With `bits`
// other than 8 they are stored in planes of 4, 2 and 1 bits, the lowest first (pack.cpp draws them).
template <int BITS>
static SWARMD_INLINE void unpack(const uint8_t *group, Bytes *w) {
  constexpr int kLow = BITS == 8 ? 8 : BITS >= 4 ? 4 : 2;  // bits of the lowest plane
  constexpr int kHigh = BITS - kLow;
  const uint8_t *high = group + kLow * 64;
  if constexpr (kLow == 8) {
    for (int c = 0; c < 8; c++) w[c] = load_bytes(group + 64 * c);
  } else if constexpr (kLow == 4) {
    for (int c = 0; c < 4; c++) {
      const Bytes packed = load_bytes(group + 64 * c);
      w[2 * c] = field<0, 15>(packed);
      w[2 * c + 1] = field<4, 15>(packed);
    }
  } else {
    for (int c = 0; c < 2; c++) {
      const Bytes packed = load_bytes(group + 64 * c);
      w[4 * c] = field<0, 3>(packed);
      w[4 * c + 1] = field<2, 3>(packed);
      w[4 * c + 2] = field<4, 3>(packed);
      w[4 * c + 3] = field<6, 3>(packed);
    }
  }
  if constexpr (kHigh == 2) {
    for (int c = 0; c < 2; c++) {
      const Bytes packed = load_bytes(high + 64 * c);
      w[4 * c] = join<kLow>(w[4 * c], field<0, 3>(packed));
      w[4 * c + 1] = join<kLow>(w[4 * c + 1], field<2, 3>(packed));
      w[4 * c + 2] = join<kLow>(w[4 * c + 2], field<4, 3>(packed));
      w[4 * c + 3] = join<kLow>(w[4 * c + 3], field<6, 3>(packed));
    }
  } else if constexpr (kHigh == 1) {
    const Bytes packed = load_bytes(high);
    w[0] = join<kLow>(w[0], field<0, 1>(packed));
    w[1] = join<kLow>(w[1], field<1, 1>(packed));
    w[2] = join<kLow>(w[2], field<2, 1>(packed));
    w[3] = join<kLow>(w[3], field<3, 1>(packed));
    w[4] = join<kLow>(w[4], field<4, 1>(packed));
    w[5] = join<kLow>(w[5], field<5, 1>(packed));
    w[6] = join<kLow>(w[6], field<6, 1>(packed));
    w[7] = join<kLow>(w[7], field<7, 1>(packed));
  }
}

// The form of a quantized segment: TABLE when codes stand for levels, HALVES when scales change every 16 columns.
template <int BITS, bool TABLE = false, bool HALVES = false>
struct Quantized {
  static constexpr bool kQuantized = true, kTable = TABLE, kHalves = HALVES;
  static constexpr int kBits = BITS, kLevelBits = TABLE ? 8 : BITS;
};

template <int KIND>
struct Dense {
  static constexpr bool kQuantized = false;
  static constexpr int kKind = KIND;
};

// The levels of one group of 32 columns, as `unpack` has the codes.
template <typename Form>
static SWARMD_INLINE void load_levels(const SwarmdSegment &segment, const uint8_t *group, Bytes *w) {
  unpack<Form::kBits>(group, w);
  if constexpr (Form::kTable) {
    const Bytes table = load_table(segment.levels);
    for (int c = 0; c < 8; c++) w[c] = look_up(table, w[c]);
  }
}

// Lanes [0, count) of `sum` go to the outputs from `at` on.
static inline void put(Floats sum, float *at, int count, bool accumulate) {
  if (count >= kLanes) {
    store(at, accumulate ? add(load(at), sum) : sum);
    return;
  }
  float lanes[kLanes];
  store(lanes, sum);
  for (int i = 0; i < count; i++) at[i] = accumulate ? at[i] + lanes[i] : lanes[i];
}

// The dot product of 4 * COUNT columns, exact.
template <int BITS, int COUNT>
static SWARMD_INLINE Floats dot_product(const Bytes *w, const int8_t *codes) {
  Dot<BITS> dot;
#pragma GCC unroll 8
  for (int c = 0; c < COUNT; c++) dot.add(w[c], codes + 4 * c);
  return dot.total();
}

// The sum of scale * level * code over one group of activations; with HALVES each half has a scale of its own.
template <typename Form>
static SWARMD_INLINE Floats scaled_dot(const Bytes *w, const int8_t *codes, Floats scale, Floats second_scale) {
  if constexpr (Form::kHalves) {
    const Floats low = mul(dot_product<Form::kLevelBits, 4>(w, codes), scale);
    return fma(dot_product<Form::kLevelBits, 4>(w + 4, codes + kHalf), second_scale, low);
  } else {
    return mul(dot_product<Form::kLevelBits, 8>(w, codes), scale);
  }
}

// The same for fine codes, which are rare: a call, which unpacks the group again, keeps the products' loops short.
template <typename Form>
static __attribute__((noinline)) Floats fine_dot(const SwarmdSegment &segment, const uint8_t *group, const int8_t *codes,
                                                 Floats scale, Floats second_scale) {
  Bytes w[8];
  load_levels<Form>(segment, group, w);
  return scaled_dot<Form>(w, codes, scale, second_scale);
}

// One part of a tile (kLanes of its rows) times ROWS rows of activations: with w = level * scale + bias and x = q * s,
// sum(w x) = sum over groups of s * sum(scale level q) + bias * sum(x). Fine codes add a product of their own.
template <typename Form, int ROWS>
static SWARMD_INLINE void quantized_part(const SwarmdSegment &segment, int tile, int part, const Activations &x, int first,
                                         const uint16_t *fine_rows, Floats *sums) {
  const int groups = x.groups(), shared = Form::kHalves ? 1 : segment.group_size / kGroup;
  const uint8_t *codes = segment.codes + (static_cast<size_t>(tile) * groups * Form::kBits * 64) + part * kLanes * 4;
  const size_t first_code = static_cast<size_t>(first) * x.columns, first_group = static_cast<size_t>(first) * groups;
  const int8_t *q = x.codes + first_code, *fine_q = x.fine_codes + first_code;
  const float *s = x.scale + first_group, *fine_s = x.fine_scale + first_group;
  const float *t = Form::kHalves ? x.half_sums + 2 * first_group : x.sum + first_group;
  AffineReader reader(segment, tile, part);
  Affine affine = {zero(), zero()}, second = affine;
  for (int m = 0; m < ROWS; m++) sums[m] = zero();
  for (int g = 0; g < groups; g++) {
    if (Form::kHalves || (g & (shared - 1)) == 0) affine = reader.next();
    if (Form::kHalves) second = reader.next();
    Bytes w[8];
    load_levels<Form>(segment, codes, w);
    const unsigned fine = fine_rows[g];
#pragma GCC unroll 16
    for (int m = 0; m < ROWS; m++) {
      const size_t at = static_cast<size_t>(m) * x.columns + g * kGroup, of_group = m * groups + g;
      sums[m] = fma(scaled_dot<Form>(w, q + at, affine.scale, second.scale), set1(s[of_group]), sums[m]);
      if constexpr (Form::kHalves) {
        sums[m] = fma(affine.bias, set1(t[2 * of_group]), sums[m]);
        sums[m] = fma(second.bias, set1(t[2 * of_group + 1]), sums[m]);
      } else {
        sums[m] = fma(affine.bias, set1(t[of_group]), sums[m]);
      }
      if (__builtin_expect(fine >> m & 1, 0))
        sums[m] = fma(fine_dot<Form>(segment, codes, fine_q + at, affine.scale, second.scale), set1(fine_s[of_group]), sums[m]);
    }
    codes += Form::kBits * 64;
  }
}

template <int KIND, int ROWS>
static SWARMD_INLINE void dense_part(const SwarmdSegment &segment, int tile, int part, const Activations &x, int first,
                              Floats *sums) {
  constexpr int kWidth = KIND == SWARMD_F32 ? 4 : 2;
  const uint8_t *values = segment.codes + (static_cast<size_t>(tile) * x.columns * kTile + part * kLanes) * kWidth;
  const float *in = x.values + static_cast<size_t>(first) * x.columns;
  for (int m = 0; m < ROWS; m++) sums[m] = zero();
  for (int k = 0; k < x.columns; k++) {
    const Floats w = load_numbers<KIND>(values);
    for (int m = 0; m < ROWS; m++) sums[m] = fma(w, set1(in[static_cast<size_t>(m) * x.columns + k]), sums[m]);
    values += kTile * kWidth;
  }
}

template <typename Form, int ROWS>
static inline void rows_of_tile(const SwarmdSegment &segment, int tile, const Activations &x, int first,
                                const uint16_t *fine_rows, const Target &target) {
  for (int part = 0; part < kTile / kLanes; part++) {
    const int output = tile * kTile + part * kLanes;
    if (output >= segment.rows) return;
    Floats sums[ROWS];
    if constexpr (Form::kQuantized) {
      quantized_part<Form, ROWS>(segment, tile, part, x, first, fine_rows, sums);
    } else {
      dense_part<Form::kKind, ROWS>(segment, tile, part, x, first, sums);
    }
    for (int m = 0; m < ROWS; m++)
      put(sums[m], target.y + (first + m) * target.stride + output, segment.rows - output, target.add);
  }
}

// Which of `rows` rows have fine codes, group by group: bit m for row first + m.
static void find_fine_rows(const Activations &x, int first, int rows, uint16_t *fine_rows) {
  const int groups = x.groups();
  for (int g = 0; g < groups; g++) fine_rows[g] = 0;
  for (int m = 0; m < rows; m++) {
    const float *scale = x.fine_scale + static_cast<size_t>(first + m) * groups;
    for (int g = 0; g < groups; g++) fine_rows[g] |= static_cast<uint16_t>((scale[g] != 0) << m);
  }
}

// Tiles [begin, end) for as many blocks of ROWS rows as there are from `first` on; the first row that is left over.
template <typename Form, int ROWS>
static int blocks_of_rows(const SwarmdSegment &segment, int begin, int end, const Activations &x, int first,
                          uint16_t *fine_rows, const Target &target) {
  for (; first + ROWS <= x.rows; first += ROWS) {
    if constexpr (Form::kQuantized) find_fine_rows(x, first, ROWS, fine_rows);
    for (int tile = begin; tile < end; tile++) rows_of_tile<Form, ROWS>(segment, tile, x, first, fine_rows, target);
  }
  return first;
}

template <typename Form>
static void tiles(const SwarmdSegment &segment, int begin, int end, const Activations &x, const Target &target) {
  uint16_t *fine_rows = static_cast<uint16_t *>(__builtin_alloca((x.columns / kGroup + 1) * sizeof(uint16_t)));
  int row = 0;
  if constexpr (kMostRows >= 16) row = blocks_of_rows<Form, 16>(segment, begin, end, x, row, fine_rows, target);
  if constexpr (kMostRows >= 8) row = blocks_of_rows<Form, 8>(segment, begin, end, x, row, fine_rows, target);
  if constexpr (kMostRows >= 4) row = blocks_of_rows<Form, 4>(segment, begin, end, x, row, fine_rows, target);
  row = blocks_of_rows<Form, 2>(segment, begin, end, x, row, fine_rows, target);
  blocks_of_rows<Form, 1>(segment, begin, end, x, row, fine_rows, target);
}

template <bool HALVES>
static void quantized_tiles(const SwarmdSegment &segment, int begin, int end, const Activations &x, const Target &target) {
  if (segment.table) return tiles<Quantized<4, true, HALVES>>(segment, begin, end, x, target);
  switch (segment.bits) {
    case 2: return tiles<Quantized<2, false, HALVES>>(segment, begin, end, x, target);
    case 3: return tiles<Quantized<3, false, HALVES>>(segment, begin, end, x, target);
    case 4: return tiles<Quantized<4, false, HALVES>>(segment, begin, end, x, target);
    case 5: return tiles<Quantized<5, false, HALVES>>(segment, begin, end, x, target);
    case 6: return tiles<Quantized<6, false, HALVES>>(segment, begin, end, x, target);
    case 8: return tiles<Quantized<8, false, HALVES>>(segment, begin, end, x, target);
  }
}

static void product(const SwarmdSegment &segment, int begin, int end, const Activations &x, const Target &target) {
  switch (segment.kind) {
    case SWARMD_F32: return tiles<Dense<SWARMD_F32>>(segment, begin, end, x, target);
    case SWARMD_F16: return tiles<Dense<SWARMD_F16>>(segment, begin, end, x, target);
    case SWARMD_BF16: return tiles<Dense<SWARMD_BF16>>(segment, begin, end, x, target);
  }
  if (segment.group_size < kGroup) return quantized_tiles<true>(segment, begin, end, x, target);
  quantized_tiles<false>(segment, begin, end, x, target);
}
