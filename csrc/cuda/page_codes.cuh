// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the vllm_clusterkv project
//
// Codes of a page's keys, of one KV head, by the thread block that clustered them: which
// dimensions have codes, a key's codes by the thread of its place, which keys of a cluster
// are kept, and their bits put where score_clusters takes them from (best_keys.cuh).
#pragma once

#include <cstddef>
#include <cstdint>

#include "best_keys.cuh"
#include "page_kmeans.cuh"
#include "ptx.cuh"

namespace clusterkv::cuda {

template <typename T, int kHeadSize, int kNumClusters>
class PageCoder : public PageKMeans<T, kHeadSize, kNumClusters> {
 protected:
  using KMeans = PageKMeans<T, kHeadSize, kNumClusters>;
  using KMeans::chunk_at;
  using KMeans::held_;
  using KMeans::hold;
  using KMeans::kCols;
  using KMeans::kNumSlabs;
  using KMeans::lane_;
  using KMeans::num_sinks_;
  using KMeans::s_;
  using KMeans::warp_;

 public:
  using KMeans::KMeans;

 protected:
  // Writes the head's codes. Its means and spreads are in the index, its rows sorted; the
  // slab in shared memory is not, others are as they are in the cache.
  __device__ void store_codes(const T* means, int64_t mean_stride, const T* spreads,
                              uint8_t* target) {
    Scratch& scratch = *reinterpret_cast<Scratch*>(s_.means);
    static_assert(sizeof(s_.means) >= sizeof(Scratch));
    __syncthreads();  // all are done with the means' room, and the spreads are written
    for (int i = threadIdx.x; i < static_cast<int>(sizeof(Codes) / 16); i += kPageRows) {
      reinterpret_cast<uint4*>(&scratch.codes)[i] = uint4{};
    }
    if (threadIdx.x < kHeadSize) {
      scratch.profile[threadIdx.x] = reinterpret_cast<const uint16_t*>(spreads)[threadIdx.x];
    }
    __syncthreads();
    choose_dims(scratch);
    __syncthreads();

    const int place = threadIdx.x;
    const bool is_coded = place >= num_sinks_;
    int cluster = 0;
    if (is_coded) {
      while (s_.ends[cluster] <= place) ++cluster;
    }
    const float radius = static_cast<float>(spreads[kHeadSize + cluster]);
    uint32_t bits[kWords] = {};
#pragma unroll 1
    for (int i = 0, slab = kNumSlabs > 1 ? held_ : 0; i < kNumSlabs; ++i, slab ^= 1) {
      hold(0, slab);
      const int row = i == 0 ? s_.order[place] : place;
      const T* mean = means + cluster * mean_stride;
#pragma unroll
      for (int d = 0; d < kDims; ++d) {
        const int dim = scratch.codes.dims[d];
        if (kNumSlabs > 1 && dim / kCols != slab) continue;
        const int col = dim % kCols;
        const uint4& chunk = s_.rows[chunk_at(row, col / 8)];
        const float key = static_cast<float>(reinterpret_cast<const T*>(&chunk)[col % 8]);
        const float off = key - static_cast<float>(mean[dim]);
        const float deviation = static_cast<float>(deviations(scratch)[d]);
        const float step = 2.0f * kCodeStep * deviation * radius;
        const uint32_t code = (off >= -step) + (off >= 0.0f) + (off >= step);
        bits[d / 16] |= code << (d % 16 * 2);
      }
    }
    keep(scratch, bits, cluster, is_coded);
    __syncthreads();
    constexpr int kHead = static_cast<int>(offsetof(Codes, words) / 16);
    for (int i = threadIdx.x; i < static_cast<int>(sizeof(Codes) / 16); i += kPageRows) {
      uint4 chunk = reinterpret_cast<const uint4*>(&scratch.codes)[i];
      if (i >= kHead) chunk = {finite(chunk.x), finite(chunk.y), finite(chunk.z), finite(chunk.w)};
      reinterpret_cast<uint4*>(target)[i] = chunk;
    }
  }

 private:
  using Codes = PageCodes<kHeadSize>;
  static constexpr int kDims = Codes::kDims, kWords = kDims / 16;  // of a key's codes
  static constexpr int kKeys = static_cast<int>(num_coded_keys(kNumClusters));

