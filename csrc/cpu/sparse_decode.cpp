// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the vllm_clusterkv project
//
// Split-KV decode attention. One task attends the query heads of one KV head to a
// contiguous range of pages; the splits are merged by log-sum-exp. Each row of K
// and V is widened once and shared by the group. Splits depend on the row alone,
// so results do not depend on the batch or the number of threads.
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "../checks.h"
#include "dispatch.h"

namespace clusterkv::cpu {
namespace {

constexpr int kTileRows = 64;
constexpr float kNegInf = -std::numeric_limits<float>::infinity();

// A row to attend to: a token (`key` set) or a cluster left out (`cluster` scored).
template <typename T>
struct Entry {
  const T* key;
  const T* value;
  int64_t cluster;
  float log_count;
};

// Online softmax state of one query group over the tiles of a split.
template <typename T>
class GroupAttention {
 public:
  GroupAttention(int64_t group, int64_t head_size)
      : group_(group),
        head_size_(head_size),
        query_(group * head_size),
        row_(head_size),
        logits_(group * kTileRows),
        output_(group * head_size),
        max_(group),
        sum_(group) {}

  void reset(const SparseDecodeParams& p, int64_t req, int64_t first_head) {
    scores_ = p.scores + (req * p.rows.num_heads + first_head) * p.max_clusters;
    score_stride_ = p.max_clusters;
    for (int64_t g = 0; g < group_; ++g) {
      float* q = query_.data() + g * head_size_;
      load_row(static_cast<const T*>(p.query) + req * p.query_row_stride +
                   (first_head + g) * p.query_head_stride,
               q, head_size_);
      for (int64_t d = 0; d < head_size_; ++d) q[d] *= p.scale;
    }
    std::fill(output_.begin(), output_.end(), 0.0f);
    std::fill(max_.begin(), max_.end(), kNegInf);
    std::fill(sum_.begin(), sum_.end(), 0.0f);
    num_entries_ = 0;
  }

  void add(const Entry<T>& entry) {
    entries_[num_entries_++] = entry;
    if (num_entries_ == kTileRows) flush();
  }

  // Writes output (unnormalised), max and sum of each head: [head_size + 2] each.
  void finish(float* partial, int64_t head_stride) {
    flush();
    for (int64_t g = 0; g < group_; ++g) {
      float* head = partial + g * head_stride;
      std::copy_n(output_.data() + g * head_size_, head_size_, head);
      head[head_size_] = max_[g];
      head[head_size_ + 1] = sum_[g];
    }
  }

 private:
  void flush() {
    if (num_entries_ == 0) return;
    for (int j = 0; j < num_entries_; ++j) {
      const Entry<T>& entry = entries_[j];
      if (entry.key != nullptr) {
        load_row(entry.key, row_.data(), head_size_);
        for (int64_t g = 0; g < group_; ++g) {
          logits_[g * kTileRows + j] = dot(query_.data() + g * head_size_, row_.data(), head_size_);
        }
      } else {
        for (int64_t g = 0; g < group_; ++g) {
          logits_[g * kTileRows + j] = scores_[g * score_stride_ + entry.cluster] + entry.log_count;
        }
      }
    }
    for (int64_t g = 0; g < group_; ++g) softmax_tile(g);
    for (int j = 0; j < num_entries_; ++j) {
      load_row(entries_[j].value, row_.data(), head_size_);
      for (int64_t g = 0; g < group_; ++g) {
        const float weight = logits_[g * kTileRows + j];
        float* __restrict output = output_.data() + g * head_size_;
        const float* __restrict value = row_.data();
#pragma omp simd
        for (int64_t d = 0; d < head_size_; ++d) output[d] += weight * value[d];
      }
    }
    num_entries_ = 0;
  }

  // Turns a head's logits into weights relative to its running maximum.
  void softmax_tile(int64_t g) {
    float* logits = logits_.data() + g * kTileRows;
    float max = max_[g];
    for (int j = 0; j < num_entries_; ++j) max = std::max(max, logits[j]);
    if (max > max_[g]) {
      const float correction = fast_exp(max_[g] - max);
      float* output = output_.data() + g * head_size_;
      for (int64_t d = 0; d < head_size_; ++d) output[d] *= correction;
      sum_[g] *= correction;
      max_[g] = max;
    }
    float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
    for (int j = 0; j < num_entries_; ++j) {
      logits[j] = fast_exp(logits[j] - max);
      sum += logits[j];
    }
    sum_[g] += sum;
  }

