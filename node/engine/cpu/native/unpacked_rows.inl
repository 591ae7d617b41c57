// One row of a segment as fp32, exactly as the canonical form defines it: level * scale + bias, each rounded once, or
// (level - offset) * scale.

template <typename Form>
static inline void quantized_row(const SwarmdSegment &segment, int row, float *out) {
  const int chunks = segment.columns / kGroup, groups = segment.columns / segment.group_size;
  const int lane = row % kTile, part = lane / kLanes;
  const size_t first = static_cast<size_t>(row / kTile) * chunks;
  for (int chunk = 0; chunk < chunks; chunk++) {
    Bytes w[8];
    load_levels<Form>(segment, segment.codes + (first + chunk) * Form::kBits * 64 + part * kLanes * 4, w);
    for (int k = 0; k < kGroup; k++) {
      const int column = chunk * kGroup + k, group = column / segment.group_size;
      uint8_t lanes[4 * kLanes];
      __builtin_memcpy(lanes, &w[k / 4], sizeof lanes);
      const int level = lanes[lane % kLanes * 4 + k % 4];
      const float scale = number_at(segment.scale, row, groups, group);
      out[column] = segment.bias.values
                        ? static_cast<float>(level) * scale + number_at(segment.bias, row, groups, group)
                        : static_cast<float>(level - segment.offset) * scale;
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
  if (segment.table) return quantized_row<Quantized<4, true>>(segment, row, out);
  switch (segment.bits) {
    case 2: return quantized_row<Quantized<2>>(segment, row, out);
    case 3: return quantized_row<Quantized<3>>(segment, row, out);
    case 4: return quantized_row<Quantized<4>>(segment, row, out);
    case 5: return quantized_row<Quantized<5>>(segment, row, out);
    case 6: return quantized_row<Quantized<6>>(segment, row, out);
    case 8: return quantized_row<Quantized<8>>(segment, row, out);
  }
}
