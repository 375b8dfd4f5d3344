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
//
// Codes of keys (best_keys.cuh) come through shared memory, a tile ahead: in registers they
// would cost a block of each multiprocessor.
#pragma once

#include "../params.h"
#include "best_keys.cuh"
#include "page_shape.h"
#include "ptx.cuh"

namespace clusterkv::cuda {

constexpr int kScoreWarps = 4, kScoreThreads = kScoreWarps * 32;

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

// The query heads of a row and KV head, for every warp, and each warp's codes of keys: of
// two tiles in turn, in whose pages num_clusters of 8 makes two.
template <typename T, int kHeadSize, int kHeadTiles>
struct ScoreShared {
  SharedQuery<T, kHeadSize, kHeadTiles> query;
  PageCodes<kHeadSize> codes[];

  static constexpr size_t bytes(int64_t num_clusters) {
    const size_t pages = kScoreWarps * 2 * (num_clusters == 8 ? 2 : 1);
    return sizeof(ScoreShared) + pages * sizeof(PageCodes<kHeadSize>);
  }
};

// What the variance of its logits adds to a cluster's score. Not a number stays so.
__device__ __forceinline__ float spread_score(float variance) {
  const float added = kSpreadWeight * (fast_sqrt(1.0f + variance) - 1.0f);
  return added > kSpreadMost ? kSpreadMost : added;
}

// Clusters of a row that is not dense, else 0.
__device__ __forceinline__ int num_row_clusters(const SemanticPages& pages, const DecodeRows& rows,
                                                int req) {
  const int seq_len = rows.seq_lens[req];
  if (is_dense(seq_len, rows.min_sparse_lens[req])) return 0;
  const int num_pages = seq_len > 0 ? (seq_len - 1) / kPageRows : 0;
  return num_pages * static_cast<int>(pages.num_clusters);
}

// From block 0 to another's, in elements: launchers see that a stride fits 32 bits.
__device__ __forceinline__ int64_t block_offset(int place, int64_t stride) {
  return multiply_wide(place, static_cast<int>(stride));
}

// Scores the clusters of a row and KV head. Tiles of 16 are dealt to `num_workers`
// warps, of which this one is `worker`. With kTwoPages pages have 8 clusters, and rows g + 8
// of a tile's fragments are the second page's.
template <typename T, int kHeadSize, int kHeadTiles, bool kTwoPages>
__device__ __forceinline__ void score_row(ScoreShared<T, kHeadSize, kHeadTiles>& shared,
                                          const ScoreClustersParams& p, int req, int kv_head,
                                          int worker, int num_workers) {
  constexpr int kSegments = kHeadSize / 32;
  using Codes = PageCodes<kHeadSize>;
  using Shared = ScoreShared<T, kHeadSize, kHeadTiles>;
  const SemanticPages& pages = p.pages;
  const int lane = threadIdx.x % 32, g = lane / 4, j = lane % 4;
  const int first = worker * 16, step = num_workers * 16;
  const int group = static_cast<int>(p.rows.num_heads) / static_cast<int>(pages.num_kv_heads);
  const int num_clusters = static_cast<int>(pages.num_clusters);
  const int log_clusters = 31 - __clz(num_clusters);
  const bool has_half_page = num_clusters == 32;
  const int32_t* index_table = p.rows.index_table + req * p.rows.index_table_stride;
  // A tile's pages' indexes. They are loaded before it is known where the row ends: what is
  // behind that is not used.
  const int last_block = static_cast<int>(p.rows.max_blocks) - 1;
  const auto load_places = [&](int tile, int (&places)[2]) {
    places[0] = load_now(index_table + min(tile >> log_clusters, last_block));
    places[1] = places[0];
    if constexpr (kTwoPages) {
      places[1] = load_now(index_table + min((tile + 8) >> log_clusters, last_block));
    }
  };
  int places[2], next_places[2];
  load_places(first, places);
  load_places(first + step, next_places);
  const T* queries = static_cast<const T*>(p.query) + req * p.query_row_stride +
                     kv_head * group * p.query_head_stride;
  constexpr int kQueryChunks = (kHeadTiles * kHeadSize + kScoreThreads - 1) / kScoreThreads;
  uint4 loaded[kQueryChunks];
#pragma unroll
  for (int i = 0; i < kQueryChunks; ++i) {
    const int chunk = i * kScoreThreads + threadIdx.x;
    const int head = chunk / (kHeadSize / 8), col = chunk % (kHeadSize / 8) * 8;
    loaded[i] = uint4{};
    if (head < group) {
      loaded[i] =
          load_now(reinterpret_cast<const uint4*>(queries + head * p.query_head_stride + col));
    }
  }
  const int end = num_row_clusters(pages, p.rows, req);
  if (static_cast<int>(blockIdx.x) * kScoreWarps * 16 >= end) return;  // all warps of the block
  // A row's last tile may have one page alone.
  const auto check_second = [&](int tile) {
    if (kTwoPages && tile + 8 >= end) places[1] = places[0];
  };
  check_second(first);
  if (first >= end) places[0] = places[1] = 0;
  const T* centroids =
      static_cast<const T*>(pages.centroids) + kv_head * pages.centroid_head_stride + j * 8;
  const int row_stride = static_cast<int>(pages.centroid_row_stride);
  const auto load_keys = [&](int tile, const int (&places)[2], uint4(&keys)[2][kSegments]) {
    const int row = (tile & (num_clusters - 1)) + g;
    const T* low =
        centroids + block_offset(places[0], pages.centroid_block_stride) + row * row_stride;
    const T* high = low + 8 * row_stride;
    if constexpr (kTwoPages) {
      high = centroids + block_offset(places[1], pages.centroid_block_stride) + row * row_stride;
    }
#pragma unroll
    for (int s = 0; s < kSegments; ++s) {
      keys[0][s] = __ldg(reinterpret_cast<const uint4*>(low + s * 32));
      keys[1][s] = __ldg(reinterpret_cast<const uint4*>(high + s * 32));
    }
  };
  const T* spreads = static_cast<const T*>(pages.spreads) + kv_head * pages.spread_head_stride;
  const auto load_profile = [&](int place, uint4(&profile)[kSegments]) {
    const T* source = spreads + block_offset(place, pages.spread_block_stride) + j * 8;
#pragma unroll
    for (int s = 0; s < kSegments; ++s) {
      profile[s] = __ldg(reinterpret_cast<const uint4*>(source + s * 32));
    }
  };
  // Where a cluster ends and the one before it does, and its radius: of row g known to lanes
  // of even j, of row g + 8 to the others.
  struct Cluster {
    int end, begin;
    T radius;
  };
  const int own_row = g + j % 2 * 8;
  const int16_t* cluster_ends = pages.cluster_ends + kv_head * pages.ends_head_stride;
  const auto load_cluster = [&](int tile, const int (&places)[2], Cluster& loaded) {
    const int cluster = tile + own_row, c = cluster & (num_clusters - 1);
    const int place = j % 2 == 0 ? places[0] : places[1];
    const int16_t* ends = cluster_ends + block_offset(place, pages.ends_block_stride) + c;
    loaded.end = load_now(ends);
    loaded.begin = cluster == 0 ? static_cast<int>(p.num_sink_tokens) : 0;
    if (c > 0) loaded.begin = load_now(ends - 1);
    loaded.radius = spreads[block_offset(place, pages.spread_block_stride) + kHeadSize + c];
  };
  Codes* const codes = shared.codes + threadIdx.x / 32 * (kTwoPages ? 4 : 2);
  const uint8_t* page_codes = pages.codes + kv_head * pages.codes_head_stride;
  const auto fetch = [&](int tile, const int (&places)[2], int stage) {
    const uint8_t* source = page_codes + block_offset(places[0], pages.codes_block_stride);
    if constexpr (kTwoPages) {
      fetch_codes(codes[2 * stage], source, true, false);
      source = page_codes + block_offset(places[1], pages.codes_block_stride);
      fetch_codes(codes[2 * stage + 1], source, true, false);
    } else {
      fetch_codes(codes[stage], source, !has_half_page, tile >> 4 & 1);
    }
    cp_async_commit();
  };
  uint4 next[2][kSegments], next_profile[kSegments];
  Cluster next_cluster;
  load_keys(first, places, next);
  load_profile(places[0], next_profile);
  load_cluster(first, places, next_cluster);
  if (first < end) fetch(first, places, 0);
  int second_page = places[1];

  // Behind the loads above, so that all are under way at once.
#pragma unroll
  for (int i = 0; i < kQueryChunks; ++i) {
    const int chunk = i * kScoreThreads + threadIdx.x;
    const int head = chunk / (kHeadSize / 8), col = chunk % (kHeadSize / 8) * 8;
    if (head < 8 * kHeadTiles) *reinterpret_cast<uint4*>(shared.query.at(head, col)) = loaded[i];
  }
  __syncthreads();
  const auto load_query = [&](int head_tile, int segment) {
    return *reinterpret_cast<const uint4*>(
        shared.query.at(head_tile * 8 + g, j * 8 + segment * 32));
  };
  const int64_t first_head = req * p.rows.num_heads + kv_head * group;
  float* scores = p.scores + first_head * p.max_clusters;
  float* estimates = p.estimates + first_head * p.max_clusters;
  const uint32_t max_tiles = static_cast<uint32_t>(num_tiles(p.max_clusters));
  float2* stats = reinterpret_cast<float2*>(p.tile_stats) + first_head * max_tiles;

  for (int tile = first, stage = 0; tile < end; tile += step, stage ^= 1) {
    uint4 keys[2][kSegments];
#pragma unroll
    for (int s = 0; s < kSegments; ++s) {
      keys[0][s] = next[0][s];
      keys[1][s] = next[1][s];
    }
    // None beyond the row.
    const int count = tile + own_row < end ? next_cluster.end - next_cluster.begin : 0;
    const float radius = static_cast<float>(next_cluster.radius) * (p.scale / kSquareScale<T>);
    // Rows g of the fragment are the profile of the first 8 clusters' page, all the same,
    // and rows g + 8 that of the others': variances lie as scores do.
    float variances[kHeadTiles][4] = {};
    uint4 profile[kSegments];
    if constexpr (kTwoPages) load_profile(second_page, profile);
#pragma unroll
    for (int s = 0; s < kSegments; ++s) {
      const uint4 first_page = next_profile[s], page = kTwoPages ? profile[s] : first_page;
      const uint32_t low[4] = {first_page.x, page.x, first_page.y, page.y};
      const uint32_t high[4] = {first_page.z, page.z, first_page.w, page.w};
#pragma unroll
      for (int t = 0; t < kHeadTiles; ++t) {
        const uint4 squares = load_query(t, s);
        mma_m16n8k16<T>(variances[t], low, square_pair<T>(squares.x), square_pair<T>(squares.y));
        mma_m16n8k16<T>(variances[t], high, square_pair<T>(squares.z), square_pair<T>(squares.w));
      }
    }
    const bool has_next = tile + step < end;
    if (has_next) {
      places[0] = next_places[0];
      places[1] = next_places[1];
      check_second(tile + step);
      load_profile(places[0], next_profile);
      load_keys(tile + step, places, next);
      load_cluster(tile + step, places, next_cluster);
      __syncwarp();  // all are done with the stage
      fetch(tile + step, places, stage ^ 1);
      second_page = places[1];
      load_places(tile + 2 * step, next_places);
    }
    float acc[kHeadTiles][4] = {};
#pragma unroll
    for (int s = 0; s < kSegments; ++s) {
      const uint32_t low[4] = {keys[0][s].x, keys[1][s].x, keys[0][s].y, keys[1][s].y};
      const uint32_t high[4] = {keys[0][s].z, keys[1][s].z, keys[0][s].w, keys[1][s].w};
#pragma unroll
      for (int t = 0; t < kHeadTiles; ++t) {
        const uint4 query = load_query(t, s);
        mma_m16n8k16<T>(acc[t], low, query.x, query.y);
        mma_m16n8k16<T>(acc[t], high, query.z, query.w);
      }
    }
    const int other_count = __shfl_xor_sync(~0u, count, 1);
    const int counts[2] = {j % 2 == 0 ? count : other_count, j % 2 == 0 ? other_count : count};
    const float other_radius = __shfl_xor_sync(~0u, radius, 1);
    const float radii[2] = {j % 2 == 0 ? radius : other_radius, j % 2 == 0 ? other_radius : radius};
    const float log_counts[2] = {__logf(counts[0]), __logf(counts[1])};
    if (has_next) {
      cp_async_wait<1>();
    } else {
      cp_async_wait<0>();
    }
    __syncwarp();
    float best[kHeadTiles][4];
    constexpr int kPagesOfTile = kTwoPages ? 2 : 1;
#pragma unroll 1
    for (int i = 0; i < kPagesOfTile; ++i) {
      const Codes& page = codes[kPagesOfTile * stage + i];
      uint32_t weights[kHeadTiles][Codes::kFours][2];
      load_weights(page, shared.query, weights);
      constexpr int kQuads = Codes::kWords / 4;
      float products[kHeadTiles][4];
      best_products<kHeadSize>(page, weights, has_half_page ? (tile >> 4 & 1) * (kQuads / 2) : 0,
                               has_half_page ? kQuads / 2 : kQuads, products);
#pragma unroll
      for (int t = 0; t < kHeadTiles; ++t) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const float low = products[t][h], high = products[t][h + 2];
          // A page of 8 clusters fills all columns.
          const float most = kTwoPages ? fmaxf(low, high) : low;
          if (i == 0) best[t][h] = most;
          best[t][h + 2] = kTwoPages ? most : high;
        }
      }
    }
    constexpr float kBestScale = kSquareScale<T> * kCodeStep;
#pragma unroll
    for (int t = 0; t < kHeadTiles; ++t) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int head = t * 8 + j * 2 + i % 2, cluster = tile + g + i / 2 * 8;
        const float of_mean = acc[t][i] * p.scale;
        acc[t][i] = of_mean + spread_score(variances[t][i] * (radii[i / 2] * radii[i / 2]));
        const float of_best =
            of_mean + best[t][i] * (radii[i / 2] * kBestScale) - log_counts[i / 2];
        if (counts[i / 2] > 0) acc[t][i] = fmaxf(acc[t][i], of_best);
        if (head < group && cluster < end) {
          scores[head * p.max_clusters + cluster] = acc[t][i];
          estimates[head * p.max_clusters + cluster] = fminf(acc[t][i], of_mean + kSpreadMost);
        }
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

// Thread blocks whose registers a multiprocessor has room for.
constexpr int score_blocks(int head_size, int head_tiles) {
  return head_size * head_tiles <= 128 ? 3 : 2;
}

// Grid: [blocks a row and head, num_kv_heads, num_reqs]. kHeadTiles: query heads a KV
// head / 8, up.
template <typename T, int kHeadSize, int kHeadTiles, bool kTwoPages>
__global__ void __launch_bounds__(kScoreThreads, score_blocks(kHeadSize, kHeadTiles))
    score_clusters_kernel(const ScoreClustersParams p) {
  // The kernel before may be anyone's, and may write what is read first.
  wait_for_previous_kernel();
  start_next_kernel();
  extern __shared__ uint4 shared_bytes[];
  score_row<T, kHeadSize, kHeadTiles, kTwoPages>(
      *reinterpret_cast<ScoreShared<T, kHeadSize, kHeadTiles>*>(shared_bytes), p, blockIdx.z,
      blockIdx.y, blockIdx.x * kScoreWarps + threadIdx.x / 32, gridDim.x * kScoreWarps);
}

}  // namespace clusterkv::cuda
