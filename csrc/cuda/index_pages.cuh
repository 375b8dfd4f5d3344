// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the vllm_clusterkv project
//
// index_pages, a thread block of 256 for each (page, KV head): clusters the keys
// (page_kmeans.cuh), codes them (page_codes.cuh), sorts the page's rows and writes its index. The
// page's keys, then its values, are in shared memory, so that the head's rows are read once and
// written once: 1 KB a token at head size 128.
#pragma once

#include <cstdint>

#include "../params.h"
#include "page_codes.cuh"
#include "ptx.cuh"

namespace clusterkv::cuda {

template <typename T, int kHeadSize, int kNumClusters>
class PageIndexer : public PageCoder<T, kHeadSize, kNumClusters> {
  using Coder = PageCoder<T, kHeadSize, kNumClusters>;
  using KMeans = typename Coder::KMeans;
  using KMeans::address;
  using KMeans::chunk_at;
  using KMeans::count;
  using KMeans::for_each_cluster;
  using KMeans::has_columns;
  using KMeans::held_;
  using KMeans::hold;
  using KMeans::kChunks;
  using KMeans::kClusterTiles;
  using KMeans::kCols;
  using KMeans::kColTiles;
  using KMeans::kInverseOfTrue;
  using KMeans::kNumSlabs;
  using KMeans::label_slot;
  using KMeans::lane_;
  using KMeans::num_sinks_;
  using KMeans::quad_;
  using KMeans::row_stride_;
  using KMeans::rows_;
  using KMeans::s_;
  using KMeans::sum_clusters;
  using KMeans::warp_;
  using KMeans::word;
  using KMeans::words;

 public:
  using Coder::Coder;

  // Sorts keys and values, in place: a slab is in shared memory before any of it is
  // written. `means`, `spreads`, `ends` and `codes` are this head's in the index.
  __device__ void finish(T* means, int64_t value_offset, int64_t mean_stride, T* spreads,
                         int16_t* ends, uint8_t* codes) {
    prefetch_values();
    sort(ends);
    if (threadIdx.x < kNumClusters) {
      for (float& square : s_.squares[threadIdx.x]) square = 0.0f;
    }
    __syncthreads();
    float variances[kNumSlabs];  // of column threadIdx.x
    const int first = kNumSlabs > 1 ? held_ : 0;
#pragma unroll
    for (int i = 0; i < kNumSlabs; ++i) {
      const int slab = first ^ i;
      hold(0, slab);
      store_means<true>(slab, means, mean_stride);
      __syncthreads();
      variances[i] = add_spread(slab);
      store_sorted(0, slab);
    }
    store_spread(first, variances, spreads);
    this->store_codes(means, mean_stride, spreads, codes);
#pragma unroll 1
    for (int slab = 0; slab < kNumSlabs; ++slab) {
      hold(1, slab);
      store_means<false>(slab, means + value_offset, mean_stride);
      store_sorted(1, slab);
    }
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

    const int size = lane_ < kNumClusters ? count(lane_) : 0;
    int end = size;  // of cluster `lane`
#pragma unroll
    for (int distance = 1; distance < kNumClusters; distance *= 2) {
      const int before = __shfl_up_sync(kAllLanes, end, distance);
      if (lane_ >= distance) end += before;
    }
    end += num_sinks_;
    if (warp_ == 0 && lane_ < kNumClusters) {
      ends[lane_] = static_cast<int16_t>(end);
      s_.ends[lane_] = static_cast<uint16_t>(end);
    }
    const int begin = __shfl_sync(kAllLanes, end - size, label);

    int earlier = 0;  // rows of this label in warps before
#pragma unroll
    for (int w = 0; w < kPageWarps - 1; ++w) {
      if (w < warp_) earlier += s_.counts[label][w];
    }
    const uint32_t same = lanes_with<kNumClusters>(label, has_label, label);
    const int place = begin + earlier + __popc(same & ((1u << lane_) - 1));
    s_.order[has_label ? place : row] = static_cast<uint8_t>(row);
  }

