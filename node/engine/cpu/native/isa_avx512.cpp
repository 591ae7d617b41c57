// The path of CPUs with AVX-512 and VNNI: x86 servers since 2019, AMD since Zen 4.
#include "kernels.h"

#if defined(__x86_64__)
#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,fma,f16c,prefer-vector-width=512")
#endif

namespace swarmd {
namespace avx512 {
constexpr const char *kName = "avx512-vnni";
#include "simd_avx512.h"
#include "kernels.inl"
}  // namespace avx512
}  // namespace swarmd

#if defined(__clang__)
#pragma clang attribute pop
#endif

const swarmd::Kernels *swarmd::kernels_avx512() {
  __builtin_cpu_init();
  const bool there = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                     __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                     __builtin_cpu_supports("avx512vnni");
  return there ? &avx512::table : nullptr;
}
#else
const swarmd::Kernels *swarmd::kernels_avx512() { return nullptr; }
#endif
