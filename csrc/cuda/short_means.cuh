// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the vllm_clusterkv project
//
// Codes of means as tensor cores take them. vllm_clusterkv/short_means.py has the format.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "../params.h"

namespace clusterkv::cuda {

// Pair `i`, 0 to 3, of a word's codes as two 16-bit numbers, kRaised + 2 code, exactly: or-ed with
// the bits of a power of 2, twice a code is that much more.
template <typename T>
constexpr float kRaised = 128.0f;
template <>
constexpr float kRaised<__half> = 1024.0f;

template <typename T>
__device__ __forceinline__ uint32_t raised_pair(uint32_t word, int i) {
  constexpr uint32_t kPower = kRaised<T> == 128.0f ? 0x43004300u : 0x64006400u;
  return ((i == 0 ? word << 1 : word >> (4 * i - 1)) & 0x001e001eu) | kPower;
}

// Likewise, less the middle: 2 (code - 7.5), exactly.
template <typename T>
__device__ __forceinline__ uint32_t code_pair(uint32_t word, int i);

template <>
__device__ __forceinline__ uint32_t code_pair<__nv_bfloat16>(uint32_t word, int i) {
  const uint32_t raised = raised_pair<__nv_bfloat16>(word, i);
  const __nv_bfloat162 pair =
      __hsub2(reinterpret_cast<const __nv_bfloat162&>(raised),
              __float2bfloat162_rn(kRaised<__nv_bfloat16> + 2 * kMiddleCode));
  return reinterpret_cast<const uint32_t&>(pair);
}

template <>
__device__ __forceinline__ uint32_t code_pair<__half>(uint32_t word, int i) {
  const uint32_t raised = raised_pair<__half>(word, i);
  const __half2 pair = __hsub2(reinterpret_cast<const __half2&>(raised),
                               __float2half2_rn(kRaised<__half> + 2 * kMiddleCode));
  return reinterpret_cast<const uint32_t&>(pair);
}

// Products of two pairs.
template <typename T>
__device__ __forceinline__ uint32_t multiply_pairs(uint32_t a, uint32_t b);

template <>
__device__ __forceinline__ uint32_t multiply_pairs<__nv_bfloat16>(uint32_t a, uint32_t b) {
  const __nv_bfloat162 product = __hmul2(reinterpret_cast<const __nv_bfloat162&>(a),
                                         reinterpret_cast<const __nv_bfloat162&>(b));
  return reinterpret_cast<const uint32_t&>(product);
}

template <>
__device__ __forceinline__ uint32_t multiply_pairs<__half>(uint32_t a, uint32_t b) {
  const __half2 product =
      __hmul2(reinterpret_cast<const __half2&>(a), reinterpret_cast<const __half2&>(b));
  return reinterpret_cast<const uint32_t&>(product);
}

// kWords words that lie side by side, past the L1 cache.
template <int kWords>
__device__ __forceinline__ void load_words(const uint8_t* source, uint32_t (&words)[kWords]) {
  if constexpr (kWords % 4 == 0) {
#pragma unroll
    for (int i = 0; i < kWords; i += 4) {
      const uint4 four = __ldcg(reinterpret_cast<const uint4*>(source) + i / 4);
      words[i] = four.x;
      words[i + 1] = four.y;
      words[i + 2] = four.z;
      words[i + 3] = four.w;
    }
  } else if constexpr (kWords % 2 == 0) {
#pragma unroll
    for (int i = 0; i < kWords; i += 2) {
      const uint2 two = __ldcg(reinterpret_cast<const uint2*>(source) + i / 2);
      words[i] = two.x;
      words[i + 1] = two.y;
    }
  } else {
#pragma unroll
    for (int i = 0; i < kWords; ++i)
      words[i] = __ldcg(reinterpret_cast<const uint32_t*>(source) + i);
  }
}

}  // namespace clusterkv::cuda
