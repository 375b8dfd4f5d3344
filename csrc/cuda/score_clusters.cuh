// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the vllm_clusterkv project
//
// Scores of clusters, by tensor cores: a warp takes a page, 16 mean keys at a time (the rows
// of a fragment), against the query heads of one KV head (its columns). A dot product does not
// mind the order of its terms, so fragments are filled straight from words of codes: of each 32
// elements, lane j of a quad holds 8 j to 8 j + 7, which are a word.
//
// Codes are whole numbers and a half; what makes a key of them stays outside: deviations are in
// the query's fragments, a page's own, and a step is a factor of its cluster's product.
//
// The base's logit, and the variance of a head's logits in a page, are the products of the
// page's base with the query and of its profile with the query's squares, in every row of a
// fragment: so they lie as scores do.
//
// While a tile's scores are in registers, their softmax sums cost little: tile_stats.
#pragma once

#include "../params.h"
#include "page_shape.h"
#include "ptx.cuh"
#include "short_means.cuh"

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

// The products of two elements of a query with two deviations, at most what fp16 has.
template <typename T>
__device__ __forceinline__ uint32_t asked_pair(uint32_t query, uint32_t deviations) {
  return multiply_pairs<T>(query, deviations);
}

template <>
__device__ __forceinline__ uint32_t asked_pair<__half>(uint32_t query, uint32_t deviations) {
  const uint32_t product = multiply_pairs<__half>(query, deviations);
  __half2 pair = reinterpret_cast<const __half2&>(product);
  pair = __hmin2_nan(pair, __float2half2_rn(kLargestHalf));
  pair = __hmax2_nan(pair, __float2half2_rn(-kLargestHalf));
  return reinterpret_cast<const uint32_t&>(pair);
}

// The query heads of a row and KV head, for every warp. 16 bytes of padding:
// eight heads' chunks are then in different banks.
template <typename T, int kHeadSize, int kHeadTiles>
struct ScoreShared {
  T query[8 * kHeadTiles][kHeadSize + 8];
};

// What the variance of its logits adds to a cluster's score. Not a number stays so.
__device__ __forceinline__ float spread_score(float variance) {
  const float added = kSpreadWeight * (fast_sqrt(1.0f + variance) - 1.0f);
  return added > kSpreadMost ? kSpreadMost : added;
}

// Indexed pages of a row that is not dense, else 0.
__device__ __forceinline__ int num_row_pages(const DecodeRows& rows, int req) {
  const int seq_len = rows.seq_lens[req];
  if (is_dense(seq_len, rows.min_sparse_lens[req])) return 0;
  return seq_len > 0 ? (seq_len - 1) / kPageRows : 0;
}

// What a warp needs of a page, and has on its way while it is busy with the one before.
template <int kHeadSize, int kPageTiles>
struct PageLoads {
  static constexpr int kSegments = kHeadSize / 32;
  uint32_t words[kPageTiles][2][kSegments];  // codes of mean keys g and g + 8 of each tile
  uint4 base[kSegments], deviations[kSegments], profile[kSegments];
  // Of clusters 2 lane and 2 lane + 1, 16 bits each.
  uint32_t ends, steps, radii;
};

// Scores the clusters of a row and KV head. Its pages are dealt to `num_workers` warps, of which
// this one is `worker`.
template <typename T, int kHeadSize, int kHeadTiles, int kPageTiles>
__device__ __forceinline__ void score_row(ScoreShared<T, kHeadSize, kHeadTiles>& shared,
                                          const ScoreClustersParams& p, int req, int kv_head,
                                          int worker, int num_workers) {
  using Loads = PageLoads<kHeadSize, kPageTiles>;
  constexpr int kSegments = Loads::kSegments, kClusters = 16 * kPageTiles;
  const SemanticPages& pages = p.pages;
  const IndexFields& fields = pages.fields;
  const int lane = threadIdx.x % 32, g = lane / 4, j = lane % 4;
  const int group = static_cast<int>(p.rows.num_heads) / static_cast<int>(pages.num_kv_heads);
  const int32_t* index_table = p.rows.index_table + req * p.rows.index_table_stride;
  // Where pages' indexes are. They are looked up before it is known where the row ends: what is
  // behind that is not used.
  const int last_block = static_cast<int>(p.rows.max_blocks) - 1;
  const auto look_up = [&](int page) { return load_now(index_table + min(page, last_block)); };
  int place = look_up(worker), next_place = look_up(worker + num_workers);
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
  const int num_pages = num_row_pages(p.rows, req);
  if (static_cast<int>(blockIdx.x) * kScoreWarps >= num_pages) return;  // all warps of the block

  const uint8_t* indexes = pages.index + kv_head * pages.index_head_stride;
  const auto index_at = [&](int place) {
    return indexes + multiply_wide(place, static_cast<int>(pages.index_block_stride));
  };
  Loads next;
  const auto load_words_of = [&](const uint8_t* index, int tile) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      load_words(index + ((tile * 16 + i * 8 + g) * 4 + j) * kSegments * 4, next.words[tile][i]);
    }
  };
  const auto load_rest = [&](const uint8_t* index) {
#pragma unroll
    for (int s = 0; s < kSegments; ++s) {
      const auto load = [&](int64_t field) {
        return __ldg(reinterpret_cast<const uint4*>(index + field) + j + s * 4);
      };
      next.base[s] = load(fields.key_base);
      next.deviations[s] = load(fields.key_deviations);
      next.profile[s] = load(fields.profile);
    }
    const int pair = min(lane, kClusters / 2 - 1);
    const auto load = [&](int64_t field) {
      return __ldg(reinterpret_cast<const uint32_t*>(index + field) + pair);
    };
    next.ends = load(fields.cluster_ends);
    next.steps = load(fields.key_steps);
    next.radii = load(fields.radii);
  };
  if (worker < num_pages) {
    const uint8_t* index = index_at(place);
    load_rest(index);
#pragma unroll
    for (int tile = 0; tile < kPageTiles; ++tile) load_words_of(index, tile);
  }

  // Behind the loads above, so that all are under way at once.
