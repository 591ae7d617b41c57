// The choice of a code path, and the small functions of the C interface.
#include <cstring>
#include <initializer_list>

#include "kernels.h"

namespace swarmd {
namespace {

const Kernels *best_kernels() {
  for (const auto find : {kernels_avx512, kernels_avx2, kernels_neon})
    if (const Kernels *found = find()) return found;
  return kernels_portable();
}

const Kernels *&selected() {
  static const Kernels *kernels = best_kernels();
  return kernels;
}

}  // namespace

const Kernels &kernels() { return *selected(); }

}  // namespace swarmd

using namespace swarmd;

int32_t swarmd_abi(void) { return SWARMD_ABI; }

const char *swarmd_isa(void) { return kernels().name; }

int32_t swarmd_select(const char *isa) {
  for (const auto find : {kernels_avx512, kernels_avx2, kernels_neon, kernels_portable}) {
    const Kernels *found = find();
    if (found && std::strcmp(found->name, isa) == 0) {
      selected() = found;
      return 0;
    }
  }
  return -1;
}

void swarmd_rows(const SwarmdMatrix *matrix, const int32_t *ids, int32_t count, float *out) {
  for (int i = 0; i < count; i++) {
    int row = ids[i];
    const SwarmdSegment *segment = matrix->segments;
    for (; row >= segment->rows; segment++) row -= segment->rows;
    kernels().rows(*segment, row, out + static_cast<size_t>(i) * matrix->columns);
  }
}

void swarmd_summarize(const float *logits, int32_t rows, int32_t vocab, SwarmdSummary *summaries) {
  for (int row = 0; row < rows; row++) summaries[row] = kernels().summarize(logits + static_cast<size_t>(row) * vocab, vocab);
}
