// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the vllm_clusterkv project
//
// One task selects for one row and KV head. Softmax sums are merged from those that
// score_clusters leaves of parts. Clusters fall into buckets by the leading bits of their weight;
// buckets are taken whole from the top, and only the one in which the budget ends is sorted.
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <limits>
#include <vector>

#include "../checks.h"
#include "cluster_tokens.h"
#include "vec.h"

namespace clusterkv::cpu {
namespace {

constexpr int kBucketBits = 11;  // the exponent and three bits of the mantissa
constexpr int kBuckets = 1 << kBucketBits;
constexpr int64_t kGrain = 4096;  // scores: fewer are not worth waking a thread

struct Scratch {
  std::vector<int32_t> counts;   // [clusters] tokens of each cluster
  std::vector<float> weights;    // [clusters] summed weight a token
  std::vector<uint64_t> ranked;  // clusters of one bucket: weight bits, then ~cluster
  int32_t bucket_tokens[kBuckets];
};

// The bits of a non-negative float ascend with its value.
inline uint32_t rank_bits(float weight) {
  return __builtin_bit_cast(uint32_t, weight) & 0x7fffffffu;
}

inline uint32_t bucket_of(float weight) { return rank_bits(weight) >> (31 - kBucketBits); }

void count_tokens(const SelectClustersParams& p, int64_t req, int64_t head, int64_t num_pages,
                  int32_t* counts) {
  const int64_t num_clusters = p.pages.num_clusters;
  const auto ends_of = [&](int64_t page) { return ends_of_page(p.pages, p.rows, req, head, page); };
  constexpr int64_t kAhead = 16;
  for (int64_t page = 0; page < std::min(kAhead, num_pages); ++page) {
    prefetch(ends_of(page), num_clusters);
  }
  for (int64_t page = 0; page < num_pages; ++page) {
    if (page + kAhead < num_pages) prefetch(ends_of(page + kAhead), num_clusters);
    count_page_tokens(ends_of(page), num_clusters, page, p.num_sink_tokens,
                      counts + page * num_clusters);
  }
}

struct SoftmaxSums {
  float max;
  float sum;  // of tokens * exp(score - max)
};

// Those of a query head's clusters, from its parts': [num_parts, 2].
SoftmaxSums merge_parts(const float* sums, int64_t num_parts) {
  float max = -std::numeric_limits<float>::infinity(), sum = 0.0f;
#pragma omp simd reduction(max : max)
  for (int64_t part = 0; part < num_parts; ++part) max = std::max(max, sums[2 * part]);
#pragma omp simd reduction(+ : sum)
  for (int64_t part = 0; part < num_parts; ++part) {
    sum += sums[2 * part + 1] * fast_exp(sums[2 * part] - max);
  }
  return {max, sum};
}

// weight[c] = sum over the query heads of softmax(scores + log(count))[c] / count[c]
void weigh_clusters(const SelectClustersParams& p, int64_t first_head, int64_t group,
                    int64_t num_pages, Scratch& s) {
  const int64_t num_clusters = num_pages * p.pages.num_clusters;
  const int32_t* counts = s.counts.data();
  float* weights = s.weights.data();
  std::fill_n(weights, num_clusters, 0.0f);
  static_assert(16 % kLanes == 0, "a page's 16, 32 or 64 clusters are whole vectors");
  for (int64_t g = 0; g < group; ++g) {
    const float* row = p.scores + (first_head + g) * p.max_clusters;
    const SoftmaxSums sums = merge_parts(p.softmax_sums + (first_head + g) * p.num_parts * 2,
                                         std::min(p.num_parts, num_pages));
    const float max = sums.max, inverse = 1.0f / sums.sum;
    for (int64_t c = 0; c < num_clusters; c += kLanes) {
      const Vec weight = fast_exp(load<Vec>(row + c) - max) * inverse;
      const Vec sum = load<Vec>(weights + c) + (load<VecInts>(counts + c) > 0 ? weight : Vec{});
      std::memcpy(weights + c, &sum, sizeof(sum));
    }
  }
}

// Selects clusters from the top until they hold the budget; returns their tokens.
int64_t take_best(int64_t num_clusters, int64_t token_budget, Scratch& s, uint8_t* selected) {
  const int32_t* counts = s.counts.data();
  const float* weights = s.weights.data();
  std::fill_n(s.bucket_tokens, kBuckets, 0);
  for (int64_t c = 0; c < num_clusters; ++c) s.bucket_tokens[bucket_of(weights[c])] += counts[c];
  int64_t taken = 0;
  uint32_t last = kBuckets - 1;  // the bucket that reaches the budget
  while (last > 0 && taken + s.bucket_tokens[last] < token_budget) taken += s.bucket_tokens[last--];

#pragma omp simd
  for (int64_t c = 0; c < num_clusters; ++c) {
    selected[c] = bucket_of(weights[c]) > last && counts[c] > 0;
  }
  s.ranked.clear();
  for (int64_t c = 0; c < num_clusters; ++c) {
    if (bucket_of(weights[c]) != last || counts[c] == 0) continue;
    s.ranked.push_back(static_cast<uint64_t>(rank_bits(weights[c])) << 32 |
                       static_cast<uint32_t>(~c));
  }
  std::sort(s.ranked.rbegin(), s.ranked.rend());
  for (size_t i = 0; i < s.ranked.size() && taken < token_budget; ++i) {
    const int64_t cluster = ~static_cast<uint32_t>(s.ranked[i]);
    selected[cluster] = 1;
    taken += counts[cluster];
  }
  return taken;
}

void select_row(const SelectClustersParams& p, int64_t req, int64_t head, Scratch& s) {
  const SemanticPages& pages = p.pages;
  const DecodeRows& rows = p.rows;
  const int64_t seq_len = rows.seq_lens[req];
  const int64_t num_pages = num_indexed_pages(seq_len, pages.block_size);
  const int64_t num_clusters = num_pages * pages.num_clusters;
  uint8_t* selected = p.selected + (req * pages.num_kv_heads + head) * p.max_clusters;
  int32_t* num_attended = p.num_attended + req * pages.num_kv_heads + head;
  if (is_dense(seq_len, rows.min_sparse_lens[req])) {
    *num_attended = static_cast<int32_t>(seq_len);
    return;
  }
  const int64_t sinks = num_pages > 0 ? p.num_sink_tokens : 0;
  const int64_t clustered = num_pages * pages.block_size - sinks;
  const int64_t always = std::max<int64_t>(seq_len - clustered, 0);  // sinks and tail page

  if (clustered <= p.token_budget) {
    std::fill_n(selected, num_clusters, uint8_t{1});
    *num_attended = static_cast<int32_t>(always + clustered);
    return;
  }
  s.counts.resize(num_clusters);
  s.weights.resize(num_clusters);
  count_tokens(p, req, head, num_pages, s.counts.data());
  const int64_t group = rows.num_heads / pages.num_kv_heads;
  const int64_t first_head = req * rows.num_heads + head * group;
  weigh_clusters(p, first_head, group, num_pages, s);
  const int64_t taken = take_best(num_clusters, p.token_budget, s, selected);
  *num_attended = static_cast<int32_t>(always + taken);
}

void select_clusters(Tensor scores, Tensor softmax_sums, Tensor kv_cache, Tensor index,
                     Tensor block_table, Tensor seq_lens, Tensor min_sparse_lens,
                     int64_t num_sink_tokens, int64_t token_budget, Tensor selected,
                     Tensor num_attended, OptionalTensor index_table) {
  const SelectClustersParams params = check_select_clusters(
      scores, softmax_sums, kv_cache, index, block_table, seq_lens, min_sparse_lens,
      num_sink_tokens, token_budget, selected, num_attended, index_table);
  const int64_t num_kv_heads = params.pages.num_kv_heads;
  const int64_t num_tasks = params.rows.num_reqs * num_kv_heads;
  const int64_t task_scores = params.rows.num_heads / num_kv_heads * params.max_clusters;
  const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(task_scores, 1));
  torch::stable::parallel_for(0, num_tasks, grain, [&](int64_t begin, int64_t end) {
    Scratch scratch;
    for (int64_t task = begin; task < end; ++task) {
      select_row(params, task / num_kv_heads, task % num_kv_heads, scratch);
    }
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(clusterkv, CPU, m) {
  m.impl("select_clusters", TORCH_BOX(&select_clusters));
}

}  // namespace clusterkv::cpu
