// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the vllm_clusterkv project
//
// Scores of clusters, by tensor cores: a warp takes 16 mean keys at a time (the rows
// of a fragment) against the query heads of one KV head (its columns). A dot product
// does not mind the order of its terms, so fragments are filled straight from 16-byte
// loads: of each 32 elements, lane j of a quad holds 8 j to 8 j + 7.
//
// While a tile's scores are in registers, their softmax sums cost little: tile_stats.
#pragma once

#include "../params.h"
#include "ptx.cuh"

namespace clusterkv::cuda {

constexpr int kScoreWarps = 4;

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
  const int32_t* block_table = p.rows.block_table + req * p.rows.block_table_stride;
  const auto load_row = [&](int cluster, uint4(&keys)[kSegments]) {
    cluster = min(cluster, end - 1);
    const int64_t block = block_table[cluster >> log_clusters];
    const T* source = centroids + block * pages.centroid_block_stride +
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
    const int16_t* ends = cluster_ends + block_table[page] * pages.ends_block_stride;
    const int start = c > 0 ? ends[c - 1] : page == 0 ? static_cast<int>(p.num_sink_tokens) : 0;
    return ends[c] - start;
  };
  uint4 next[2][kSegments];
  load_row(first + g, next[0]);
  load_row(first + g + 8, next[1]);
  // Tokens of row g in lanes of even j, of row g + 8 in the others.
  const int counted_row = g + j % 2 * 8;
  int next_count = load_count(first + counted_row);

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
    if (tile + step < end) {
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
#pragma unroll
    for (int t = 0; t < kHeadTiles; ++t) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int head = t * 8 + j * 2 + i % 2, cluster = tile + g + i / 2 * 8;
        acc[t][i] *= p.scale;
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

// Grid: [blocks a row and head, num_kv_heads, num_reqs]. kHeadTiles: query heads a KV
// head / 8, up.
template <typename T, int kHeadSize, int kHeadTiles>
__global__ void __launch_bounds__(kScoreWarps * 32)
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
