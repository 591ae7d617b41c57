// The path of 64-bit ARM with the dot product extension: Apple silicon, Raspberry Pi 5, servers since 2019.
#include "kernels.h"

#if defined(__aarch64__)
#if defined(__linux__)
#include <sys/auxv.h>
#endif

#if defined(__clang__)
// Before version 16 its header has the dot product only where the whole file may use it.
#if !defined(__ARM_FEATURE_DOTPROD)
#define __ARM_FEATURE_DOTPROD 1
#endif
#pragma clang attribute push(__attribute__((target("dotprod"))), apply_to = function)
#include <arm_neon.h>
#else
#include <arm_neon.h>
#pragma GCC target("arch=armv8.2-a+dotprod")
#endif

namespace swarmd {
namespace neon {
constexpr const char *kName = "neon-dotprod";
#include "simd_neon.h"
#include "kernels.inl"
}  // namespace neon
}  // namespace swarmd

#if defined(__clang__)
#pragma clang attribute pop
#endif

const swarmd::Kernels *swarmd::kernels_neon() {
#if defined(__linux__)
  constexpr unsigned long kDotProduct = 1ul << 20;  // HWCAP_ASIMDDP
  return getauxval(AT_HWCAP) & kDotProduct ? &neon::table : nullptr;
#else
  return &neon::table;  // every Apple silicon has it
#endif
}
#else
const swarmd::Kernels *swarmd::kernels_neon() { return nullptr; }
#endif
