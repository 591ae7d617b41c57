// Products of a segment's tiles with rows of activations. A vector lane is a row of the matrix; every output is summed
// up group by group in the same order whatever else is in the step, so rows do not depend on each other's company.

// The codes of one group of 32 columns: chunk c of the result holds columns 4c..4c+3 of each lane's row. With `bits`
// other than 8 they are stored in planes of 4, 2 and 1 bits, the lowest first (pack.cpp draws them).
template <int BITS>
static inline void unpack(const uint8_t *group, Bytes *w) {
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

template <int BITS>
static inline Floats dot_product(const Bytes *w, const int8_t *codes) {
  Dot<BITS> dot;
#pragma GCC unroll 8
  for (int c = 0; c < 8; c++) dot.add(w[c], codes + 4 * c);
  return dot.total();
}

// One part of a tile (kLanes of its rows) times ROWS rows of activations: with w = code * scale + bias and x = q * s,
// sum(w x) = sum over groups of scale * s * sum(code q) + bias * s * sum(q). Fine codes add a product of their own.
template <int BITS, int ROWS>
static inline void quantized_part(const SwarmdSegment &segment, int tile, int part, const Activations &x, int first,
                                  const uint16_t *fine_rows, Floats *sums) {
  const int groups = x.groups(), scales_of_group = segment.biased ? 2 * kTile : kTile;
  const uint8_t *codes = segment.codes + (static_cast<size_t>(tile) * groups * BITS * 64) + part * kLanes * 4;
  const uint16_t *scales = segment.scales + static_cast<size_t>(tile) * groups * scales_of_group + part * kLanes;
  const size_t first_code = static_cast<size_t>(first) * x.columns, first_group = static_cast<size_t>(first) * groups;
  const int8_t *q = x.codes + first_code, *fine_q = x.fine_codes + first_code;
  const float *s = x.scale + first_group, *fine_s = x.fine_scale + first_group, *t = x.sum + first_group;
  for (int m = 0; m < ROWS; m++) sums[m] = zero();
  for (int g = 0; g < groups; g++) {
    Bytes w[8];
    unpack<BITS>(codes, w);
    const Floats scale = load_half(scales);
    const Floats bias = segment.biased ? load_half(scales + kTile) : mul(scale, set1(-(1 << (BITS - 1))));
    const unsigned fine = fine_rows[g];
#pragma GCC unroll 16
    for (int m = 0; m < ROWS; m++) {
      const size_t at = static_cast<size_t>(m) * x.columns + g * kGroup;
      sums[m] = fma(mul(dot_product<BITS>(w, q + at), set1(s[m * groups + g])), scale, sums[m]);
      sums[m] = fma(bias, set1(t[m * groups + g]), sums[m]);
      if (__builtin_expect(fine >> m & 1, 0))
        sums[m] = fma(mul(dot_product<BITS>(w, fine_q + at), set1(fine_s[m * groups + g])), scale, sums[m]);
    }
    codes += BITS * 64;
    scales += scales_of_group;
  }
}

template <int KIND>
static inline Floats load_values(const uint8_t *p) {
  if constexpr (KIND == SWARMD_F32) return load(reinterpret_cast<const float *>(p));
  if constexpr (KIND == SWARMD_F16) return load_half(reinterpret_cast<const uint16_t *>(p));
  return load_bf16(reinterpret_cast<const uint16_t *>(p));
}

template <int KIND, int ROWS>
static inline void dense_part(const SwarmdSegment &segment, int tile, int part, const Activations &x, int first,
                              Floats *sums) {
  constexpr int kWidth = KIND == SWARMD_F32 ? 4 : 2;
  const uint8_t *values = segment.codes + (static_cast<size_t>(tile) * x.columns * kTile + part * kLanes) * kWidth;
  const float *in = x.values + static_cast<size_t>(first) * x.columns;
  for (int m = 0; m < ROWS; m++) sums[m] = zero();
  for (int k = 0; k < x.columns; k++) {
    const Floats w = load_values<KIND>(values);
    for (int m = 0; m < ROWS; m++) sums[m] = fma(w, set1(in[static_cast<size_t>(m) * x.columns + k]), sums[m]);
    values += kTile * kWidth;
  }
}

// FORM is the number of bits, or minus the kind of a dense segment minus one.
template <int FORM, int ROWS>
static inline void rows_of_tile(const SwarmdSegment &segment, int tile, const Activations &x, int first,
                                const uint16_t *fine_rows, const Target &target) {
  for (int part = 0; part < kTile / kLanes; part++) {
    const int output = tile * kTile + part * kLanes;
    if (output >= segment.rows) return;
    Floats sums[ROWS];
    if constexpr (FORM > 0) {
      quantized_part<FORM, ROWS>(segment, tile, part, x, first, fine_rows, sums);
    } else {
      dense_part<-FORM - 1, ROWS>(segment, tile, part, x, first, sums);
    }
    for (int m = 0; m < ROWS; m++)
      put(sums[m], target.y + (first + m) * target.stride + output, segment.rows - output, target.add);
  }
}

// Which of ROWS rows have fine codes, group by group: bit m for row first + m.
template <int ROWS>
static inline void find_fine_rows(const Activations &x, int first, uint16_t *fine_rows) {
  const int groups = x.groups();
  for (int g = 0; g < groups; g++) {
    unsigned found = 0;
    for (int m = 0; m < ROWS; m++)
      found |= static_cast<unsigned>(x.fine_scale[static_cast<size_t>(first + m) * groups + g] != 0) << m;
    fine_rows[g] = static_cast<uint16_t>(found);
  }
}

// Tiles [begin, end) for as many blocks of ROWS rows as there are from `first` on; the first row that is left over.
template <int FORM, int ROWS>
static int blocks_of_rows(const SwarmdSegment &segment, int begin, int end, const Activations &x, int first,
                          uint16_t *fine_rows, const Target &target) {
  for (; first + ROWS <= x.rows; first += ROWS) {
    if constexpr (FORM > 0) find_fine_rows<ROWS>(x, first, fine_rows);
    for (int tile = begin; tile < end; tile++) rows_of_tile<FORM, ROWS>(segment, tile, x, first, fine_rows, target);
  }
  return first;
}

template <int FORM>
static void tiles(const SwarmdSegment &segment, int begin, int end, const Activations &x, const Target &target) {
  uint16_t *fine_rows = static_cast<uint16_t *>(__builtin_alloca((x.columns / kGroup + 1) * sizeof(uint16_t)));
  int row = 0;
  if constexpr (kMostRows >= 16) row = blocks_of_rows<FORM, 16>(segment, begin, end, x, row, fine_rows, target);
  if constexpr (kMostRows >= 8) row = blocks_of_rows<FORM, 8>(segment, begin, end, x, row, fine_rows, target);
  row = blocks_of_rows<FORM, 4>(segment, begin, end, x, row, fine_rows, target);
  row = blocks_of_rows<FORM, 2>(segment, begin, end, x, row, fine_rows, target);
  blocks_of_rows<FORM, 1>(segment, begin, end, x, row, fine_rows, target);
}

static void product(const SwarmdSegment &segment, int begin, int end, const Activations &x, const Target &target) {
  switch (segment.kind == SWARMD_QUANTIZED ? segment.bits : -segment.kind - 1) {
    case 2: return tiles<2>(segment, begin, end, x, target);
    case 3: return tiles<3>(segment, begin, end, x, target);
    case 4: return tiles<4>(segment, begin, end, x, target);
    case 5: return tiles<5>(segment, begin, end, x, target);
    case 6: return tiles<6>(segment, begin, end, x, target);
    case 8: return tiles<8>(segment, begin, end, x, target);
    case -SWARMD_F32 - 1: return tiles<-SWARMD_F32 - 1>(segment, begin, end, x, target);
    case -SWARMD_F16 - 1: return tiles<-SWARMD_F16 - 1>(segment, begin, end, x, target);
    case -SWARMD_BF16 - 1: return tiles<-SWARMD_BF16 - 1>(segment, begin, end, x, target);
  }
}
