// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the vllm_clusterkv project
//
// index_pages, a thread block of 256 for each (page, KV head): clusters the keys
// (page_kmeans.cuh), sorts the page's rows and writes its index, means in 4 bits an element
// (page_means.cuh). The page's keys, then its values, are in shared memory, so that the head's
// rows are read once and written once: 1 KB a token at head size 128.
#pragma once

#include <cstdint>

#include "../params.h"
#include "block_sum.cuh"
#include "page_means.cuh"
#include "ptx.cuh"

namespace clusterkv::cuda {

template <typename T, int kHeadSize, int kNumClusters>
class PageIndexer : public PageMeans<T, kHeadSize, kNumClusters> {
  using Means = PageMeans<T, kHeadSize, kNumClusters>;
  using KMeans = typename Means::KMeans;
  using KMeans::average;
  using KMeans::chunk_at;
  using KMeans::count;
  using KMeans::held_;
  using KMeans::hold;
  using KMeans::kChunks;
  using KMeans::kClusterTiles;
  using KMeans::kCols;
  using KMeans::kNumSlabs;
  using KMeans::label_slot;
  using KMeans::lane_;
  using KMeans::num_sinks_;
  using KMeans::row_stride_;
  using KMeans::rows_;
  using KMeans::s_;
  using KMeans::warp_;
  using KMeans::words;
  using Means::kFields;

 public:
  using Means::Means;

  // Sorts keys and values, in place: a slab is in shared memory before any of it is
  // written. Writes this head's index.
  __device__ void finish(uint8_t* index) {
    prefetch_values();
    sort(index_field<int16_t>(index, kFields.cluster_ends));
    if (threadIdx.x < sizeof(s_.sorted.squares) / sizeof(float)) {
      s_.sorted.squares[threadIdx.x] = 0.0f;
    }
    __syncthreads();
    float variances[kNumSlabs];  // of column threadIdx.x
    const int first = kNumSlabs > 1 ? held_ : 0;
#pragma unroll
    for (int i = 0; i < kNumSlabs; ++i) {
      const int slab = first ^ i;
      hold(0, slab);
      hold_means(slab);
      __syncthreads();
      variances[i] = store_keys(slab);
    }
    store_spread(first, variances, index);
    this->store_mean_keys(index);
#pragma unroll 1
    for (int slab = 0; slab < kNumSlabs; ++slab) {
      hold(1, slab);
      hold_means(slab);
      store_sorted(1, slab);
    }
    __syncthreads();
    this->store_mean_values(index);
  }

 private:
  __device__ void prefetch_values() const {
    const T* row = rows_ + threadIdx.x * row_stride_ + kHeadSize;
#pragma unroll
    for (int col = 0; col < kHeadSize; col += 64) {
      asm volatile("prefetch.global.L2 [%0];" ::"l"(row + col));
    }
  }

  // Stable counting sort by label: which row goes where.
  __device__ void sort(int16_t* ends) {
    const int row = threadIdx.x;
    const bool has_label = row >= num_sinks_;
    const int label = has_label ? __half2int_rn(s_.labels[label_slot(row)]) : 0;

    if (warp_ == 0) {
      int before = num_sinks_;
#pragma unroll
      for (int cluster = lane_; cluster < lane_ + kNumClusters; cluster += 32) {
        const bool exists = cluster < kNumClusters;
        const int end = before + warp_inclusive_sum(exists ? count(cluster) : 0);
        if (exists) {
          ends[cluster] = static_cast<int16_t>(end);
          s_.sorted.ends[cluster] = static_cast<uint16_t>(end);
        }
        before = __shfl_sync(kAllLanes, end, 31);
      }
    }
    __syncthreads();
    int place = begin_of(label);
#pragma unroll
    for (int w = 0; w < kPageWarps - 1; ++w) {
      if (w < warp_) place += s_.counts[label][w];
    }
    const uint32_t same = lanes_with<kNumClusters>(label, has_label, label);
    place += __popc(same & ((1u << lane_) - 1));
    s_.sorted.order[has_label ? place : row] = static_cast<uint8_t>(row);
  }

  // A cluster's first place.
  __device__ __forceinline__ int begin_of(int cluster) const {
    return cluster > 0 ? s_.sorted.ends[cluster - 1] : num_sinks_;
  }

  // Brings the means of the slab in shared memory there, too.
  __device__ __forceinline__ void hold_means(int slab) {
    float squares[kClusterTiles][2] = {};  // not used
    average(slab, squares);
  }

