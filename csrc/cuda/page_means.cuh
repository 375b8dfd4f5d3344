// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the vllm_clusterkv project
//
// Means of a page's clusters, of one KV head, in 4 bits an element, by the thread block that
// has them in shared memory. vllm_clusterkv/short_means.py has the format.
#pragma once

#include <cstdint>

#include "page_kmeans.cuh"
#include "ptx.cuh"

namespace clusterkv::cuda {

template <typename Element>
__device__ __forceinline__ Element* index_field(uint8_t* index, int64_t offset) {
  return reinterpret_cast<Element*>(index + offset);
}

template <typename T, int kHeadSize, int kNumClusters>
class PageMeans : public PageKMeans<T, kHeadSize, kNumClusters> {
 protected:
  using KMeans = PageKMeans<T, kHeadSize, kNumClusters>;
  using KMeans::chunk_at;
  using KMeans::count;
  using KMeans::held_;
  using KMeans::kChunks;
  using KMeans::s_;
  using KMeans::words;

  static constexpr IndexFields kFields = index_fields(kHeadSize, kNumClusters, sizeof(T));

 public:
  using KMeans::KMeans;

 protected:
  // Writes the mean keys, which s_.means has: codes, steps, base and deviations. Takes the
  // room of the rows.
  __device__ void store_mean_keys(uint8_t* index) {
    Scratch& scratch = *reinterpret_cast<Scratch*>(s_.rows);
    static_assert(sizeof(s_.rows) >= sizeof(Scratch));
    const int dim = threadIdx.x;
    // Clusters with keys. All are done with the rows.
    const int number = __syncthreads_count(dim < kNumClusters && count(dim) > 0);
    held_ = -1;
    const T base = T(sum(scratch, [](float mean, int) { return mean; }) / number);
    if (dim < kHeadSize) {
      index_field<T>(index, kFields.key_base)[dim] = base;
      scratch.base[dim] = static_cast<float>(base);
    }
    __syncthreads();
    const float squares = sum(scratch, [&](float mean, int of_dim) {
      const float off = mean - scratch.base[of_dim];
      return off * off;
    });
    if (dim < kHeadSize) {
      const T deviation = T(sqrtf(squares / number));
      index_field<T>(index, kFields.key_deviations)[dim] = deviation;
      scratch.deviations[dim] = static_cast<float>(deviation);
    }
    __syncthreads();
    store_codes<true>(index, index + kFields.key_steps, [&](float mean, int of_dim) {
      const float deviation = scratch.deviations[of_dim];
      return deviation > 0.0f ? (mean - scratch.base[of_dim]) / deviation : 0.0f;
    });
  }

  // Writes the mean values, which s_.means has: codes and steps.
  __device__ void store_mean_values(uint8_t* index) const {
    store_codes<false>(index + kFields.value_codes, index + kFields.value_steps,
                       [](float mean, int) { return mean; });
  }

 private:
  static constexpr int kAllChunks = kHeadSize / 8;  // of 8 dimensions, of a mean
  static constexpr int kSegments = kHeadSize / 32;
  static_assert(kHeadSize % 32 == 0, "dimensions are not padded");
  static constexpr int kGroups = kPageRows / kAllChunks;  // of threads that share clusters

  struct Scratch {
    float base[kHeadSize];
    float deviations[kHeadSize];
    float parts[kGroups][kHeadSize];
  };

  __device__ __forceinline__ void load_mean(int cluster, int chunk, float (&mean)[8]) const {
    const uint4* slab = s_.means[chunk / kChunks];
    const uint4& rounded = slab[chunk_at(cluster, chunk % kChunks)];
    const uint4& left = slab[chunk_at(kNumClusters + cluster, chunk % kChunks)];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 a = unpack<T>(words(rounded)[i]), b = unpack<T>(words(left)[i]);
      mean[2 * i] = a.x + b.x;
      mean[2 * i + 1] = a.y + b.y;
    }
  }

  // Sum of term(mean, dim) over the clusters with tokens, of dimension threadIdx.x.
  template <typename Term>
  __device__ __forceinline__ float sum(Scratch& scratch, const Term& term) const {
    const int chunk = threadIdx.x % kAllChunks, group = threadIdx.x / kAllChunks;
    if (group < kGroups) {
      float sums[8] = {};
      for (int cluster = group; cluster < kNumClusters; cluster += kGroups) {
        if (count(cluster) == 0) continue;
        float mean[8];
        load_mean(cluster, chunk, mean);
#pragma unroll
        for (int i = 0; i < 8; ++i) sums[i] += term(mean[i], 8 * chunk + i);
      }
#pragma unroll
      for (int i = 0; i < 8; ++i) scratch.parts[group][8 * chunk + i] = sums[i];
    }
    __syncthreads();
    float total = 0.0f;
    if (threadIdx.x < kHeadSize) {
#pragma unroll
      for (int g = 0; g < kGroups; ++g) total += scratch.parts[g][threadIdx.x];
    }
    return total;
  }

