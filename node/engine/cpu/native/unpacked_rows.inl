// One row of a segment as fp32, exactly as the canonical form defines it: code * scale + bias, rounded once.

template <int BITS>
static inline void quantized_row(const SwarmdSegment &segment, int row, float *out) {
  const int groups = segment.columns / kGroup, lane = row % kTile, part = lane / kLanes;
  const int scales_of_group = segment.biased ? 2 * kTile : kTile;
  const size_t first = static_cast<size_t>(row / kTile) * groups;
  for (int g = 0; g < groups; g++) {
    Bytes w[8];
    unpack<BITS>(segment.codes + (first + g) * BITS * 64 + part * kLanes * 4, w);
    const uint16_t *scales = segment.scales + (first + g) * scales_of_group + lane;
    const float scale = half_to_float(scales[0]);
    const float bias = segment.biased ? half_to_float(scales[kTile]) : scale * -(1 << (BITS - 1));
    for (int k = 0; k < kGroup; k++) {
      uint8_t lanes[4 * kLanes];
      __builtin_memcpy(lanes, &w[k / 4], sizeof lanes);
      out[g * kGroup + k] = static_cast<float>(lanes[lane % kLanes * 4 + k % 4]) * scale + bias;
    }
  }
}

static void rows(const SwarmdSegment &segment, int row, float *out) {
  const size_t first = static_cast<size_t>(row / kTile) * segment.columns * kTile + row % kTile;
  switch (segment.kind) {
    case SWARMD_F32:
      for (int k = 0; k < segment.columns; k++)
        __builtin_memcpy(out + k, segment.codes + (first + static_cast<size_t>(k) * kTile) * 4, 4);
      return;
    case SWARMD_F16:
    case SWARMD_BF16:
      for (int k = 0; k < segment.columns; k++) {
        uint16_t bits;
        __builtin_memcpy(&bits, segment.codes + (first + static_cast<size_t>(k) * kTile) * 2, 2);
        out[k] = segment.kind == SWARMD_F16 ? half_to_float(bits) : bf16_to_float(bits);
      }
      return;
  }
  switch (segment.bits) {
    case 2: return quantized_row<2>(segment, row, out);
    case 3: return quantized_row<3>(segment, row, out);
    case 4: return quantized_row<4>(segment, row, out);
    case 5: return quantized_row<5>(segment, row, out);
    case 6: return quantized_row<6>(segment, row, out);
    case 8: return quantized_row<8>(segment, row, out);
  }
}