  // Means of the slab held; with kKeep also in s_.means, as update leaves them.
  template <bool kKeep>
  __device__ void store_means(int slab, T* means, int64_t mean_stride) {
    if (!has_columns()) return;
    float sums[kClusterTiles][kColTiles][4];
    sum_clusters(sums);
    for_each_cluster([&](int cluster, int ct, int h) {
      const int rows = count(cluster);
      const float scale = __fdividef(kInverseOfTrue, static_cast<float>(rows));
#pragma unroll
      for (int tile = 0; tile < kColTiles; ++tile) {
        const int chunk = warp_ * kColTiles + tile;
        const int col = slab * kCols + 8 * chunk + 2 * quad_;
        const float x = sums[ct][tile][2 * h] * scale, y = sums[ct][tile][2 * h + 1] * scale;
        const uint32_t mean = pack<T>(x, y);
        *reinterpret_cast<uint32_t*>(means + cluster * mean_stride + col) = rows > 0 ? mean : 0;
        if constexpr (kKeep) {
          const float2 left = unpack<T>(mean);
          word(slab, cluster, chunk) = mean;
          word(slab, kNumClusters + cluster, chunk) = pack<T>(x - left.x, y - left.y);
        }
      }
    });
  }

  // Squared distances of the slab's keys from the means of their clusters, which
  // s_.means has: sums over a cluster's keys, added to s_.squares, and, returned, over
  // the keys of column threadIdx.x. A warp takes 32 places of the sorted page, a lane
  // every 32nd pair of columns.
  __device__ float add_spread(int slab) {
    constexpr int kPairs = kCols / 2, kPairTiles = (kPairs + 31) / 32;
    float sums[kPairTiles][2] = {};
    float2 mean[kPairTiles], rest[kPairTiles];
    const int stop = 32 * warp_ + 32;
    int place = max(32 * warp_, num_sinks_), cluster = -1, end = 0;
#pragma unroll 1
    while (place < stop) {
      while (end <= place) end = s_.ends[++cluster];
#pragma unroll
      for (int i = 0; i < kPairTiles; ++i) {
        mean[i] = pair(s_.means[slab], cluster, lane_ + 32 * i);
        rest[i] = pair(s_.means[slab], kNumClusters + cluster, lane_ + 32 * i);
      }
      float square = 0.0f;
#pragma unroll 1
      for (; place < min(end, stop); ++place) {
        const int row = s_.order[place];
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
      if (lane_ == 0) s_.squares[cluster][warp_] += square;
    }
    __syncthreads();  // all are done with the means: their room has the warps' sums
    float* const parts = reinterpret_cast<float*>(s_.means[slab]);
    static_assert(sizeof(s_.means[0]) >= kPageWarps * kCols * sizeof(float));
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

  // `variances` are add_spread's, of slab `first` and of the other.
  __device__ void store_spread(int first, const float (&variances)[kNumSlabs], T* spreads) const {
    const float* squares = s_.squares[0];
    float total = 0.0f;
#pragma unroll
    for (int i = lane_; i < kNumClusters * kPageWarps; i += 32) total += squares[i];
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) {
      total += __shfl_xor_sync(kAllLanes, total, distance);
    }
    const float mean = total / kHeadSize;
    if (threadIdx.x < kCols) {
#pragma unroll
      for (int i = 0; i < kNumSlabs; ++i) {
        spreads[(first ^ i) * kCols + threadIdx.x] = T(mean > 0.0f ? variances[i] / mean : 0.0f);
      }
    }
    if (threadIdx.x < kNumClusters) {
      float square = 0.0f;
      for (const float part : s_.squares[threadIdx.x]) square += part;
      const int rows = count(threadIdx.x);
      const float radius = rows > 0 ? sqrtf(square / static_cast<float>(rows * kHeadSize)) : 0.0f;
      spreads[kHeadSize + threadIdx.x] = T(radius);
    }
  }

  __device__ void store_sorted(int half, int slab) {
    T* target = rows_ + half * kHeadSize + slab * kCols;
#pragma unroll 4
    for (int i = 0; i < kChunks; ++i) {
      const int index = i * kPageRows + threadIdx.x;
      const int place = index / kChunks, chunk = index % kChunks;
      *reinterpret_cast<uint4*>(target + place * row_stride_ + chunk * 8) =
          s_.rows[chunk_at(s_.order[place], chunk)];
    }
  }
};

// Thread blocks that shared memory lets a multiprocessor of 227 KB run at once.
constexpr int index_pages_blocks(int head_size, int num_clusters) {
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
  indexer.finish(
      static_cast<T*>(pages.centroids) + block * pages.centroid_block_stride +
          head * pages.centroid_head_stride,
      pages.centroid_value_offset, pages.centroid_row_stride,
      static_cast<T*>(pages.spreads) + block * pages.spread_block_stride +
          head * pages.spread_head_stride,
      pages.cluster_ends + block * pages.ends_block_stride + head * pages.ends_head_stride,
      pages.codes + block * pages.codes_block_stride + head * pages.codes_head_stride);
}

}  // namespace clusterkv::cuda