  // Rounds off(mean, dim). Threads that lie side by side take 8 dimensions each of two
  // clusters, which share the words of values.
  template <bool kOfKeys, typename Off>
  __device__ __forceinline__ void store_codes(uint8_t* codes, uint8_t* steps,
                                              const Off& off) const {
    constexpr int kThreads = kAllChunks <= 8 ? 8 : kAllChunks <= 16 ? 16 : 32;  // of two clusters
    static_assert(kNumClusters / 2 % (32 / kThreads) == 0, "a warp takes part, or does not");
    uint32_t* const target = reinterpret_cast<uint32_t*>(codes);
    const int chunk = threadIdx.x % kThreads, segment = chunk / 4, quarter = chunk % 4;
    const bool has_chunk = chunk < kAllChunks;
#pragma unroll 1
    for (int pair = threadIdx.x / kThreads; pair < kNumClusters / 2; pair += kPageRows / kThreads) {
      uint32_t coded[2], step_bits = 0;
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int cluster = 2 * pair + h;
        float offs[8] = {};
        uint32_t largest = 0;  // bits of a magnitude: not-a-number is above all
        if (has_chunk && count(cluster) > 0) {
          load_mean(cluster, chunk, offs);
#pragma unroll
          for (int i = 0; i < 8; ++i) {
            offs[i] = off(offs[i], 8 * chunk + i);
            largest = max(largest, __float_as_uint(fabsf(offs[i])));
          }
        }
#pragma unroll
        for (int distance = kThreads / 2; distance > 0; distance /= 2) {
          largest = max(largest, __shfl_xor_sync(kAllLanes, largest, distance));
        }
        const uint32_t bits = pack<T>(__uint_as_float(largest) / kMiddleCode, 0.0f);
        step_bits |= bits << (16 * h);
        coded[h] = code_chunk<kOfKeys>(offs, unpack<T>(bits).x);
      }
      if (chunk == 0) reinterpret_cast<uint32_t*>(steps)[pair] = step_bits;
      if constexpr (kOfKeys) {
        if (!has_chunk) continue;
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          target[((2 * pair + h) * 4 + quarter) * kSegments + segment] = finite(coded[h]);
        }
      } else {
        transpose(coded, quarter);
        if (!has_chunk) continue;
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          target[(pair * 8 + 4 * h + quarter) * kSegments + segment] = finite(coded[h]);
        }
      }
    }
  }

  // Codes of 8 dimensions of a cluster: of keys in the nibbles of their word, of values in order.
  template <bool kOfKeys>
  static __device__ __forceinline__ uint32_t code_chunk(const float (&offs)[8], float step) {
    uint32_t coded = 0;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const float part = step > 0.0f ? offs[i] / step : 0.0f;
      const uint32_t code = min(max(__float2int_rn(part + kMiddleCode), 0), 15);
      coded |= code << (4 * (kOfKeys ? i / 2 + i % 2 * 4 : i));
    }
    return coded;
  }

  // From words of 8 values of two clusters (nibble g of word h) to the words of a tile. Of the 4
  // lanes that have 32 dimensions, lane `quarter` is left with those of dimensions `quarter` and
  // 4 + `quarter` of each 8: nibble p of half h is lane p's of cluster h.
  static __device__ __forceinline__ void transpose(uint32_t (&coded)[2], int quarter) {
    const uint32_t first = coded[0], second = coded[1];
    coded[0] = (first & 0x0000ffffu) | second << 16;
    coded[1] = first >> 16 | (second & 0xffff0000u);
#pragma unroll
    for (uint32_t& word : coded) {  // matrices of 4 lanes and 4 nibbles, of both halves
      const uint32_t of_other = __shfl_xor_sync(kAllLanes, word, 2);
      word = quarter & 2 ? (word & 0xff00ff00u) | (of_other & 0xff00ff00u) >> 8
                         : (word & 0x00ff00ffu) | (of_other & 0x00ff00ffu) << 8;
      const uint32_t of_next = __shfl_xor_sync(kAllLanes, word, 1);
      word = quarter & 1 ? (word & 0xf0f0f0f0u) | (of_next & 0xf0f0f0f0u) >> 4
                         : (word & 0x0f0f0f0fu) | (of_next & 0x0f0f0f0fu) << 4;
    }
  }

  // One code of 4 less by one where their 16 bits would not be a finite number in fp16.
  static __device__ __forceinline__ uint32_t finite(uint32_t word) {
    constexpr uint32_t kExponents = 0x7c007c00u;
    return word & ~(__vcmpeq2(word & kExponents, kExponents) & 0x10001000u);
  }
};

}  // namespace clusterkv::cuda
