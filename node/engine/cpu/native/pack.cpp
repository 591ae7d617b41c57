// Packing: canonical weights into the layout that the products read, once, at load.
//
// Sixteen rows make a tile. A tile's codes follow each other by 32 columns, whatever their scales are, and within these
// plane by plane: a code of b bits is stored as planes of its lowest 4 (or 2, or 8) bits and of what is above. A plane is made of
// chunks of 64 bytes; byte r * 4 + j of a chunk belongs to row r of the tile:
//
//   plane of 8 bits, chunk c of 8:  column 4c + j
//   plane of 4 bits, chunk c of 4:  columns 8c + j (low nibble) and 8c + 4 + j (high nibble)
//   plane of 2 bits, chunk c of 2:  columns 16c + 4i + j in bits 2i and 2i + 1, for i of 0..3
//   plane of 1 bit,  one chunk:     column 4i + j in bit i, for i of 0..7
//
// So 64 bytes are four columns of 16 rows, the operand of one AVX-512 dot product instruction, or of two with AVX2, or
// four with NEON; all of them read the same bytes.

#include <cstring>

#include "kernels.h"

namespace swarmd {
namespace {

// Puts one group's codes of one row (in lane `lane` of its tile) into a plane of `width` bits.
void pack_plane(const uint8_t *codes, int shift, int width, int lane, uint8_t *plane) {
  const int mask = (1 << width) - 1, chunks_in_byte = 8 / width;
  for (int k = 0; k < kGroup; k++) {
    const int quad = k / 4, chunk = quad / chunks_in_byte, field = quad % chunks_in_byte;
    const int value = (codes[k] >> shift) & mask;
    plane[chunk * 64 + lane * 4 + k % 4] |= static_cast<uint8_t>(value << (field * width));
  }
}

// One group's codes from the LSB-first stream that begins at `words`.
void unpack_canonical(const uint32_t *words, int bits, uint8_t *codes) {
  uint64_t window = 0;
  int filled = 0;
  for (int k = 0; k < kGroup; k++) {
    if (filled < bits) {
      window |= static_cast<uint64_t>(*words++) << filled;
      filled += 32;
    }
    codes[k] = static_cast<uint8_t>(window & ((1u << bits) - 1));
    window >>= bits;
    filled -= bits;
  }
}

void pack_group(const uint8_t *codes, int bits, int lane, uint8_t *out) {
  const int low = bits == 8 ? 8 : bits >= 4 ? 4 : 2;
  pack_plane(codes, 0, low, lane, out);
  if (bits > low) pack_plane(codes, low, bits - low, lane, out + low * 64);
}

template <int WIDTH>
void pack_numbers(size_t rows, size_t columns, const uint8_t *values, uint8_t *out) {
  for (size_t row = 0; row < rows; row++) {
    uint8_t *to = out + (row / kTile * columns * kTile + row % kTile) * WIDTH;
    const uint8_t *from = values + row * columns * WIDTH;
    for (size_t k = 0; k < columns; k++) std::memcpy(to + k * kTile * WIDTH, from + k * WIDTH, WIDTH);
  }
}

size_t tiles_for(int32_t rows) { return (static_cast<size_t>(rows) + kTile - 1) / kTile; }

}  // namespace
}  // namespace swarmd

using namespace swarmd;

void swarmd_pack(int32_t bits, int32_t rows, int32_t columns, const uint32_t *q, uint8_t *codes) {
  const int groups = columns / kGroup;
  std::memset(codes, 0, tiles_for(rows) * groups * bits * 64);
  for (int row = 0; row < rows; row++) {
    const size_t first = static_cast<size_t>(row / kTile) * groups, from = static_cast<size_t>(row) * groups;
    for (int g = 0; g < groups; g++) {
      uint8_t plain[kGroup];
      unpack_canonical(q + (from + g) * bits, bits, plain);
      pack_group(plain, bits, row % kTile, codes + (first + g) * bits * 64);
    }
  }
}

void swarmd_pack_numbers(int32_t width, int32_t rows, int32_t columns, const uint8_t *values, uint8_t *out) {
  std::memset(out, 0, tiles_for(rows) * columns * kTile * width);
  switch (width) {
    case 1: return pack_numbers<1>(rows, columns, values, out);
    case 2: return pack_numbers<2>(rows, columns, values, out);
    case 4: return pack_numbers<4>(rows, columns, values, out);
  }
}
