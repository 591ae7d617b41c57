// Scales and biases as a file has them, read lane by lane: they are never kept in memory as anything larger.

template <int KIND>
static SWARMD_INLINE Floats load_numbers(const uint8_t *p) {
  if constexpr (KIND == SWARMD_F32) return load(reinterpret_cast<const float *>(p));
  if constexpr (KIND == SWARMD_F16) return load_half(reinterpret_cast<const uint16_t *>(p));
  if constexpr (KIND == SWARMD_BF16) return load_bf16(reinterpret_cast<const uint16_t *>(p));
  if constexpr (KIND == SWARMD_I8) return load_signed_bytes(p);
  return load_unsigned_bytes(p);
}

// The scales, or the biases, of one part of a tile (kLanes of its rows), group after group.
struct NumberReader {
  int kind, step, per_super, left;
  const uint8_t *at;
  const uint16_t *super;

  SWARMD_INLINE NumberReader(const SwarmdScales &from, size_t tile, int part, size_t groups)
      : kind(from.kind),
        step(kTile * width_of(from.kind)),
        per_super(from.per_super),
        left(from.per_super),
        at(from.values + (tile * groups * kTile + part * kLanes) * width_of(from.kind)),
        super(from.supers ? from.supers + tile * (groups / from.per_super) * kTile + part * kLanes : nullptr) {}

  SWARMD_INLINE Floats next() {
    const uint8_t *p = at;
    at += step;
    switch (kind) {
      case SWARMD_F16: return load_numbers<SWARMD_F16>(p);
      case SWARMD_BF16: return load_numbers<SWARMD_BF16>(p);
      case SWARMD_F32: return load_numbers<SWARMD_F32>(p);
      case SWARMD_I8: return times_super(load_numbers<SWARMD_I8>(p));
      default: return times_super(load_numbers<SWARMD_U8>(p));
    }
  }

  // Exact: the product of both levels has at most 19 significant bits.
  SWARMD_INLINE Floats times_super(Floats small) {
    const Floats out = mul(small, load_half(super));
    if (--left == 0) {
      left = per_super;
      super += kTile;
    }
    return out;
  }
};

// What makes levels into weights: w = level * scale + bias.
struct Affine {
  Floats scale, bias;
};

struct AffineReader {
  bool implied;
  Floats minus_offset;
  NumberReader scales, biases;

  SWARMD_INLINE AffineReader(const SwarmdSegment &segment, size_t tile, int part)
      : implied(!segment.bias.values),
        minus_offset(set1(static_cast<float>(-segment.offset))),
        scales(segment.scale, tile, part, segment.columns / segment.group_size),
        biases(implied ? segment.scale : segment.bias, tile, part, segment.columns / segment.group_size) {}

  SWARMD_INLINE Affine next() {
    Affine out;
    out.scale = scales.next();
    out.bias = implied ? mul(out.scale, minus_offset) : biases.next();
    return out;
  }
};

// One row's scale, or bias, of one group, as `NumberReader` has it.
static inline float number_at(const SwarmdScales &from, int row, size_t groups, size_t group) {
  const size_t tile = row / kTile, lane = row % kTile, at = (tile * groups + group) * kTile + lane;
  const uint8_t *p = from.values + at * width_of(from.kind);
  uint16_t half;
  float value;
  switch (from.kind) {
    case SWARMD_F32: __builtin_memcpy(&value, p, 4); return value;
    case SWARMD_I8: value = static_cast<int8_t>(*p); break;
    case SWARMD_U8: value = *p; break;
    default:
      __builtin_memcpy(&half, p, 2);
      return from.kind == SWARMD_F16 ? half_to_float(half) : bf16_to_float(half);
  }
  const size_t supers = groups / from.per_super;
  return value * half_to_float(from.supers[(tile * supers + group / from.per_super) * kTile + lane]);
}
