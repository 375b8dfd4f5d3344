// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the vllm_clusterkv project
//
// Scores of clusters, by tensor cores: a warp takes 16 mean keys at a time (the rows
// of a fragment) against the query heads of one KV head (its columns). A dot product
// does not mind the order of its terms, so fragments are filled straight from 16-byte
// loads: of each 32 elements, lane j of a quad holds 8 j to 8 j + 7.
//
// While a tile's scores are in registers, their softmax sums cost little: tile_stats.
//
// The variance of a head's logits in a page is the product of the query's squares with
// the page's profile: as many more tensor core products, of profiles for mean keys.
#pragma once

#include "../params.h"
#include "ptx.cuh"

namespace clusterkv::cuda {

constexpr int kScoreWarps = 4;

// Two squares of a query's elements, rounded to 16 bits, times kSquareScale<T>^2.
template <typename T>
constexpr float kSquareScale = 1.0f;
template <>
constexpr float kSquareScale<__half> = 1.0f / 16;  // fp16 ends at 65504

template <typename T>
__device__ __forceinline__ uint32_t square_pair(uint32_t query);

template <>
__device__ __forceinline__ uint32_t square_pair<__nv_bfloat16>(uint32_t query) {
  const __nv_bfloat162 pair = reinterpret_cast<const __nv_bfloat162&>(query);
  const __nv_bfloat162 squares = __hmul2(pair, pair);
  return reinterpret_cast<const uint32_t&>(squares);
}

template <>
__device__ __forceinline__ uint32_t square_pair<__half>(uint32_t query) {
  __half2 pair = __habs2(reinterpret_cast<const __half2&>(query));
  pair = __hmin2(__hmul2(pair, __float2half2_rn(kSquareScale<__half>)), __float2half2_rn(255.0f));
  const __half2 squares = __hmul2(pair, pair);
  return reinterpret_cast<const uint32_t&>(squares);
}

// What the variance of its logits adds to a cluster's score. Not a number stays so.
__device__ __forceinline__ float spread_score(float variance) {
  const float added = kSpreadWeight * (fast_sqrt(1.0f + variance) - 1.0f);
  return added > kSpreadMost ? kSpreadMost : added;
}

// Scores the `end` clusters of a row and KV head. Tiles of 16 are dealt to `num_workers`
// warps, of which this one is `worker`.
template <typename T, int kHeadSize, int kHeadTiles>
__device__ __forceinline__ void score_row(const ScoreClustersParams& p, int req, int kv_head,
                                          int end, int worker, int num_workers) {
  constexpr int kSegments = kHeadSize / 32;
  const SemanticPages& pages = p.pages;
  const int lane = threadIdx.x % 32, g = lane / 4, j = lane % 4;
  const int first = worker * 16, step = num_workers * 16;
  if (first >= end) return;

  const int log_clusters = 31 - __clz(static_cast<int>(pages.num_clusters));
  const T* centroids =
      static_cast<const T*>(pages.centroids) + kv_head * pages.centroid_head_stride + j * 8;
  const int32_t* index_table = p.rows.index_table + req * p.rows.index_table_stride;
  const auto load_row = [&](int cluster, uint4(&keys)[kSegments]) {
    cluster = min(cluster, end - 1);
    const int64_t place = index_table[cluster >> log_clusters];
    const T* source = centroids + place * pages.centroid_block_stride +
                      (cluster & (pages.num_clusters - 1)) * pages.centroid_row_stride;
#pragma unroll
    for (int s = 0; s < kSegments; ++s) {
      keys[s] = __ldg(reinterpret_cast<const uint4*>(source + s * 32));
    }
  };
  // Tokens of a cluster; none beyond the row.
  const int16_t* cluster_ends = pages.cluster_ends + kv_head * pages.ends_head_stride;
  const auto load_count = [&](int cluster) -> int {
    if (cluster >= end) return 0;
    const int page = cluster >> log_clusters, c = cluster & (pages.num_clusters - 1);
    const int16_t* ends = cluster_ends + index_table[page] * pages.ends_block_stride;
    const int start = c > 0 ? ends[c - 1] : page == 0 ? static_cast<int>(p.num_sink_tokens) : 0;
    return ends[c] - start;
  };
  const T* spreads = static_cast<const T*>(pages.spreads) + kv_head * pages.spread_head_stride;
  const auto spreads_of = [&](int cluster) {
    return spreads + index_table[min(cluster, end - 1) >> log_clusters] * pages.spread_block_stride;
  };
  const auto load_profile = [&](int cluster, int segment) {
    return __ldg(reinterpret_cast<const uint4*>(spreads_of(cluster) + j * 8 + segment * 32));
  };
  const auto load_profiles = [&](int cluster, uint4(&profile)[kSegments]) {
#pragma unroll
    for (int s = 0; s < kSegments; ++s) profile[s] = load_profile(cluster, s);
  };
  const auto load_radius = [&](int cluster) -> float {
    return static_cast<float>(
        spreads_of(cluster)[kHeadSize + (cluster & (pages.num_clusters - 1))]);
  };
  uint4 next[2][kSegments], next_profile[kSegments];
  load_row(first + g, next[0]);
  load_row(first + g + 8, next[1]);
  // Tokens of row g in lanes of even j, of row g + 8 in the others.
  const int counted_row = g + j % 2 * 8;
  int next_count = load_count(first + counted_row);
  float next_radius = load_radius(first + counted_row);
  load_profiles(first, next_profile);

  const int group = static_cast<int>(p.rows.num_heads / pages.num_kv_heads);
  uint4 query[kHeadTiles][kSegments];
#pragma unroll
  for (int t = 0; t < kHeadTiles; ++t) {
    const int head = t * 8 + g;
    const T* row = static_cast<const T*>(p.query) + req * p.query_row_stride +
                   (kv_head * group + head) * p.query_head_stride + j * 8;
#pragma unroll
    for (int s = 0; s < kSegments; ++s) {
      query[t][s] = head < group ? *reinterpret_cast<const uint4*>(row + s * 32) : uint4{};
    }
  }
  const int64_t first_head = req * p.rows.num_heads + kv_head * group;
  float* scores = p.scores + first_head * p.max_clusters;
  const uint32_t max_tiles = static_cast<uint32_t>(num_tiles(p.max_clusters));
  float2* stats = reinterpret_cast<float2*>(p.tile_stats) + first_head * max_tiles;

  for (int tile = first; tile < end; tile += step) {
    uint4 keys[2][kSegments];
#pragma unroll
    for (int s = 0; s < kSegments; ++s) {
      keys[0][s] = next[0][s];
      keys[1][s] = next[1][s];
    }
    const int count = next_count;
    const float radius = next_radius * (p.scale / kSquareScale<T>);
    // Rows g of the fragment are the profile of the first 8 clusters' page, all the same,
    // and rows g + 8 that of the others': variances lie as scores do.
    float variances[kHeadTiles][4] = {};
#pragma unroll
    for (int s = 0; s < kSegments; ++s) {
      const uint4 first_page = next_profile[s];
      const uint4 page = pages.num_clusters == 8 ? load_profile(tile + 8, s) : first_page;
      const uint32_t low[4] = {first_page.x, page.x, first_page.y, page.y};
      const uint32_t high[4] = {first_page.z, page.z, first_page.w, page.w};
#pragma unroll
      for (int t = 0; t < kHeadTiles; ++t) {
        uint4 squares = query[t][s];
        // Squared for every tile: kept, squares would take a block's registers.
        asm volatile("" : "+r"(squares.x), "+r"(squares.y), "+r"(squares.z), "+r"(squares.w));
        mma_m16n8k16<T>(variances[t], low, square_pair<T>(squares.x), square_pair<T>(squares.y));
        mma_m16n8k16<T>(variances[t], high, square_pair<T>(squares.z), square_pair<T>(squares.w));
      }
    }
    if (tile + step < end) {
      next_radius = load_radius(tile + step + counted_row);
      load_profiles(tile + step, next_profile);
      load_row(tile + step + g, next[0]);
      load_row(tile + step + g + 8, next[1]);
      next_count = load_count(tile + step + counted_row);
    }
    float acc[kHeadTiles][4] = {};
#pragma unroll
    for (int s = 0; s < kSegments; ++s) {
      const uint32_t low[4] = {keys[0][s].x, keys[1][s].x, keys[0][s].y, keys[1][s].y};
      const uint32_t high[4] = {keys[0][s].z, keys[1][s].z, keys[0][s].w, keys[1][s].w};
#pragma unroll
      for (int t = 0; t < kHeadTiles; ++t) {
        mma_m16n8k16<T>(acc[t], low, query[t][s].x, query[t][s].y);
        mma_m16n8k16<T>(acc[t], high, query[t][s].z, query[t][s].w);
      }
    }
    const int other_count = __shfl_xor_sync(~0u, count, 1);
    const int counts[2] = {j % 2 == 0 ? count : other_count, j % 2 == 0 ? other_count : count};
    const float other_radius = __shfl_xor_sync(~0u, radius, 1);
    const float radii[2] = {j % 2 == 0 ? radius : other_radius, j % 2 == 0 ? other_radius : radius};
#pragma unroll
    for (int t = 0; t < kHeadTiles; ++t) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int head = t * 8 + j * 2 + i % 2, cluster = tile + g + i / 2 * 8;
        acc[t][i] *= p.scale;
        acc[t][i] += spread_score(variances[t][i] * (radii[i / 2] * radii[i / 2]));
        if (head < group && cluster < end) scores[head * p.max_clusters + cluster] = acc[t][i];
      }
      // Max and sum of a head: its scores are in the lanes of equal j.
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int head = t * 8 + j * 2 + i;
        float max = counts[0] > 0 ? acc[t][i] : -INFINITY;
        if (counts[1] > 0) max = fmaxf(max, acc[t][i + 2]);
#pragma unroll
        for (int d = 4; d < 32; d *= 2) max = fmaxf(max, __shfl_xor_sync(~0u, max, d));
        const float origin = max == -INFINITY ? 0.0f : max;
        float sum = 0.0f;
        if (counts[0] > 0) sum += counts[0] * fast_exp2((acc[t][i] - origin) * kLog2e);
        if (counts[1] > 0) sum += counts[1] * fast_exp2((acc[t][i + 2] - origin) * kLog2e);
#pragma unroll
        for (int d = 4; d < 32; d *= 2) sum += __shfl_xor_sync(~0u, sum, d);
        if (g == 0 && head < group) {
          stats[head * max_tiles + tile / 16] = float2{max, sum};
        }
      }
    }
  }
}

