// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the vllm_clusterkv project
//
// Row primitives of the CPU kernels, written as plain loops that compilers turn
// into vector code for the architecture they are told to build for.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>
#include <cstring>

namespace clusterkv::cpu {

using BFloat16 = c10::BFloat16;
using Half = c10::Half;

inline void load_row(const float* __restrict src, float* __restrict dst, int64_t n) {
  std::memcpy(dst, src, n * sizeof(float));
}

inline void load_row(const BFloat16* __restrict src, float* __restrict dst, int64_t n) {
  const auto* bits = reinterpret_cast<const uint16_t*>(src);
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    dst[i] = __builtin_bit_cast(float, static_cast<uint32_t>(bits[i]) << 16);
  }
}

// fp16 by integer arithmetic: without _Float16 in every compiler, this is what
// vectorizes. Exponent and mantissa move to fp32 place; a multiplication
// by 2^112 rebiases the exponent and normalises subnormals; infinity and NaN keep
// an all-ones exponent.
inline void load_row(const Half* __restrict src, float* __restrict dst, int64_t n) {
  const auto* bits = reinterpret_cast<const uint16_t*>(src);
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t sign = static_cast<uint32_t>(bits[i] & 0x8000u) << 16;
    const uint32_t magnitude = static_cast<uint32_t>(bits[i] & 0x7fffu) << 13;
    const float scaled = __builtin_bit_cast(float, magnitude) * 0x1p112f;
    const uint32_t special = magnitude >= 0x0f800000u ? 0x7f800000u : 0u;
    dst[i] = __builtin_bit_cast(float, __builtin_bit_cast(uint32_t, scaled) | special | sign);
  }
}

template <typename T>
inline void store_row(const float* __restrict src, T* __restrict dst, int64_t n) {
  for (int64_t i = 0; i < n; ++i) dst[i] = static_cast<T>(src[i]);
}

inline float dot(const float* __restrict a, const float* __restrict b, int64_t n) {
  float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) sum += a[i] * b[i];
  return sum;
}

// e^x to 2.5e-7 relative, for x <= 88; 0 below -87. Range reduction to
// [-ln2/2, ln2/2] and a degree-6 polynomial, so that loops over it vectorize.
inline float fast_exp(float x) {
  const float clamped = x < -87.0f ? -87.0f : x;
  const float shifted = clamped * 1.44269504f + 12582912.0f;  // 1.5 * 2^23 rounds to integer
  const float n = shifted - 12582912.0f;
  const float r = (clamped - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const uint32_t exponent = __builtin_bit_cast(uint32_t, shifted) - 0x4b400000u + 127u;
  const float power = __builtin_bit_cast(float, exponent << 23);
  return x < -87.0f ? 0.0f : p * power;
}

}  // namespace clusterkv::cpu