#pragma unroll
  for (int i = 0; i < kQueryChunks; ++i) {
    const int chunk = i * kScoreThreads + threadIdx.x;
    const int head = chunk / (kHeadSize / 8), col = chunk % (kHeadSize / 8) * 8;
    if (head < 8 * kHeadTiles) *reinterpret_cast<uint4*>(&shared.query[head][col]) = loaded[i];
  }
  __syncthreads();
  const auto load_query = [&](int head_tile, int segment) {
    return *reinterpret_cast<const uint4*>(&shared.query[head_tile * 8 + g][j * 8 + segment * 32]);
  };
  const int64_t first_head = req * p.rows.num_heads + kv_head * group;
  float* scores = p.scores + first_head * p.max_clusters;
  const uint32_t max_tiles = static_cast<uint32_t>(num_tiles(p.max_clusters));
  float2* stats = reinterpret_cast<float2*>(p.tile_stats) + first_head * max_tiles;

  for (int page = worker; page < num_pages; page += num_workers) {
    // The page's own queries, and what its clusters have in common.
    uint32_t asked[kHeadTiles][kSegments][4];
    float of_base[kHeadTiles][4] = {}, variances[kHeadTiles][4] = {};
#pragma unroll
    for (int s = 0; s < kSegments; ++s) {
      const uint4 base = next.base[s], deviations = next.deviations[s], profile = next.profile[s];
      const uint32_t base_low[4] = {base.x, base.x, base.y, base.y};
      const uint32_t base_high[4] = {base.z, base.z, base.w, base.w};
      const uint32_t profile_low[4] = {profile.x, profile.x, profile.y, profile.y};
      const uint32_t profile_high[4] = {profile.z, profile.z, profile.w, profile.w};
#pragma unroll
      for (int t = 0; t < kHeadTiles; ++t) {
        const uint4 query = load_query(t, s);
        asked[t][s][0] = asked_pair<T>(query.x, deviations.x);
        asked[t][s][1] = asked_pair<T>(query.y, deviations.y);
        asked[t][s][2] = asked_pair<T>(query.z, deviations.z);
        asked[t][s][3] = asked_pair<T>(query.w, deviations.w);
        mma_m16n8k16<T>(of_base[t], base_low, query.x, query.y);
        mma_m16n8k16<T>(of_base[t], base_high, query.z, query.w);
        mma_m16n8k16<T>(variances[t], profile_low, square_pair<T>(query.x),
                        square_pair<T>(query.y));
        mma_m16n8k16<T>(variances[t], profile_high, square_pair<T>(query.z),
                        square_pair<T>(query.w));
      }
    }
    // Of this lane's two clusters: tokens, step, and what makes a variance of the page's.
    const int previous_end = static_cast<int>(__shfl_up_sync(~0u, next.ends, 1) >> 16);
    const int sinks = page == 0 ? static_cast<int>(p.num_sink_tokens) : 0;
    const int middle = static_cast<int>(next.ends & 0xffff),
              end = static_cast<int>(next.ends >> 16);
    const int own_counts = (middle - (lane == 0 ? sinks : previous_end)) | (end - middle) << 16;
    const uint32_t own_steps = next.steps, own_radii = next.radii;

    const bool has_next = page + num_workers < num_pages;
    const uint8_t* next_index = index_at(next_place);
    next_place = look_up(page + 2 * num_workers);  // at the loop's end, it takes more registers
    if (has_next) load_rest(next_index);
    // All tiles side by side: their products, and then their sums, do not wait for each other.
    float acc[kPageTiles][kHeadTiles][4] = {};
#pragma unroll
    for (int s = 0; s < kSegments; ++s) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
#pragma unroll
        for (int tile = 0; tile < kPageTiles; ++tile) {
          uint32_t keys[4];
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            keys[i] = code_pair<T>(next.words[tile][i % 2][s], 2 * h + i / 2);
          }
#pragma unroll
          for (int t = 0; t < kHeadTiles; ++t) {
            mma_m16n8k16<T>(acc[tile][t], keys, asked[t][s][2 * h], asked[t][s][2 * h + 1]);
          }
        }
      }
    }
    if (has_next) {
#pragma unroll
      for (int tile = 0; tile < kPageTiles; ++tile) load_words_of(next_index, tile);
    }
    int counts[kPageTiles][2];
