// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the vllm_clusterkv project
//
// Split-KV decode attention. One task attends the query heads of one KV head to a
// contiguous range of pages; the splits are merged by log-sum-exp. Each row of K
// and V is widened once and shared by the group. Splits depend on the row alone,
// so results do not depend on the batch or the number of threads.
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <vector>

#include "../checks.h"
#include "dispatch.h"

namespace clusterkv::cpu {
namespace {

constexpr int64_t kTileRows = 32;
constexpr int64_t kPrefetchRows = 16;
constexpr float kNegInf = -std::numeric_limits<float>::infinity();

// log(count) of every cluster size that a page can have.
const float* log_counts() {
  static const std::array<float, 257> table = [] {
    std::array<float, 257> logs{};
    for (int i = 0; i < 257; ++i) logs[i] = std::log(static_cast<float>(i));
    return logs;
  }();
  return table.data();
}

// One query group's attention to the rows of a split: first gathered, then attended
// to in tiles with an online softmax.
template <typename T>
class GroupAttention {
 public:
  GroupAttention(int64_t group, int64_t head_size)
      : group_(group),
        head_size_(head_size),
        query_(group * head_size),
        logits_(group * kTileRows),
        output_(group * head_size),
        max_(group),
        sum_(group) {}

  void reset(const SparseDecodeParams& p, int64_t req, int64_t first_head) {
    scores_ = p.scores + (req * p.rows.num_heads + first_head) * p.max_clusters;
    score_stride_ = p.max_clusters;
    for (int64_t g = 0; g < group_; ++g) {
      float* q = query_.data() + g * head_size_;
      load_packed(static_cast<const T*>(p.query) + req * p.query_row_stride +
                      (first_head + g) * p.query_head_stride,
                  q, head_size_);
      for (int64_t d = 0; d < head_size_; ++d) q[d] *= p.scale;
    }
    std::fill(output_.begin(), output_.end(), 0.0f);
    std::fill(max_.begin(), max_.end(), kNegInf);
    std::fill(sum_.begin(), sum_.end(), 0.0f);
    tokens_.clear();
    means_.clear();
    clusters_.clear();
    log_counts_.clear();
  }

  // Tokens: K|V rows.
  void add_tokens(const T* first_row, int64_t num_rows, int64_t row_stride) {
    const size_t size = tokens_.size();
    tokens_.resize(size + num_rows);
    for (int64_t i = 0; i < num_rows; ++i) tokens_[size + i] = first_row + i * row_stride;
  }

  // A cluster left out, by its row of means.
  void add_mean(const T* row, int64_t cluster, float log_count) {
    prefetch(row + head_size_, head_size_);
    means_.push_back(row);
    clusters_.push_back(static_cast<int32_t>(cluster));
    log_counts_.push_back(log_count);
  }

  // Writes output (unnormalised), max and sum of each head: [head_size + 2] each.
  void finish(float* partial, int64_t head_stride) {
    attend_tokens();
    attend_means();
    for (int64_t g = 0; g < group_; ++g) {
      float* head = partial + g * head_stride;
      std::copy_n(output_.data() + g * head_size_, head_size_, head);
      head[head_size_] = max_[g];
      head[head_size_ + 1] = sum_[g];
    }
  }

 private:
  void attend_tokens() {
    const int64_t num_tokens = tokens_.size();
    if (num_tokens == 0) return;
    tokens_.insert(tokens_.end(), kTileRows, tokens_.back());
    for (int64_t i = 0; i < std::min(num_tokens, kTileRows); ++i) {
      prefetch(tokens_[i], 2 * head_size_);
    }
    for (int64_t begin = 0; begin < num_tokens; begin += kTileRows) {
      const int64_t num_rows = std::min(kTileRows, num_tokens - begin);
      for (int64_t row = 0; row < num_rows; row += kDotRows) {
        const T* const* rows = tokens_.data() + begin + row;
        const int64_t ahead = std::min(kTileRows, num_tokens - begin - row);
        for_head_blocks(group_, [&](auto heads, int64_t first) {
          dot_rows<decltype(heads)::value>(query_.data() + first * head_size_, rows, ahead,
                                           head_size_, logits_.data() + first * kTileRows + row,
                                           kTileRows);
        });
      }
      attend_tile(tokens_.data() + begin, num_rows, std::min(kTileRows, num_tokens - begin));
    }
  }

