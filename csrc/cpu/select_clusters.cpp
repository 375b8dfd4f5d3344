// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the vllm_clusterkv project
//
// One task selects for one row and KV head. A heap yields clusters in rank order
// and stops at the budget, so only the selected ones are ever sorted.
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <limits>
#include <vector>

#include "../checks.h"
#include "vec.h"

namespace clusterkv::cpu {
namespace {

struct Scratch {
  std::vector<int32_t> counts;   // [clusters] tokens of each cluster
  std::vector<float> exps;       // [clusters]
  std::vector<float> weights;    // [clusters] summed weight a token
  std::vector<int32_t> by_rank;  // heap of non-empty clusters
};

// weight[c] = sum over the query heads of softmax(scores + log(count))[c] / count[c]
void weigh_clusters(const float* scores, int64_t score_stride, int64_t group, int64_t num_clusters,
                    Scratch& s) {
  s.weights.assign(num_clusters, 0.0f);
  s.exps.resize(num_clusters);
  for (int64_t g = 0; g < group; ++g) {
    const float* row = scores + g * score_stride;
    float max = -std::numeric_limits<float>::infinity();
    for (int64_t c = 0; c < num_clusters; ++c) {
      if (s.counts[c] > 0) max = std::max(max, row[c]);
    }
    float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
    for (int64_t c = 0; c < num_clusters; ++c) {
      s.exps[c] = s.counts[c] > 0 ? fast_exp(row[c] - max) : 0.0f;
      sum += s.exps[c] * static_cast<float>(s.counts[c]);
    }
    const float inverse = 1.0f / sum;
    for (int64_t c = 0; c < num_clusters; ++c) s.weights[c] += s.exps[c] * inverse;
  }
}

void select_row(const SelectClustersParams& p, int64_t req, int64_t head, Scratch& s) {
  const SemanticPages& pages = p.pages;
  const DecodeRows& rows = p.rows;
  const int64_t seq_len = rows.seq_lens[req];
  const int64_t num_pages = num_indexed_pages(seq_len, pages.block_size);
  const int64_t num_clusters = num_pages * pages.num_clusters;
  uint8_t* selected = p.selected + (req * pages.num_kv_heads + head) * p.max_clusters;
  int32_t* num_attended = p.num_attended + req * pages.num_kv_heads + head;
  const int64_t sinks = num_pages > 0 ? p.num_sink_tokens : 0;
  const int64_t clustered = num_pages * pages.block_size - sinks;
  const int64_t always = std::max<int64_t>(seq_len - clustered, 0);  // sinks and tail page

  if (clustered <= p.token_budget) {
    std::fill_n(selected, num_clusters, uint8_t{1});
    *num_attended = static_cast<int32_t>(always + clustered);
    return;
  }
  std::fill_n(selected, num_clusters, uint8_t{0});
  s.counts.resize(num_clusters);
  s.by_rank.clear();
  for (int64_t page = 0; page < num_pages; ++page) {
    const int64_t block = rows.block_table[req * rows.block_table_stride + page];
    const int16_t* ends =
        pages.cluster_ends + block * pages.ends_block_stride + head * pages.ends_head_stride;
    int64_t start = page == 0 ? sinks : 0;
    for (int64_t c = 0; c < pages.num_clusters; ++c) {
      const int64_t cluster = page * pages.num_clusters + c;
      s.counts[cluster] = static_cast<int32_t>(ends[c] - start);
      if (ends[c] > start) s.by_rank.push_back(static_cast<int32_t>(cluster));
      start = ends[c];
    }
  }
  const int64_t group = rows.num_heads / pages.num_kv_heads;
  weigh_clusters(p.scores + (req * rows.num_heads + head * group) * p.max_clusters, p.max_clusters,
                 group, num_clusters, s);
  const auto ranks_below = [&](int32_t a, int32_t b) {
    return s.weights[a] < s.weights[b] || (s.weights[a] == s.weights[b] && a > b);
  };
  std::make_heap(s.by_rank.begin(), s.by_rank.end(), ranks_below);
  auto heap_end = s.by_rank.end();
  int64_t taken = 0;
  while (taken < p.token_budget && heap_end != s.by_rank.begin()) {
    std::pop_heap(s.by_rank.begin(), heap_end, ranks_below);
    const int32_t cluster = *--heap_end;
    selected[cluster] = 1;
    taken += s.counts[cluster];
  }
  *num_attended = static_cast<int32_t>(always + taken);
}

void select_clusters(Tensor scores, Tensor kv_cache, Tensor centroids, Tensor cluster_ends,
                     Tensor block_table, Tensor seq_lens, int64_t num_sink_tokens,
                     int64_t token_budget, Tensor selected, Tensor num_attended) {
  const SelectClustersParams params =
      check_select_clusters(scores, kv_cache, centroids, cluster_ends, block_table, seq_lens,
                            num_sink_tokens, token_budget, selected, num_attended);
  const int64_t num_kv_heads = params.pages.num_kv_heads;
  const int64_t num_tasks = params.rows.num_reqs * num_kv_heads;
  torch::stable::parallel_for(0, num_tasks, 1, [&](int64_t begin, int64_t end) {
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
