// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the vllm_clusterkv project
//
// One task scores the clusters of kPagesPerTask pages for the query heads of one
// KV head, so that each centroid is read and widened once for up to four heads. The
// softmax sums of its tiles follow while its scores are in the nearest cache.
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "../checks.h"
#include "cluster_tokens.h"
#include "dispatch.h"
#include "key_codes.h"

namespace clusterkv::cpu {
namespace {

constexpr int64_t kPagesPerTask = 8;  // of at least 8 clusters: kClustersAtOnce
constexpr int64_t kGrain = 1024;      // group * head_size: less is not worth waking a thread

constexpr int64_t kTilesAtOnce = 4;
constexpr int64_t kClustersAtOnce = kTilesAtOnce * kTileClusters;

// Of each tile max and sum of tokens * exp(scores - max), over clusters with tokens.
//   scores, tokens: [kTilesAtOnce, kTileClusters]
//   stats: [kTilesAtOnce, 2]
void write_tile_stats(const float* scores, const float* tokens, float* stats) {
  constexpr int kVecs = kTileClusters / kLanes;
  constexpr float kLowest = -std::numeric_limits<float>::infinity();
  Vec logits[kTilesAtOnce][kVecs], maxima[kTilesAtOnce], sums[kTilesAtOnce] = {};
  for (int t = 0; t < kTilesAtOnce; ++t) {
    for (int v = 0; v < kVecs; ++v) {
      const int64_t c = t * kTileClusters + v * kLanes;
      const Vec score = load<Vec>(scores + c), lowest = Vec{} + kLowest;
      logits[t][v] = load<Vec>(tokens + c) > 0.0f ? score : lowest;
      if (v == 0) maxima[t] = logits[t][v];
      maxima[t] = logits[t][v] > maxima[t] ? logits[t][v] : maxima[t];
    }
  }
  const Vec4 max = max_lanes(maxima);
  for (int t = 0; t < kTilesAtOnce; ++t) {
    const float origin = max[t] == kLowest ? 0.0f : max[t];
    for (int v = 0; v < kVecs; ++v) {
      const Vec count = load<Vec>(tokens + t * kTileClusters + v * kLanes);
      sums[t] += count * fast_exp(logits[t][v] - origin);
    }
  }
  const Vec4 sum = sum_lanes(sums);
  for (int t = 0; t < kTilesAtOnce; ++t) {
    stats[2 * t] = max[t];
    stats[2 * t + 1] = sum[t];
  }
}

// The square of a query's element, rounded to its type, as tensor cores take it.
inline float rounded_square(float x, float) { return x * x; }
inline float rounded_square(float x, BFloat16) { return static_cast<BFloat16>(x * x); }
inline float rounded_square(float x, Half) {  // Half ends at 65504
  x = std::min(std::abs(static_cast<float>(static_cast<Half>(x / 16.0f))), 255.0f);
  return 256.0f * static_cast<float>(static_cast<Half>(x * x));
}

// Makes scores and estimates of a page's logits of mean keys.
//   squares: [group, head_size] fp32, of the query
//   spreads: [head_size + num_clusters], of the page and KV head
//   best: [group, num_clusters], from CodeReader::best_keys
//   logs: [num_clusters], of tokens
//   profile: [head_size + num_clusters], scratch
//   scores: [group, num_clusters], rows max_clusters apart; logits before
//   estimates: as scores
template <typename T>
void score_page(const float* __restrict squares, float scale, const T* spreads,
                const SemanticPages& pages, int64_t group, int64_t max_clusters,
                const float* __restrict best, const float* __restrict logs,
                float* __restrict profile, float* __restrict scores, float* __restrict estimates) {
  const int64_t head_size = pages.head_size, num_clusters = pages.num_clusters;
  float* radii = profile + head_size;
  load_packed(spreads, profile, head_size);  // in the order of the squares
  load_row(spreads + head_size, radii, num_clusters);
  for (int64_t c = 0; c < num_clusters; ++c) radii[c] *= scale;
  for (int64_t g = 0; g < group; ++g) {
    const float variance = dot(squares + g * head_size, profile, head_size);
    const float* best_of_head = best + g * num_clusters;
    float* of_head = scores + g * max_clusters;
    float* estimates_of_head = estimates + g * max_clusters;
#pragma omp simd
    for (int64_t c = 0; c < num_clusters; ++c) {
      const float of_mean = of_head[c];
      const float root = std::sqrt(1.0f + variance * radii[c] * radii[c]);
      const float by_spread = of_mean + std::min(kSpreadWeight * (root - 1.0f), kSpreadMost);
      const float by_best = of_mean + kCodeStep * radii[c] * best_of_head[c] - logs[c];
      // The larger, and of a NaN and a number the number.
      const float number = by_spread == by_spread ? by_spread : by_best;
      const float score = by_best > by_spread ? by_best : number;
      of_head[c] = score;
      estimates_of_head[c] = std::min(score, of_mean + kSpreadMost);
    }
  }
}

template <typename T>
void score_clusters_kernel(const ScoreClustersParams& p) {
  const SemanticPages& pages = p.pages;
  const DecodeRows& rows = p.rows;
  const int64_t head_size = pages.head_size;
  const int64_t group = rows.num_heads / pages.num_kv_heads;
  const int64_t chunks = (rows.max_blocks + kPagesPerTask - 1) / kPagesPerTask;
  const int64_t num_tasks = rows.num_reqs * pages.num_kv_heads * chunks;
  const int64_t grain = std::max<int64_t>(1, kGrain / (group * head_size));
  torch::stable::parallel_for(0, num_tasks, grain, [&](int64_t begin, int64_t end) {
    std::vector<float> query(group * head_size), squares(group * head_size);
    std::vector<float> tokens(kPagesPerTask * pages.num_clusters);
    std::vector<float> profile(head_size + pages.num_clusters);
    std::vector<float> best(group * pages.num_clusters), logs(pages.num_clusters);
    CodeReader codes(group, head_size);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t chunk = task % chunks, head = task / chunks % pages.num_kv_heads;
      const int64_t req = task / chunks / pages.num_kv_heads;
      const int64_t seq_len = rows.seq_lens[req];
      if (is_dense(seq_len, rows.min_sparse_lens[req])) continue;
      const int64_t num_pages = num_indexed_pages(seq_len, pages.block_size);
      const int64_t last = std::min((chunk + 1) * kPagesPerTask, num_pages);
      if (chunk * kPagesPerTask >= last) continue;
      const int64_t first_head = head * group;
      for (int64_t g = 0; g < group; ++g) {
        float* q = query.data() + g * head_size;
        const T* of_head = static_cast<const T*>(p.query) + req * p.query_row_stride +
                           (first_head + g) * p.query_head_stride;
        codes.set_query(g, of_head);
        load_packed(of_head, q, head_size);
        for (int64_t d = 0; d < head_size; ++d) {
          squares[g * head_size + d] = rounded_square(q[d], T());
          q[d] *= p.scale;
        }
      }
      const int64_t first_score = (req * rows.num_heads + first_head) * p.max_clusters;
      float* scores = p.scores + first_score;
      float* estimates = p.estimates + first_score;
      const auto centroids_of = [&](int64_t page) {
        const int64_t place = rows.index_table[req * rows.index_table_stride + page];
        return static_cast<const T*>(pages.centroids) + place * pages.centroid_block_stride +
               head * pages.centroid_head_stride;
      };
      const auto spreads_of = [&](int64_t page) {
        const int64_t place = rows.index_table[req * rows.index_table_stride + page];
        return static_cast<const T*>(pages.spreads) + place * pages.spread_block_stride +
               head * pages.spread_head_stride;
      };
      const auto codes_of = [&](int64_t page) {
        const int64_t place = rows.index_table[req * rows.index_table_stride + page];
        return pages.codes + place * pages.codes_block_stride + head * pages.codes_head_stride;
      };
      const int64_t size_of_codes = code_bytes(head_size, sizeof(T));
      // Every page is a new place in memory: find all of them before reading any.
      const int64_t first_page = chunk * kPagesPerTask;
      for (int64_t page = first_page; page < last; ++page) {
        prefetch(centroids_of(page), 1);
        prefetch(centroids_of(page) + (pages.num_clusters - 1) * pages.centroid_row_stride, 1);
        prefetch(spreads_of(page), head_size + pages.num_clusters);
        prefetch(ends_of_page(pages, rows, req, head, page), pages.num_clusters);
        prefetch(codes_of(page), page == first_page ? size_of_codes : 1);
      }
      for (int64_t page = first_page; page < last; ++page) {
        const T* centroids = centroids_of(page);
        if (page + 1 < last) prefetch(codes_of(page + 1), size_of_codes);
        for (int64_t c = 0; c < pages.num_clusters; c += kDotRows) {
          const T* keys[kDotRows];
          for (int i = 0; i < kDotRows; ++i) {
            keys[i] = centroids + (c + i) * pages.centroid_row_stride;
          }
          float* out = scores + page * pages.num_clusters + c;
          for_head_blocks(group, [&](auto heads, int64_t first) {
            dot_rows<decltype(heads)::value>(query.data() + first * head_size, keys, 0, head_size,
                                             out + first * p.max_clusters, p.max_clusters);
          });
        }
        float* of_page = tokens.data() + (page - first_page) * pages.num_clusters;
        count_page_tokens(ends_of_page(pages, rows, req, head, page), pages.num_clusters, page,
                          p.num_sink_tokens, of_page);
        for (int64_t c = 0; c < pages.num_clusters; ++c) {
          logs[c] = log_count(static_cast<int64_t>(of_page[c]));
        }
        codes.best_keys<T>(codes_of(page), pages.num_clusters, best.data());
        const int64_t first_of_page = page * pages.num_clusters;
        score_page(squares.data(), p.scale, spreads_of(page), pages, group, p.max_clusters,
                   best.data(), logs.data(), profile.data(), scores + first_of_page,
                   estimates + first_of_page);
      }
      const int64_t max_tiles = num_tiles(p.max_clusters);
      const int64_t first_cluster = first_page * pages.num_clusters;
      const int64_t num_clusters = (last - first_page) * pages.num_clusters;
      std::fill(tokens.begin() + num_clusters, tokens.end(), 0.0f);
      for (int64_t g = 0; g < group; ++g) {
        const int64_t query_head = req * rows.num_heads + first_head + g;
        const float* of_head = scores + g * p.max_clusters + first_cluster;
        float* stats = p.tile_stats + 2 * (query_head * max_tiles + first_cluster / kTileClusters);
        int64_t c = 0;
        for (; c + kClustersAtOnce <= num_clusters; c += kClustersAtOnce) {
          write_tile_stats(of_head + c, tokens.data() + c, stats + c / kTileClusters * 2);
        }
        if (c == num_clusters) continue;
        float padded[kClustersAtOnce] = {}, padded_stats[2 * kTilesAtOnce];
        std::copy(of_head + c, of_head + num_clusters, padded);
        write_tile_stats(padded, tokens.data() + c, padded_stats);
        std::copy_n(padded_stats, 2 * num_tiles(num_clusters - c), stats + c / kTileClusters * 2);
      }
    }
  });
}

void score_clusters(Tensor query, Tensor kv_cache, Tensor centroids, Tensor spreads,
                    Tensor cluster_ends, Tensor codes, Tensor block_table, Tensor seq_lens,
                    Tensor min_sparse_lens, double scale, int64_t num_sink_tokens, Tensor scores,
                    Tensor estimates, Tensor tile_stats, OptionalTensor index_table) {
  const ScoreClustersParams params = check_score_clusters(
      query, kv_cache, centroids, spreads, cluster_ends, codes, block_table, seq_lens,
      min_sparse_lens, scale, num_sink_tokens, scores, estimates, tile_stats, index_table);
  CLUSTERKV_DISPATCH_KV_DTYPE(kv_cache.scalar_type(), "score_clusters",
                              score_clusters_kernel<scalar_t>(params));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(clusterkv, CPU, m) {
  m.impl("score_clusters", TORCH_BOX(&score_clusters));
}

}  // namespace clusterkv::cpu
