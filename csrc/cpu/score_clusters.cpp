// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the vllm_clusterkv project
//
// One task scores the clusters of a part of a row's pages for the query heads of one
// KV head, so that each code is made a number once for up to four heads. The part's
// softmax sums follow, of up to four heads together too.
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

constexpr int64_t kGrain = 8192;  // pages * group * head_size: less is not worth waking a thread

static_assert(16 % kLanes == 0, "a page's 16, 32 or 64 clusters are whole vectors");

// Of each query head max and sum of tokens * exp(scores - max), over clusters with tokens.
//   scores: [kHeads, max_clusters], from the part's first page on
//   tokens: [num_pages, num_clusters], of the part's pages
//   sums: [kHeads, num_parts, 2], from the part on. Written, of the part.
template <int kHeads>
void write_softmax_sums(const ScoreClustersParams& p, const float* scores, const float* tokens,
                        int64_t num_pages, float* sums) {
  constexpr float kLowest = -std::numeric_limits<float>::infinity();
  const Vec lowest = Vec{} + kLowest;
  const int64_t num_clusters = p.pages.num_clusters;
  const auto for_each_vec = [&](const auto& f) {
    for (int64_t page = 0; page < num_pages; ++page) {
      const float* of_page = scores + page * p.num_parts * num_clusters;
      for (int64_t c = 0; c < num_clusters; c += kLanes) {
        const Vec count = load<Vec>(tokens + page * num_clusters + c);
#pragma GCC unroll 4
        for (int h = 0; h < kHeads; ++h) {
          const Vec score = load<Vec>(of_page + h * p.max_clusters + c);
          f(h, count, count > 0.0f ? score : lowest);
        }
      }
    }
  };
  Vec maxima[4] = {lowest, lowest, lowest, lowest}, totals[4] = {};
  for_each_vec(
      [&](int h, Vec, Vec logits) { maxima[h] = logits > maxima[h] ? logits : maxima[h]; });
  const Vec4 max = max_lanes(maxima);
  const Vec4 origin = max == kLowest ? Vec4{} : max;
  for_each_vec(
      [&](int h, Vec count, Vec logits) { totals[h] += count * fast_exp(logits - origin[h]); });
  const Vec4 sum = sum_lanes(totals);
  for (int h = 0; h < kHeads; ++h) {
    sums[h * p.num_parts * 2] = max[h];
    sums[h * p.num_parts * 2 + 1] = sum[h];
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
  const int64_t num_clusters = pages.num_clusters, num_parts = p.num_parts;
  const int64_t most_pages = (rows.max_blocks + num_parts - 1) / num_parts;  // of a part
  const int64_t num_tasks = rows.num_reqs * pages.num_kv_heads * num_parts;
  const int64_t task_size = most_pages * group * pages.head_size;
  const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(task_size, 1));
  torch::stable::parallel_for(0, num_tasks, grain, [&](int64_t begin, int64_t end) {
    GroupScores<T> of_group(pages, group, p.scale, p.max_clusters);
    std::vector<float> tokens(most_pages * num_clusters);
    int64_t last_pair = -1;  // row and KV head whose query of_group has
    for (int64_t task = begin; task < end; ++task) {
      const int64_t part = task % num_parts, pair = task / num_parts;
      const int64_t req = pair / pages.num_kv_heads, head = pair % pages.num_kv_heads;
      const int64_t seq_len = rows.seq_lens[req];
      if (is_dense(seq_len, rows.min_sparse_lens[req])) continue;
      const int64_t row_pages = num_indexed_pages(seq_len, pages.block_size);
      if (part >= row_pages) continue;
      const int64_t first_head = req * rows.num_heads + head * group;
      if (pair != last_pair) {
        of_group.set_query(static_cast<const T*>(p.query) + req * p.query_row_stride +
                               head * group * p.query_head_stride,
                           p.query_head_stride);
        last_pair = pair;
      }
      float* scores = p.scores + first_head * p.max_clusters;
      const auto index_of = [&](int64_t page) {
        return index_of_page(pages, rows, req, head, page);
      };
      // Every page is a new place in memory: ask for one while the one before it is scored.
      const auto ask_for_small_fields = [&](int64_t page) {
        prefetch(index_of(page) + pages.fields.cluster_ends,
                 pages.fields.bytes - pages.fields.cluster_ends);
      };
      prefetch(index_of(part), pages.fields.value_codes);
      ask_for_small_fields(part);
      int64_t num_pages = 0;
      for (int64_t page = part; page < row_pages; page += num_parts, ++num_pages) {
        const bool is_last = page + num_parts >= row_pages;
        const int64_t next = is_last ? std::min(part + 1, row_pages - 1) : page + num_parts;
        ask_for_small_fields(next);
        of_group.score_page(index_of(page), index_of(next), scores + page * num_clusters);
        count_page_tokens(ends_of_page(pages, rows, req, head, page), num_clusters, page,
                          p.num_sink_tokens, tokens.data() + num_pages * num_clusters);
      }
      float* sums = p.softmax_sums + (first_head * num_parts + part) * 2;
      for_head_blocks(group, [&](auto heads, int64_t first) {
        write_softmax_sums<decltype(heads)::value>(
            p, scores + first * p.max_clusters + part * num_clusters, tokens.data(), num_pages,
            sums + first * num_parts * 2);
      });
    }
  });
}

void score_clusters(Tensor query, Tensor kv_cache, Tensor index, Tensor block_table,
                    Tensor seq_lens, Tensor min_sparse_lens, double scale, int64_t num_sink_tokens,
                    Tensor scores, Tensor softmax_sums, OptionalTensor index_table) {
  const ScoreClustersParams params =
      check_score_clusters(query, kv_cache, index, block_table, seq_lens, min_sparse_lens, scale,
                           num_sink_tokens, scores, softmax_sums, index_table);
  CLUSTERKV_DISPATCH_KV_DTYPE(kv_cache.scalar_type(), "score_clusters",
                              score_clusters_kernel<scalar_t>(params));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(clusterkv, CPU, m) {
  m.impl("score_clusters", TORCH_BOX(&score_clusters));
}

}  // namespace clusterkv::cpu
