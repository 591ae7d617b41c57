// One product with all threads of a team, and the room for what goes into it.
#include <algorithm>
#include <cstring>

#include "stage.h"

namespace swarmd {

Activations take_activations(Arena &arena, int rows, int columns) {
  const size_t values = static_cast<size_t>(rows) * columns, groups = static_cast<size_t>(rows) * (columns / kGroup);
  Activations out = {};
  out.rows = rows;
  out.columns = columns;
  out.values = arena.take<float>(values);
  out.codes = arena.take<int8_t>(values);
  out.fine_codes = arena.take<int8_t>(values);
  out.scale = arena.take<float>(groups);
  out.fine_scale = arena.take<float>(groups);
  out.sum = arena.take<float>(groups);
  out.half_sums = arena.take<float>(2 * groups);
  return out;
}

int tiles_of(const SwarmdMatrix &matrix) {
  int total = 0;
  for (int i = 0; i < matrix.count; i++) total += tiles_of(matrix.segments[i]);
  return total;
}

void multiply_tiles(const SwarmdMatrix &matrix, int begin, int end, const Activations &x, const Target &target) {
  int first_tile = 0, first_row = 0;
  for (int i = 0; i < matrix.count; i++) {
    const SwarmdSegment &segment = matrix.segments[i];
    const int count = tiles_of(segment), from = std::max(begin - first_tile, 0), to = std::min(end - first_tile, count);
    if (from < to) kernels().product(segment, from, to, x, {target.y + first_row, target.stride, target.add});
    first_tile += count;
    first_row += segment.rows;
  }
}

void multiply(Team &team, const SwarmdMatrix &matrix, const Activations &x, float *y, size_t stride, bool add) {
  constexpr int kPiecesPerThread = 6;
  const int total = tiles_of(matrix), piece = std::max(1, total / (team.threads() * kPiecesPerThread));
  for (int begin = team.take(piece); begin < total; begin = team.take(piece))
    multiply_tiles(matrix, begin, std::min(begin + piece, total), x, {y, stride, add});
}

bool any_quantized(const SwarmdMatrix &matrix) {
  return std::any_of(matrix.segments, matrix.segments + matrix.count,
                     [](const SwarmdSegment &segment) { return segment.kind == SWARMD_QUANTIZED; });
}

}  // namespace swarmd

using namespace swarmd;

size_t swarmd_linear_workspace(const SwarmdMatrix *matrix, int32_t rows) {
  Arena arena(nullptr);
  take_activations(arena, rows, matrix->columns);
  return arena.used();
}

void swarmd_linear(SwarmdPool *pool, const SwarmdMatrix *matrix, const float *x, int32_t rows, float *y,
                   void *workspace) {
  Arena arena(workspace);
  Activations in = take_activations(arena, rows, matrix->columns);
  if (!any_quantized(*matrix)) in.codes = nullptr;
  std::memcpy(in.values, x, sizeof(float) * rows * matrix->columns);
  pool->run([&](Team &team, int) {
    for (int row = team.take(1); row < rows; row = team.take(1)) kernels().prepare(nullptr, nullptr, 0, in, row);
    team.meet();
    multiply(team, *matrix, in, y, matrix->rows, false);
  });
}
