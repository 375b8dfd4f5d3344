// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the vllm_clusterkv project
//
// One task scores the clusters of kPagesPerTask pages for the query heads of one
// KV head, so that each code is made a number once for up to four heads. The
// softmax sums of its tiles follow while its scores are in the nearest cache.
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "../checks.h"
#include "cluster_tokens.h"
#include "dispatch.h"
#include "short_means.h"

namespace clusterkv::cpu {
namespace {

constexpr int64_t kPagesPerTask = 8;  // of at least 16 clusters: twice kClustersAtOnce
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
template <typename T>
inline float rounded_square(float x, T type) {
  return rounded(x * x, type);
}
inline float rounded_square(float x, Half type) {  // Half ends at 65504
  x = std::min(rounded(std::abs(x) / 16.0f, type), 255.0f);
  return 256.0f * rounded(x * x, type);
}

// Products of a query with deviations, likewise.
template <typename T>
inline Vec rounded_products(Vec query, Vec deviations, T type) {
  return rounded(query * deviations, type);
}
inline Vec rounded_products(Vec query, Vec deviations, Half type) {
  const Vec products = query * deviations, most = Vec{} + kLargestHalf;
  const Vec bounded = products > most ? most : products;
  return rounded(bounded < -most ? -most : bounded, type);
}

// The queries of one KV head and row, and the logits they give its clusters.
template <typename T>
class GroupScores {
 public:
  GroupScores(const SemanticPages& pages, int64_t group, float scale, int64_t max_clusters)
      : pages_(pages),
        group_(group),
        scale_(scale),
        max_clusters_(max_clusters),
        num_places_(num_key_places(pages.head_size)),
        places_(pages.head_size),
        query_(group * pages.head_size),
        squares_(group * pages.head_size),
        placed_query_(group * num_places_),
        asked_(group * num_places_),
        deviations_(num_places_),
        row_(pages.head_size),
        of_base_(group),
        variances_(group),
        steps_(pages.num_clusters),
        radii_(pages.num_clusters) {
    for (int64_t d = 0; d < pages.head_size; ++d) {
      places_[d] = static_cast<int32_t>(key_place(pages.head_size, d));
    }
  }

  // query: [group, head_size], rows head_stride apart
  void set_query(const T* query, int64_t head_stride) {
    const int64_t head_size = pages_.head_size;
    for (int64_t g = 0; g < group_; ++g) {
      const T* of_head = query + g * head_stride;
      for (int64_t d = 0; d < head_size; ++d) {
        placed_query_[g * num_places_ + places_[d]] = widen(of_head[d]);
      }
      float* q = query_.data() + g * head_size;
      float* squares = squares_.data() + g * head_size;
      load_packed(of_head, q, head_size);
#pragma omp simd
      for (int64_t d = 0; d < head_size; ++d) squares[d] = rounded_square(q[d], T());
    }
  }

  // scores: [group, num_clusters], rows max_clusters apart. Written. Asks for the codes of
  // `next`, an index.
  void score_page(const uint8_t* index, const uint8_t* next, float* scores) {
    const IndexFields& fields = pages_.fields;
    const int64_t head_size = pages_.head_size, num_clusters = pages_.num_clusters;
    dot_rows_of_queries(query_, at(index, fields.key_base), of_base_);
    dot_rows_of_queries(squares_, at(index, fields.profile), variances_);
    const T* deviations = at(index, fields.key_deviations);
    for (int64_t d = 0; d < head_size; ++d) deviations_[places_[d]] = widen(deviations[d]);
    for (int64_t g = 0; g < group_; ++g) {
      const float* query = placed_query_.data() + g * num_places_;
      float* asked = asked_.data() + g * num_places_;
      for (int64_t i = 0; i < num_places_; i += kLanes) {
        const Vec products =
            rounded_products(load<Vec>(query + i), load<Vec>(deviations_.data() + i), T());
        std::memcpy(asked + i, &products, sizeof(products));
      }
    }
    for_head_blocks(group_, [&](auto heads, int64_t first) {
      dot_key_codes<decltype(heads)::value>(asked_.data() + first * num_places_, index, next,
                                            num_clusters, head_size, scores + first * max_clusters_,
                                            max_clusters_);
    });
    load_row(at(index, fields.key_steps), steps_.data(), num_clusters);
    load_row(at(index, fields.radii), radii_.data(), num_clusters);
    for (int64_t g = 0; g < group_; ++g)
      finish(of_base_[g], variances_[g], scores + g * max_clusters_);
  }

 private:
  static const T* at(const uint8_t* index, int64_t offset) {
    return reinterpret_cast<const T*>(index + offset);
  }

