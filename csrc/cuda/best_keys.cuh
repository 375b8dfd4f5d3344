// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the vllm_clusterkv project
//
// The best coded key of each cluster, by tensor cores: a step's codes (16 columns, the rows
// of a fragment) against the query heads of one KV head. A key's product is the sum of
// weight * (2 code - 3) over the coded dimensions, with weight = query * deviation.
//
// A code is taken for bits of an fp16 number below 2^-14: code * 2^-24, or 4, 16 or 64 times
// that, for which the weight is divided by as much. So a mask makes fragments of codes. What
// the 3 takes off is a product with fragments of ones. Since a step has one key of every column,
// the best of a column is a maximum over a lane's own accumulators.
#pragma once

#include <cstdint>

#include "../params.h"
#include "ptx.cuh"

namespace clusterkv::cuda {

// 2^24, what a code in the lowest bits counts less than its number.
constexpr float kCodeUnit = 16777216.0f;

// The codes of a page and KV head, in shared memory.
template <int kHeadSize>
struct PageCodes {
  static constexpr int kDims = static_cast<int>(num_coded_dims(kHeadSize));
  static constexpr int kFours = kDims / 16;  // that a lane has of a step
  static constexpr int kWords = kDims / 2;   // that a lane has of all steps
  static_assert(kCodeSteps * kFours == 2 * kWords);

  // Two fours share a word. If they are of one step, the upper one's codes stay where they are.
  static constexpr bool is_upper(int four) { return kFours > 1 && four % 2 == 1; }

  uint16_t deviations[kDims];  // of 16-bit type
  uint16_t dims[kDims];
  uint4 words[kWords / 4][32];
};

static_assert(sizeof(PageCodes<64>) == code_bytes(64, 2));
static_assert(sizeof(PageCodes<128>) == code_bytes(128, 2));
static_assert(sizeof(PageCodes<256>) == code_bytes(256, 2));

// The query heads of a row and KV head, in shared memory. Heads have their 8 columns of 16
// bytes in different orders, so that neither a fragment's, nor an element of 8 heads, are in
// the same banks.
template <typename T, int kHeadSize, int kHeadTiles>
struct SharedQuery {
  static constexpr int kStride = (kHeadSize + 63) / 64 * 64;
  T elements[8 * kHeadTiles * kStride];

  // What goes on top of a column, bit by bit.
  static __device__ __forceinline__ int order(int head) {
    return (head & 1) << 5 | (head & 6) << 2;
  }
  __device__ __forceinline__ T* at(int head, int col) {
    return elements + head * kStride + (col ^ order(head));
  }
};

// A warp copies a page's codes to shared memory: without `all`, the deviations, the
// dimensions, and half of the steps.
template <int kHeadSize>
__device__ __forceinline__ void fetch_codes(PageCodes<kHeadSize>& codes, const uint8_t* source,
                                            bool all, bool second_half) {
  using Codes = PageCodes<kHeadSize>;
  constexpr int kHead = 4 * Codes::kDims / 16, kChunks = sizeof(Codes) / 16;  // of 16 bytes
  constexpr int kHalf = (kChunks - kHead) / 2;
  const int lane = threadIdx.x % 32;
  const uint32_t target = smem_address(&codes);
  const int skipped = second_half ? kHead : kHead + kHalf;
#pragma unroll
  for (int i = 0; i < (kChunks + 31) / 32; ++i) {
    const int chunk = i * 32 + lane;
    const bool is_skipped = !all && chunk >= skipped && chunk < skipped + kHalf;
    if (chunk < kChunks && !is_skipped) cp_async_16(target + chunk * 16, source + chunk * 16, true);
  }
}

// Weights of the coded dimensions, as columns of a fragment: of head `g` of each tile, in
// fp16, divided by what the place of their codes multiplies those with.
template <typename T, int kHeadSize, int kHeadTiles>
__device__ __forceinline__ void load_weights(
    const PageCodes<kHeadSize>& codes, SharedQuery<T, kHeadSize, kHeadTiles>& query,
    uint32_t (&weights)[kHeadTiles][PageCodes<kHeadSize>::kFours][2]) {
  using Codes = PageCodes<kHeadSize>;
  const int lane = threadIdx.x % 32, g = lane / 4, j = lane % 4;
  constexpr int kDims = Codes::kDims / 4;  // of a lane
#pragma unroll
  for (int i = 0; i < kDims; i += 4) {
    uint2 dims = *reinterpret_cast<const uint2*>(codes.dims + j * kDims + i);
    dims.x ^= query.order(g) * 0x00010001u;
    dims.y ^= query.order(g) * 0x00010001u;
    const uint32_t places[4] = {dims.x & 0xffff, dims.x >> 16, dims.y & 0xffff, dims.y >> 16};
    const uint2 pairs = *reinterpret_cast<const uint2*>(codes.deviations + j * kDims + i);
    const float2 low = unpack<T>(pairs.x), high = unpack<T>(pairs.y);
    const float deviations[4] = {low.x, low.y, high.x, high.y};
#pragma unroll
    for (int t = 0; t < kHeadTiles; ++t) {
      const T* head = query.elements + (t * 8 + g) * query.kStride;
      float weight[4];
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const float asked = static_cast<float>(head[places[k]]);
        weight[k] = clamp_or_nan(asked * deviations[k], kLargestWeight);
      }
      const float unit = Codes::is_upper(i / 4) ? 1.0f / 16 : 1.0f;
      weights[t][i / 4][0] = pack<__half>(unit * weight[0], unit * weight[1]);
      weights[t][i / 4][1] = pack<__half>(unit / 4 * weight[2], unit / 4 * weight[3]);
    }
  }
}

