// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the vllm_clusterkv project
//
// Scores of clusters, by tensor cores: a warp takes 16 mean keys at a time (the rows
// of a fragment) against the query heads of one KV head (its columns). A dot product
// does not mind the order of its terms, so fragments are filled straight from 16-byte
// loads: of each 32 elements, lane j of a quad holds 8 j to 8 j + 7.
#pragma once

#include "../params.h"
#include "ptx.cuh"

namespace clusterkv::cuda {

constexpr int kScoreWarps = 4;

// Grid: [splits, num_kv_heads, num_reqs]. kHeadTiles: query heads a KV head / 8, up.
template <typename T, int kHeadSize, int kHeadTiles>
__global__ void __launch_bounds__(kScoreWarps * 32)
    score_clusters_kernel(const ScoreClustersParams p) {
  constexpr int kSegments = kHeadSize / 32;
  const SemanticPages& pages = p.pages;
  const int req = blockIdx.z, kv_head = blockIdx.y;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, j = lane % 4;
  const int64_t seq_len = p.rows.seq_lens[req];
  const bool dense = is_dense(seq_len, p.rows.min_sparse_lens[req]);

  wait_for_previous_kernel();
  start_next_kernel();
  const int num_rows =  // mean keys of the request and KV head
      dense ? 0
            : static_cast<int>(num_indexed_pages(seq_len, pages.block_size)) *
                  static_cast<int>(pages.num_clusters);
  const int num_tiles = (num_rows + 15) / 16;
  const int first_tile = blockIdx.x * kScoreWarps + warp, step = gridDim.x * kScoreWarps;
  if (first_tile >= num_tiles) return;

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

  const int log_clusters = 31 - __clz(static_cast<int>(pages.num_clusters));
  const T* centroids =
      static_cast<const T*>(pages.centroids) + kv_head * pages.centroid_head_stride + j * 8;
  const int32_t* block_table = p.rows.block_table + req * p.rows.block_table_stride;
  const auto load_row = [&](int row, uint4(&keys)[kSegments]) {
    const bool valid = row < num_rows;
    const int64_t block = valid ? block_table[row >> log_clusters] : 0;
    const T* source = centroids + block * pages.centroid_block_stride +
                      (row & (pages.num_clusters - 1)) * pages.centroid_row_stride;
#pragma unroll
    for (int s = 0; s < kSegments; ++s) {
      keys[s] = valid ? __ldg(reinterpret_cast<const uint4*>(source + s * 32)) : uint4{};
    }
  };
  float* scores = p.scores + (req * p.rows.num_heads + kv_head * group) * p.max_clusters;

  uint4 next[2][kSegments];
  load_row(first_tile * 16 + g, next[0]);
  load_row(first_tile * 16 + g + 8, next[1]);
  for (int tile = first_tile; tile < num_tiles; tile += step) {
    uint4 keys[2][kSegments];
#pragma unroll
    for (int s = 0; s < kSegments; ++s) {
      keys[0][s] = next[0][s];
      keys[1][s] = next[1][s];
    }
    if (tile + step < num_tiles) {
      load_row((tile + step) * 16 + g, next[0]);
      load_row((tile + step) * 16 + g + 8, next[1]);
    }
    float acc[kHeadTiles][4] = {};
#pragma unroll
    for (int s = 0; s < kSegments; ++s) {
      const uint32_t first[4] = {keys[0][s].x, keys[1][s].x, keys[0][s].y, keys[1][s].y};
      const uint32_t second[4] = {keys[0][s].z, keys[1][s].z, keys[0][s].w, keys[1][s].w};
#pragma unroll
      for (int t = 0; t < kHeadTiles; ++t) {
        mma_m16n8k16<T>(acc[t], first, query[t][s].x, query[t][s].y);
        mma_m16n8k16<T>(acc[t], second, query[t][s].z, query[t][s].w);
      }
    }
#pragma unroll
    for (int t = 0; t < kHeadTiles; ++t) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int head = t * 8 + j * 2 + i % 2, row = tile * 16 + g + i / 2 * 8;
        if (head < group && row < num_rows) {
          scores[head * p.max_clusters + row] = p.scale * acc[t][i];
        }
      }
    }
  }
}

}  // namespace clusterkv::cuda