  // results[g] = queries[g] . row
  void dot_rows_of_queries(const std::vector<float>& queries, const T* row,
                           std::vector<float>& results) {
    const int64_t head_size = pages_.head_size;
    load_packed(row, row_.data(), head_size);
    for (int64_t g = 0; g < group_; ++g) {
      results[g] = dot(queries.data() + g * head_size, row_.data(), head_size);
    }
  }

  // Makes scores of a page's dot products with codes.
  void finish(float of_base, float variance, float* __restrict scores) const {
    const float* __restrict steps = steps_.data();
    const float* __restrict radii = radii_.data();
#pragma omp simd
    for (int64_t c = 0; c < pages_.num_clusters; ++c) {
      const float radius = scale_ * radii[c];
      const float root = std::sqrt(1.0f + variance * radius * radius);
      const float spread = std::min(kSpreadWeight * (root - 1.0f), kSpreadMost);
      scores[c] = scale_ * (of_base + steps[c] * scores[c]) + spread;
    }
  }

  const SemanticPages& pages_;
  const int64_t group_;
  const float scale_;
  const int64_t max_clusters_, num_places_;
  std::vector<int32_t> places_;             // [head_size], of dimensions in the order of the codes
  std::vector<float> query_;                // [group, head_size], in packed order
  std::vector<float> squares_;              // likewise
  std::vector<float> placed_query_;         // [group, num_places], in the order of the codes
  std::vector<float> asked_;                // likewise, times a page's deviations
  std::vector<float> deviations_;           // [num_places]
  std::vector<float> row_;                  // [head_size], in packed order
  std::vector<float> of_base_, variances_;  // [group]
  std::vector<float> steps_, radii_;        // [num_clusters]
};

template <typename T>
void score_clusters_kernel(const ScoreClustersParams& p) {
  const SemanticPages& pages = p.pages;
  const DecodeRows& rows = p.rows;
  const int64_t group = rows.num_heads / pages.num_kv_heads;
  const int64_t chunks = (rows.max_blocks + kPagesPerTask - 1) / kPagesPerTask;
  const int64_t num_tasks = rows.num_reqs * pages.num_kv_heads * chunks;
  const int64_t grain = std::max<int64_t>(1, kGrain / (group * pages.head_size));
  torch::stable::parallel_for(0, num_tasks, grain, [&](int64_t begin, int64_t end) {
    GroupScores<T> of_group(pages, group, p.scale, p.max_clusters);
    std::vector<float> tokens(kPagesPerTask * pages.num_clusters);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t chunk = task % chunks, head = task / chunks % pages.num_kv_heads;
      const int64_t req = task / chunks / pages.num_kv_heads;
      const int64_t seq_len = rows.seq_lens[req];
      if (is_dense(seq_len, rows.min_sparse_lens[req])) continue;
      const int64_t num_pages = num_indexed_pages(seq_len, pages.block_size);
      const int64_t first_page = chunk * kPagesPerTask;
      const int64_t last = std::min(first_page + kPagesPerTask, num_pages);
      if (first_page >= last) continue;
      const int64_t first_head = head * group;
      of_group.set_query(static_cast<const T*>(p.query) + req * p.query_row_stride +
                             first_head * p.query_head_stride,
                         p.query_head_stride);
      float* scores = p.scores + (req * rows.num_heads + first_head) * p.max_clusters;
      const auto index_of = [&](int64_t page) {
        return index_of_page(pages, rows, req, head, page);
      };
      // Every page is a new place in memory: find all of them before reading any.
      prefetch(index_of(first_page), pages.fields.value_codes);
      for (int64_t page = first_page; page < last; ++page) {
        prefetch(index_of(page) + pages.fields.cluster_ends,
                 pages.fields.bytes - pages.fields.cluster_ends);
      }
      for (int64_t page = first_page; page < last; ++page) {
        const uint8_t* index = index_of(page);
        of_group.score_page(index, index_of(std::min(page + 1, last - 1)),
                            scores + page * pages.num_clusters);
        count_page_tokens(ends_of_page(pages, rows, req, head, page), pages.num_clusters, page,
                          p.num_sink_tokens,
                          tokens.data() + (page - first_page) * pages.num_clusters);
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

void score_clusters(Tensor query, Tensor kv_cache, Tensor index, Tensor block_table,
                    Tensor seq_lens, Tensor min_sparse_lens, double scale, int64_t num_sink_tokens,
                    Tensor scores, Tensor tile_stats, OptionalTensor index_table) {
  const ScoreClustersParams params =
      check_score_clusters(query, kv_cache, index, block_table, seq_lens, min_sparse_lens, scale,
                           num_sink_tokens, scores, tile_stats, index_table);
  CLUSTERKV_DISPATCH_KV_DTYPE(kv_cache.scalar_type(), "score_clusters",
                              score_clusters_kernel<scalar_t>(params));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(clusterkv, CPU, m) {
  m.impl("score_clusters", TORCH_BOX(&score_clusters));
}

}  // namespace clusterkv::cpu