  const int64_t group_, head_size_;
  std::vector<float> query_;   // [group, head_size], scaled
  std::vector<float> row_;     // [head_size]
  std::vector<float> logits_;  // [group, kTileRows]
  std::vector<float> output_;  // [group, head_size]
  std::vector<float> max_, sum_;
  Entry<T> entries_[kTileRows];
  int num_entries_ = 0;
  const float* scores_ = nullptr;
  int64_t score_stride_ = 0;
};

template <typename T>
void attend_rows(const SparseDecodeParams& p, const T* page_rows, int64_t begin, int64_t end,
                 GroupAttention<T>& attention) {
  for (int64_t row = begin; row < end; ++row) {
    const T* key = page_rows + row * p.pages.kv_row_stride;
    attention.add({key, key + p.pages.head_size, 0, 0.0f});
  }
}

template <typename T>
void attend_split(const SparseDecodeParams& p, int64_t req, int64_t head, int64_t split,
                  GroupAttention<T>& attention) {
  const SemanticPages& pages = p.pages;
  const int64_t seq_len = p.rows.seq_lens[req];
  const int64_t num_indexed = num_indexed_pages(seq_len, pages.block_size);
  const int64_t num_pages = seq_len > 0 ? num_indexed + 1 : 0;
  const int64_t pages_per_split = (num_pages + p.num_splits - 1) / p.num_splits;
  const int64_t first = split * pages_per_split;
  const int64_t last = std::min(first + pages_per_split, num_pages);
  const uint8_t* selected = p.selected + (req * pages.num_kv_heads + head) * p.max_clusters;
  for (int64_t page = first; page < last; ++page) {
    const int64_t block = p.rows.block_table[req * p.rows.block_table_stride + page];
    const T* rows = static_cast<const T*>(pages.kv_cache) + block * pages.kv_block_stride +
                    head * pages.kv_head_stride;
    if (page == num_indexed) {  // the tail page has no index
      attend_rows(p, rows, 0, seq_len - page * pages.block_size, attention);
      continue;
    }
    const int16_t* ends =
        pages.cluster_ends + block * pages.ends_block_stride + head * pages.ends_head_stride;
    const T* centroids = static_cast<const T*>(pages.centroids) +
                         block * pages.centroid_block_stride + head * pages.centroid_head_stride;
    int64_t start = page == 0 ? p.num_sink_tokens : 0;
    attend_rows(p, rows, 0, start, attention);
    for (int64_t c = 0; c < pages.num_clusters; ++c) {
      const int64_t cluster = page * pages.num_clusters + c, end = ends[c];
      if (selected[cluster]) {
        attend_rows(p, rows, start, end, attention);
      } else if (p.tail_estimate && end > start) {
        const T* mean = centroids + c * pages.centroid_row_stride;
        attention.add(
            {nullptr, mean + pages.head_size, cluster, std::log(static_cast<float>(end - start))});
      }
      start = end;
    }
  }
}

template <typename T>
void merge_splits(const SparseDecodeParams& p, int64_t req, int64_t head,
                  std::vector<float>& merged) {
  const int64_t head_size = p.pages.head_size;
  const float* partials =
      p.workspace + (req * p.rows.num_heads + head) * p.num_splits * (head_size + 2);
  float max = kNegInf;
  for (int64_t s = 0; s < p.num_splits; ++s) {
    max = std::max(max, partials[s * (head_size + 2) + head_size]);
  }
  std::fill(merged.begin(), merged.end(), 0.0f);
  float sum = 0.0f;
  for (int64_t s = 0; s < p.num_splits; ++s) {
    const float* partial = partials + s * (head_size + 2);
    if (partial[head_size + 1] == 0.0f) continue;  // an empty split; one of NaNs has sum NaN
    const float weight = fast_exp(partial[head_size] - max);
    sum += weight * partial[head_size + 1];
    for (int64_t d = 0; d < head_size; ++d) merged[d] += weight * partial[d];
  }
  const float inverse = p.rows.seq_lens[req] > 0 ? 1.0f / sum : 0.0f;
  for (int64_t d = 0; d < head_size; ++d) merged[d] *= inverse;
  store_row(merged.data(),
            static_cast<T*>(p.output) + req * p.output_row_stride + head * p.output_head_stride,
            head_size);
}

template <typename T>
void sparse_decode_kernel(const SparseDecodeParams& p) {
  const int64_t num_kv_heads = p.pages.num_kv_heads, head_size = p.pages.head_size;
  const int64_t group = p.rows.num_heads / num_kv_heads;
  const int64_t num_tasks = p.rows.num_reqs * num_kv_heads * p.num_splits;
  torch::stable::parallel_for(0, num_tasks, 1, [&](int64_t begin, int64_t end) {
    GroupAttention<T> attention(group, head_size);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t split = task % p.num_splits, head = task / p.num_splits % num_kv_heads;
      const int64_t req = task / p.num_splits / num_kv_heads;
      attention.reset(p, req, head * group);
      attend_split(p, req, head, split, attention);
      const int64_t first_head = req * p.rows.num_heads + head * group;
      attention.finish(p.workspace + (first_head * p.num_splits + split) * (head_size + 2),
                       p.num_splits * (head_size + 2));
    }
  });
  torch::stable::parallel_for(
      0, p.rows.num_reqs * p.rows.num_heads, 16, [&](int64_t begin, int64_t end) {
        std::vector<float> merged(head_size);
        for (int64_t task = begin; task < end; ++task) {
          merge_splits<T>(p, task / p.rows.num_heads, task % p.rows.num_heads, merged);
        }
      });
}

void sparse_decode(Tensor query, Tensor kv_cache, Tensor centroids, Tensor cluster_ends,
                   Tensor block_table, Tensor seq_lens, Tensor scores, Tensor selected,
                   double scale, int64_t num_sink_tokens, bool tail_estimate, Tensor workspace,
                   Tensor output) {
  const SparseDecodeParams params =
      check_sparse_decode(query, kv_cache, centroids, cluster_ends, block_table, seq_lens, scores,
                          selected, scale, num_sink_tokens, tail_estimate, workspace, output);
  CLUSTERKV_DISPATCH_KV_DTYPE(kv_cache.scalar_type(), "sparse_decode",
                              sparse_decode_kernel<scalar_t>(params));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(clusterkv, CPU, m) { m.impl("sparse_decode", TORCH_BOX(&sparse_decode)); }

}  // namespace clusterkv::cpu