  // Stores the slab's keys. Their squared distances from the means of their clusters are
  // added up over a cluster's keys, to s_.sorted.squares, and, returned, over the keys of
  // column threadIdx.x. A warp takes 32 places of the sorted page, a lane every 32nd pair of
  // columns.
  __device__ float store_keys(int slab) {
    constexpr int kPairs = kCols / 2, kPairTiles = (kPairs + 31) / 32;
    float sums[kPairTiles][2] = {};
    float2 mean[kPairTiles], rest[kPairTiles];
    const int stop = 32 * warp_ + 32;
    int place = max(32 * warp_, num_sinks_), cluster = -1, end = 0;
#pragma unroll 1
    while (place < stop) {
      while (end <= place) end = s_.sorted.ends[++cluster];
#pragma unroll
      for (int i = 0; i < kPairTiles; ++i) {
        mean[i] = pair(s_.means[slab], cluster, lane_ + 32 * i);
        rest[i] = pair(s_.means[slab], kNumClusters + cluster, lane_ + 32 * i);
      }
      float square = 0.0f;
#pragma unroll 1
      for (; place < min(end, stop); ++place) {
        const int row = s_.sorted.order[place];
#pragma unroll
        for (int i = 0; i < kPairTiles; ++i) {
          if (kPairs % 32 != 0 && lane_ + 32 * i >= kPairs) continue;
          const float2 key = pair(s_.rows, row, lane_ + 32 * i);
          const float x = (key.x - mean[i].x) - rest[i].x, y = (key.y - mean[i].y) - rest[i].y;
          sums[i][0] += x * x;
          sums[i][1] += y * y;
          square += x * x + y * y;
        }
      }
#pragma unroll
      for (int distance = 16; distance > 0; distance /= 2) {
        square += __shfl_xor_sync(kAllLanes, square, distance);
      }
      if (lane_ == 0) s_.sorted.squares[cluster + warp_] += square;
    }
    store_sorted(0, slab);
    __syncthreads();  // all are done with the rows: their room has the warps' sums
    held_ = -1;
    float* const parts = reinterpret_cast<float*>(s_.rows);
    static_assert(sizeof(s_.rows) >= kPageWarps * kCols * sizeof(float));
#pragma unroll
    for (int i = 0; i < kPairTiles; ++i) {
      const int column = 2 * (lane_ + 32 * i);
      if (kPairs % 32 != 0 && column >= kCols) continue;
      parts[warp_ * kCols + column] = sums[i][0];
      parts[warp_ * kCols + column + 1] = sums[i][1];
    }
    __syncthreads();
    float variance = 0.0f;
    if (threadIdx.x < kCols) {
#pragma unroll
      for (int w = 0; w < kPageWarps; ++w) variance += parts[w * kCols + threadIdx.x];
    }
    return variance;
  }

  // Columns 2 pair and 2 pair + 1 of a row of a slab or of its means.
  __device__ __forceinline__ float2 pair(const uint4* rows, int row, int pair) const {
    if (kCols % 64 != 0) pair = min(pair, kCols / 2 - 1);
    return unpack<T>(words(rows[chunk_at(row, pair / 4)])[pair % 4]);
  }

  // `variances` are store_keys', of slab `first` and of the other.
  __device__ void store_spread(int first, const float (&variances)[kNumSlabs],
                               uint8_t* index) const {
    const float* squares = s_.sorted.squares;
    float total = 0.0f;
#pragma unroll
    for (int i = lane_; i < kNumClusters + kPageWarps; i += 32) total += squares[i];
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) {
      total += __shfl_xor_sync(kAllLanes, total, distance);
    }
    const float mean = total / kHeadSize;
    if (threadIdx.x < kCols) {
      T* const profile = index_field<T>(index, kFields.profile);
#pragma unroll
      for (int i = 0; i < kNumSlabs; ++i) {
        profile[(first ^ i) * kCols + threadIdx.x] = T(mean > 0.0f ? variances[i] / mean : 0.0f);
      }
    }
    if (threadIdx.x < kNumClusters) {
      const int cluster = threadIdx.x, rows = count(cluster);
      float square = 0.0f;
      if (rows > 0) {
        const int last = (s_.sorted.ends[cluster] - 1) / 32;
        for (int w = begin_of(cluster) / 32; w <= last; ++w) square += squares[cluster + w];
      }
      const float radius = rows > 0 ? sqrtf(square / static_cast<float>(rows * kHeadSize)) : 0.0f;
      index_field<T>(index, kFields.radii)[cluster] = T(radius);
    }
  }

  __device__ void store_sorted(int half, int slab) {
    T* target = rows_ + half * kHeadSize + slab * kCols;
#pragma unroll 4
    for (int i = 0; i < kChunks; ++i) {
      const int index = i * kPageRows + threadIdx.x;
      const int place = index / kChunks, chunk = index % kChunks;
      *reinterpret_cast<uint4*>(target + place * row_stride_ + chunk * 8) =
          s_.rows[chunk_at(s_.sorted.order[place], chunk)];
    }
  }
};

// Thread blocks that shared memory lets a multiprocessor of 227 KB run at once.
constexpr int index_pages_blocks(int head_size, int num_clusters) {
  if (head_size > 128 && num_clusters > 32) return 1;
  return head_size > 128 || num_clusters > 16 ? 2 : 3;
}

// Grid: num_pages * num_kv_heads. Shared: PageIndexer::Shared.
template <typename T, int kHeadSize, int kNumClusters>
__global__ void __launch_bounds__(kPageRows, index_pages_blocks(kHeadSize, kNumClusters))
    index_pages_kernel(const IndexPagesParams params) {
  using Indexer = PageIndexer<T, kHeadSize, kNumClusters>;
  extern __shared__ uint4 shared_bytes[];
  wait_for_previous_kernel();
  const SemanticPages& pages = params.pages;
  const unsigned num_heads = static_cast<unsigned>(pages.num_kv_heads);
  const int64_t page = blockIdx.x / num_heads, head = blockIdx.x % num_heads;
  const int64_t block = params.block_ids[page];
  if (block < 0 || block >= pages.num_blocks) return;
  const int num_sinks = min(max(params.num_sink_tokens[page], 0), kPageRows - 1);
  Indexer indexer(
      *reinterpret_cast<typename Indexer::Shared*>(shared_bytes),
      static_cast<T*>(pages.kv_cache) + block * pages.kv_block_stride + head * pages.kv_head_stride,
      pages.kv_row_stride, num_sinks);
  indexer.cluster(params.num_iters);
  indexer.finish(pages.index + block * pages.index_block_stride + head * pages.index_head_stride);
}

}  // namespace clusterkv::cuda