// The best keys' products, each cluster's where its score is: rows g and g + 8 of the
// fragment. Of the steps in `num` fours of a lane's words, from `first` on.
template <int kHeadSize, int kHeadTiles>
__device__ __forceinline__ void best_products(
    const PageCodes<kHeadSize>& codes,
    const uint32_t (&weights)[kHeadTiles][PageCodes<kHeadSize>::kFours][2], int first, int num,
    float (&best)[kHeadTiles][4]) {
  using Codes = PageCodes<kHeadSize>;
  constexpr int kFours = Codes::kFours;
  const int lane = threadIdx.x % 32;
  float ones[kHeadTiles][4] = {};
#pragma unroll
  for (int t = 0; t < kHeadTiles; ++t) {
#pragma unroll
    for (int f = 0; f < kFours; ++f) {
      constexpr uint32_t kOne = 0x00010001u;
      const uint32_t low = Codes::is_upper(f) ? 16 * kOne : kOne, high = 4 * low;
      const uint32_t fragment[4] = {low, low, high, high};
      mma_m16n8k16<__half>(ones[t], fragment, weights[t][f][0], weights[t][f][1]);
    }
#pragma unroll
    for (float& most : best[t]) most = -INFINITY;
  }
#pragma unroll 2
  for (int quad = first; quad < first + num; ++quad) {
    const uint4 loaded = codes.words[quad][lane];
    const uint32_t words[4] = {loaded.x, loaded.y, loaded.z, loaded.w};
    float products[kHeadTiles][4];
#pragma unroll
    for (int four = 0; four < 8; ++four) {
      const bool is_upper = Codes::is_upper(four % kFours);
      uint32_t word = words[four / 2];
      if (four % 2 == 1 && !is_upper) word >>= 4;
      const uint32_t other = word >> 8, low = is_upper ? 0x00300030u : 0x00030003u, high = 4 * low;
      const uint32_t fragment[4] = {word & low, other & low, word & high, other & high};
#pragma unroll
      for (int t = 0; t < kHeadTiles; ++t) {
        if (four % kFours == 0) {
#pragma unroll
          for (float& product : products[t]) product = 0.0f;
        }
        mma_m16n8k16<__half>(products[t], fragment, weights[t][four % kFours][0],
                             weights[t][four % kFours][1]);
        if (four % kFours != kFours - 1) continue;
#pragma unroll
        for (int i = 0; i < 4; ++i) best[t][i] = fmaxf(best[t][i], products[t][i]);
      }
    }
  }
#pragma unroll
  for (int t = 0; t < kHeadTiles; ++t) {
#pragma unroll
    for (int i = 0; i < 4; ++i) best[t][i] = kCodeUnit * (2.0f * best[t][i] - 3.0f * ones[t][i]);
  }
}

}  // namespace clusterkv::cuda