  void attend_means() {
    const int64_t num_means = means_.size();
    if (num_means == 0) return;
    means_.insert(means_.end(), kTileRows, means_.back());
    for (int64_t begin = 0; begin < num_means; begin += kTileRows) {
      const int64_t num_rows = std::min(kTileRows, num_means - begin);
      for (int64_t g = 0; g < group_; ++g) {
        const float* scores = scores_ + g * score_stride_;
        for (int64_t i = 0; i < num_rows; ++i) {
          logits_[g * kTileRows + i] = scores[clusters_[begin + i]] + log_counts_[begin + i];
        }
      }
      attend_tile(means_.data() + begin, num_rows, num_rows);
    }
  }

  // Adds the values of rows whose logits are set.
  void attend_tile(const T* const* rows, int64_t num_rows, int64_t ahead) {
    const int64_t padded = (num_rows + kLanes - 1) / kLanes * kLanes;
    for (int64_t g = 0; g < group_; ++g) {
      std::fill_n(logits_.data() + g * kTileRows + num_rows, padded - num_rows, kNegInf);
    }
    for_head_blocks(group_, [&](auto heads, int64_t first) {
      constexpr int kHeads = decltype(heads)::value;
      weigh_tile<kHeads>(first, padded);
      add_weighted_rows<kHeads>(logits_.data() + first * kTileRows, kTileRows, rows, num_rows,
                                ahead, head_size_, head_size_, output_.data() + first * head_size_);
    });
  }

  // Turns logits into weights relative to the running maximum of their head.
  template <int kHeads>
  void weigh_tile(int64_t first, int64_t num_logits) {
    Vec maxima[4] = {};
    for (int h = 0; h < kHeads; ++h) {
      const float* logits = logits_.data() + (first + h) * kTileRows;
      maxima[h] = Vec{} + max_[first + h];
      for (int64_t i = 0; i < num_logits; i += kLanes) {
        const Vec x = load<Vec>(logits + i);
        maxima[h] = x > maxima[h] ? x : maxima[h];  // passes over a NaN; its weight is NaN
      }
    }
    const Vec4 tile_max = max_lanes(maxima);
    for (int h = 0; h < kHeads; ++h) {
      float& max = max_[first + h];
      if (tile_max[h] > max) {
        const float correction = fast_exp(max - tile_max[h]);
        float* output = output_.data() + (first + h) * head_size_;
        for (int64_t d = 0; d < head_size_; ++d) output[d] *= correction;
        sum_[first + h] *= correction;
        max = tile_max[h];
      }
    }
    Vec sums[4] = {};
    for (int h = 0; h < kHeads; ++h) {
      float* logits = logits_.data() + (first + h) * kTileRows;
      for (int64_t i = 0; i < num_logits; i += kLanes) {
        const Vec weight = fast_exp(load<Vec>(logits + i) - max_[first + h]);
        std::memcpy(logits + i, &weight, sizeof(weight));
        sums[h] += weight;
      }
    }
    const Vec4 sum = sum_lanes(sums);
    for (int h = 0; h < kHeads; ++h) sum_[first + h] += sum[h];
  }

  const int64_t group_, head_size_;
  std::vector<float> query_;   // [group, head_size], scaled, in packed order
  std::vector<float> logits_;  // [group, kTileRows]
  std::vector<float> output_;  // [group, head_size], in packed order
  std::vector<float> max_, sum_;
  std::vector<const T*> tokens_;   // rows of K|V
  std::vector<const T*> means_;    // rows of mean K | mean V
  std::vector<int32_t> clusters_;  // of each row of means
  std::vector<float> log_counts_;  // of each row of means
  const float* scores_ = nullptr;
  int64_t score_stride_ = 0;
};

template <typename T>
void attend_split(const SparseDecodeParams& p, int64_t req, int64_t head, int64_t split,
                  GroupAttention<T>& attention) {
  const SemanticPages& pages = p.pages;
  const float* log_count = log_counts();
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
      attention.add_tokens(rows, seq_len - page * pages.block_size, pages.kv_row_stride);
      continue;
    }
    const int16_t* ends =
        pages.cluster_ends + block * pages.ends_block_stride + head * pages.ends_head_stride;
    const T* centroids = static_cast<const T*>(pages.centroids) +
                         block * pages.centroid_block_stride + head * pages.centroid_head_stride;
    int64_t start = page == 0 ? p.num_sink_tokens : 0;
    attention.add_tokens(rows, start, pages.kv_row_stride);
    for (int64_t c = 0; c < pages.num_clusters; ++c) {
      const int64_t cluster = page * pages.num_clusters + c, end = ends[c];
      if (selected[cluster]) {
        attention.add_tokens(rows + start * pages.kv_row_stride, end - start, pages.kv_row_stride);
      } else if (p.tail_estimate && end > start) {
        attention.add_mean(centroids + c * pages.centroid_row_stride, cluster,
                           log_count[end - start]);
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
  store_packed(merged.data(),
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