#pragma unroll
    for (int tile = 0; tile < kPageTiles; ++tile) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int owner = tile * 8 + i * 4 + g / 2;
        const auto own = [&](uint32_t pair) {
          const uint32_t both = __shfl_sync(~0u, pair, owner);
          return g % 2 == 0 ? both & 0xffff : both >> 16;
        };
        counts[tile][i] = static_cast<int>(own(own_counts));
        // Codes come twice as large.
        const float step = 0.5f * p.scale * unpack<T>(own(own_steps)).x;
        const float radius = unpack<T>(own(own_radii)).x * (p.scale / kSquareScale<T>);
#pragma unroll
        for (int t = 0; t < kHeadTiles; ++t) {
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            float& score = acc[tile][t][2 * i + h];
            score = p.scale * of_base[t][h] + step * score +
                    spread_score(variances[t][h] * (radius * radius));
          }
        }
      }
    }
    const int first = page * kClusters;
#pragma unroll
    for (int t = 0; t < kHeadTiles; ++t) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int head = t * 8 + j * 2 + h;
        float max[kPageTiles], sum[kPageTiles];
#pragma unroll
        for (int tile = 0; tile < kPageTiles; ++tile) {
          const float low = acc[tile][t][h], high = acc[tile][t][h + 2];
          if (head < group) {
            float* const of_tile = scores + head * p.max_clusters + first + tile * 16 + g;
            of_tile[0] = low;
            of_tile[8] = high;
          }
          max[tile] = counts[tile][0] > 0 ? low : -INFINITY;
          if (counts[tile][1] > 0) max[tile] = fmaxf(max[tile], high);
        }
        // A head's scores are in the lanes of equal j.
#pragma unroll
        for (int d = 4; d < 32; d *= 2) {
#pragma unroll
          for (int tile = 0; tile < kPageTiles; ++tile) {
            max[tile] = fmaxf(max[tile], __shfl_xor_sync(~0u, max[tile], d));
          }
        }
#pragma unroll
        for (int tile = 0; tile < kPageTiles; ++tile) {
          const float origin = max[tile] == -INFINITY ? 0.0f : max[tile];
          sum[tile] = 0.0f;
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            if (counts[tile][i] > 0) {
              sum[tile] += counts[tile][i] * fast_exp2((acc[tile][t][h + 2 * i] - origin) * kLog2e);
            }
          }
        }
#pragma unroll
        for (int d = 4; d < 32; d *= 2) {
#pragma unroll
          for (int tile = 0; tile < kPageTiles; ++tile) {
            sum[tile] += __shfl_xor_sync(~0u, sum[tile], d);
          }
        }
        if (g == 0 && head < group) {
#pragma unroll
          for (int tile = 0; tile < kPageTiles; ++tile) {
            stats[head * max_tiles + page * kPageTiles + tile] = float2{max[tile], sum[tile]};
          }
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
template <typename T, int kHeadSize, int kHeadTiles, int kPageTiles>
__global__ void __launch_bounds__(kScoreThreads, score_blocks(kHeadSize, kHeadTiles))
    score_clusters_kernel(const ScoreClustersParams p) {
  __shared__ __align__(16) ScoreShared<T, kHeadSize, kHeadTiles> shared;
  // The kernel before may be anyone's, and may write what is read first.
  wait_for_previous_kernel();
  start_next_kernel();
  score_row<T, kHeadSize, kHeadTiles, kPageTiles>(shared, p, blockIdx.z, blockIdx.y,
                                                  blockIdx.x * kScoreWarps + threadIdx.x / 32,
                                                  gridDim.x * kScoreWarps);
}

}  // namespace clusterkv::cuda