// Clusters of a row that is not dense, else 0.
__device__ __forceinline__ int num_row_clusters(const SemanticPages& pages, const DecodeRows& rows,
                                                int req) {
  const int64_t seq_len = rows.seq_lens[req];
  if (is_dense(seq_len, rows.min_sparse_lens[req])) return 0;
  return static_cast<int>(num_indexed_pages(seq_len, pages.block_size) * pages.num_clusters);
}

// Thread blocks whose registers a multiprocessor has room for.
constexpr int score_blocks(int head_size, int head_tiles) {
  return head_size * head_tiles <= 128 ? 4 : 2;
}

// Grid: [blocks a row and head, num_kv_heads, num_reqs]. kHeadTiles: query heads a KV
// head / 8, up.
template <typename T, int kHeadSize, int kHeadTiles>
__global__ void __launch_bounds__(kScoreWarps * 32, score_blocks(kHeadSize, kHeadTiles))
    score_clusters_kernel(const ScoreClustersParams p) {
  // The kernel before may be anyone's, and may write what is read first.
  wait_for_previous_kernel();
  start_next_kernel();
  const int num_clusters = num_row_clusters(p.pages, p.rows, blockIdx.z);
  score_row<T, kHeadSize, kHeadTiles>(p, blockIdx.z, blockIdx.y, num_clusters,
                                      blockIdx.x * kScoreWarps + threadIdx.x / 32,
                                      gridDim.x * kScoreWarps);
}

}  // namespace clusterkv::cuda
