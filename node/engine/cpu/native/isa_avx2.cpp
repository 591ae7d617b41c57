// The path of CPUs with AVX2: x86 since 2013 (Intel) and 2015 (AMD).
#include "kernels.h"

#if defined(__x86_64__)
#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif

namespace swarmd {
namespace avx2 {
constexpr const char *kName = "avx2";
#include "simd_avx2.h"
#include "kernels.inl"
}  // namespace avx2
}  // namespace swarmd

#if defined(__clang__)
#pragma clang attribute pop
#endif

const swarmd::Kernels *swarmd::kernels_avx2() {
  __builtin_cpu_init();
  const bool there = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  return there ? &avx2::table : nullptr;
}
#else
const swarmd::Kernels *swarmd::kernels_avx2() { return nullptr; }
#endif