  struct Scratch {
    Codes codes;
    uint16_t profile[kHeadSize];
    uint8_t outer[kPageRows];    // of each place's key, codes of 0 or 3
    uint8_t chosen[kPageWarps];  // dimensions, of a warp's
  };

  static __device__ __forceinline__ T* deviations(Scratch& scratch) {
    return reinterpret_cast<T*>(scratch.codes.deviations);
  }

  // Of the 16-bit numbers in a word, one bit less where such a number is not finite in fp16;
  // in bf16 that takes more. See key_codes.py.
  static __device__ __forceinline__ uint32_t finite(uint32_t word) {
    constexpr uint32_t kExponents = 0x7c007c00u;
    return word & ~(__vcmpeq2(word & kExponents, kExponents) & 0x40004000u);
  }

  // The dimensions of the largest profile, ties to the lowest, in ascending order. Numbers
  // that are not negative are in the order of their bits, and not-a-number comes last.
  __device__ void choose_dims(Scratch& scratch) const {
    const int dim = threadIdx.x;
    const bool is_dim = dim < kHeadSize;
    const uint32_t own = is_dim ? scratch.profile[dim] : 0;
    int larger = 0;
#pragma unroll 4
    for (int i = 0; i < kHeadSize; i += 2) {
      const uint32_t pair = *reinterpret_cast<const uint32_t*>(scratch.profile + i);
      const uint32_t low = pair & 0xffff, high = pair >> 16;
      larger += low > own || (low == own && i < dim);
      larger += high > own || (high == own && i + 1 < dim);
    }
    const bool is_chosen = is_dim && larger < kDims;
    const uint32_t lanes = __ballot_sync(kAllLanes, is_chosen);
    if (lane_ == 0) scratch.chosen[warp_] = static_cast<uint8_t>(__popc(lanes));
    __syncthreads();
    int index = __popc(lanes & ((1u << lane_) - 1));
    for (int w = 0; w < warp_; ++w) index += scratch.chosen[w];
    if (is_chosen) {
      const T profile = reinterpret_cast<const T*>(scratch.profile)[dim];
      scratch.codes.dims[index] = static_cast<uint16_t>(dim);
      deviations(scratch)[index] = from_float<T>(__fsqrt_rn(static_cast<float>(profile)));
    }
  }

  // Puts a key's codes to its cluster's, again and again if that has fewer keys than codes.
  __device__ void keep(Scratch& scratch, const uint32_t (&bits)[kWords], int cluster,
                       bool is_coded) const {
    const int place = threadIdx.x;
    int outer = kDims;
#pragma unroll
    for (const uint32_t word : bits) outer -= __popc((word ^ word >> 1) & 0x55555555u);
    scratch.outer[place] = static_cast<uint8_t>(outer);
    __syncthreads();
    if (!is_coded) return;
    const int begin = cluster > 0 ? s_.ends[cluster - 1] : num_sinks_, end = s_.ends[cluster];
    int farther = 0;  // keys of the cluster
    for (int other = begin; other < end; ++other) {
      const int its = scratch.outer[other];
      farther += its > outer || (its == outer && other < place);
    }
    for (int key = farther; key < kKeys; key += end - begin) {
      constexpr int kStepsOfTile = kNumClusters == 8 ? static_cast<int>(kCodeSteps) : kKeys;
      const int step = cluster / 16 * kStepsOfTile + key % kStepsOfTile;
      const int column = cluster % 16 + 8 * (key / kStepsOfTile);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
#pragma unroll
        for (int four = 0; four < Codes::kFours; ++four) {
          const int first = j * Codes::kFours + four;  // of the key's fours of dimensions
          const uint32_t codes = bits[first / 4] >> (first % 4 * 8) & 0xff;
          // Of each pair, the second code goes to the upper half of a word.
          const uint32_t even = (codes & 3) | (codes >> 2 & 12);
          const uint32_t odd = (codes >> 2 & 3) | (codes >> 4 & 12);
          const int unit = step * Codes::kFours + four, word = unit / 2;
          uint4& words_of_lane = scratch.codes.words[word / 4][column % 8 * 4 + j];
          atomicOr(reinterpret_cast<uint32_t*>(&words_of_lane) + word % 4,
                   (even | odd << 16) << (unit % 2 * 4 + column / 8 * 8));
        }
      }
    }
  }
};

}  // namespace clusterkv::cuda
