// A step of a stage, and a single product, on a team of threads.
#pragma once

#include "kernels.h"
#include "thread_pool.h"

namespace swarmd {

// Takes 64-byte aligned pieces of a workspace one after the other; with no memory behind it, it only adds up.
class Arena {
 public:
  explicit Arena(void *memory) : at_(static_cast<char *>(memory)) {}

  template <typename T>
  T *take(size_t count) {
    char *piece = at_ ? at_ + used_ : nullptr;
    used_ += (count * sizeof(T) + 63) / 64 * 64;
    return reinterpret_cast<T *>(piece);
  }
  size_t used() const { return used_; }

 private:
  char *at_;
  size_t used_ = 0;
};

// Room for `rows` activations of up to `columns`, as values and as codes.
Activations take_activations(Arena &arena, int rows, int columns);

// This thread's share of y = x * W^T (or y += ...); the others do theirs. No barrier.
void multiply(Team &team, const SwarmdMatrix &matrix, const Activations &x, float *y, size_t stride, bool add);

int tiles_of(const SwarmdMatrix &matrix);
// Tiles [begin, end) of that product, counted over all segments.
void multiply_tiles(const SwarmdMatrix &matrix, int begin, int end, const Activations &x, const Target &target);

// Whether any segment wants its activations quantized.
bool any_quantized(const SwarmdMatrix &matrix);

}  // namespace swarmd

struct SwarmdPool : swarmd::ThreadPool {
  using swarmd::ThreadPool::ThreadPool;
};
