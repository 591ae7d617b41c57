// The path of everything else: plain C++, which the compiler may vectorize.
#include "kernels.h"

namespace swarmd {
namespace portable {
constexpr const char *kName = "portable";
#include "simd_portable.h"
#include "kernels.inl"
}  // namespace portable
}  // namespace swarmd

const swarmd::Kernels *swarmd::kernels_portable() { return &portable::table; }
