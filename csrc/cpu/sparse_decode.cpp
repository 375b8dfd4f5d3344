// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the vllm_clusterkv project
//
// Split-KV decode attention. One task attends the query heads of one KV head to a
// contiguous range of pages; the splits are merged by log-sum-exp. A task first lists
// its rows and then takes them tile by tile, asking for the next tile while it works
// on one: selected clusters lie scattered, and no processor guesses where. Splits
// depend on the row alone, so results do not depend on the batch or the threads.
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "../checks.h"
#include "cluster_tokens.h"
#include "dispatch.h"

namespace clusterkv::cpu {
namespace {

constexpr int64_t kTileRows = 32;  // two tiles of K and V fit L1 at head size 128
constexpr float kNegInf = -std::numeric_limits<float>::infinity();

// The rows that one task attends to. Listing a row of the first tile asks for it.
template <typename T>
class RowList {
 public:
  RowList(int64_t head_size, int64_t max_tokens, int64_t max_means)
      : head_size_(head_size),
        tokens_(max_tokens + kTileRows),
        means_(max_means + kTileRows),
        clusters_(max_means),
        log_counts_(max_means) {}

  void clear() { num_tokens_ = num_means_ = 0; }

  void add_tokens(const T* first_row, int64_t num_rows, int64_t row_stride) {
    for (int64_t i = 0; i < num_rows; ++i) tokens_[num_tokens_ + i] = first_row + i * row_stride;
    for (int64_t i = 0; i < std::min(num_rows, kTileRows - num_tokens_); ++i) {
      prefetch(tokens_[num_tokens_ + i], 2 * head_size_);
    }
    num_tokens_ += num_rows;
  }

  void add_mean(const T* value, int64_t cluster, float log_count) {
    if (num_means_ < kTileRows) prefetch(value, head_size_);
    means_[num_means_] = value;
    clusters_[num_means_] = static_cast<int32_t>(cluster);
    log_counts_[num_means_] = log_count;
    ++num_means_;
  }

  // Repeats the last rows, so that a tile can look ahead from any of its rows.
  void pad() {
    if (num_tokens_ > 0) std::fill_n(&tokens_[num_tokens_], kTileRows, tokens_[num_tokens_ - 1]);
    if (num_means_ > 0) std::fill_n(&means_[num_means_], kTileRows, means_[num_means_ - 1]);
  }

  int64_t num_tokens() const { return num_tokens_; }
  int64_t num_means() const { return num_means_; }
  const T* const* tokens() const { return tokens_.data(); }       // rows K|V
  const T* const* means() const { return means_.data(); }         // mean V
  const int32_t* clusters() const { return clusters_.data(); }    // of each mean
  const float* log_counts() const { return log_counts_.data(); }  // of each mean

 private:
  const int64_t head_size_;
  std::vector<const T*> tokens_, means_;
  std::vector<int32_t> clusters_;
  std::vector<float> log_counts_;
  int64_t num_tokens_ = 0, num_means_ = 0;
};

// Online softmax of one query group over the tiles of a split.
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
    estimates_ = p.estimates + (req * p.rows.num_heads + first_head) * p.max_clusters;
    estimate_stride_ = p.max_clusters;
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
  }

  void attend(RowList<T>& list) {
    list.pad();
    for (int64_t row = 0; row < list.num_tokens(); row += kTileRows) {
      attend_tokens(list.tokens() + row, list.num_tokens() - row);
    }
    for (int64_t row = 0; row < list.num_means(); row += kTileRows) {
      attend_means(list, row);
    }
  }

  // Writes output (unnormalised), max and sum of each head: [head_size + 2] each.
  void store(float* partial, int64_t head_stride) const {
    for (int64_t g = 0; g < group_; ++g) {
      float* head = partial + g * head_stride;
      std::copy_n(output_.data() + g * head_size_, head_size_, head);
      head[head_size_] = max_[g];
      head[head_size_ + 1] = sum_[g];
    }
  }

 private:
  // The next tile of `num_left` tokens.
  void attend_tokens(const T* const* rows, int64_t num_left) {
    const int64_t num_rows = std::min(kTileRows, num_left);
    for (int64_t row = 0; row < num_rows; row += kDotRows) {
      const int64_t ahead = std::min(kTileRows, num_left - row);
      for_head_blocks(group_, [&](auto heads, int64_t first) {
        dot_rows<decltype(heads)::value>(query_.data() + first * head_size_, rows + row, ahead,
                                         head_size_, logits_.data() + first * kTileRows + row,
                                         kTileRows);
      });
    }
    attend_tile(rows, head_size_, num_rows, std::min(kTileRows, num_left));
  }

  // The tile of means that begins at row `begin`.
  void attend_means(const RowList<T>& list, int64_t begin) {
    const int64_t num_left = list.num_means() - begin, num_rows = std::min(kTileRows, num_left);
    const int32_t* clusters = list.clusters() + begin;
    const float* log_counts = list.log_counts() + begin;
    for (int64_t g = 0; g < group_; ++g) {
      const float* estimates = estimates_ + g * estimate_stride_;
      float* logits = logits_.data() + g * kTileRows;
#pragma omp simd
      for (int64_t i = 0; i < num_rows; ++i) logits[i] = estimates[clusters[i]] + log_counts[i];
    }
    attend_tile(list.means() + begin, 0, num_rows, std::min(kTileRows, num_left));
  }

  // Adds the values, `value_offset` into each row, of rows whose logits are set.
  void attend_tile(const T* const* rows, int64_t value_offset, int64_t num_rows, int64_t ahead) {
    const int64_t padded = (num_rows + kLanes - 1) / kLanes * kLanes;
    for (int64_t g = 0; g < group_; ++g) {
      std::fill_n(logits_.data() + g * kTileRows + num_rows, padded - num_rows, kNegInf);
    }
    for_head_blocks(group_, [&](auto heads, int64_t first) {
      constexpr int kHeads = decltype(heads)::value;
      weigh_tile<kHeads>(first, padded);
      add_weighted_rows<kHeads>(logits_.data() + first * kTileRows, kTileRows, rows, num_rows,
                                ahead, value_offset, head_size_,
                                output_.data() + first * head_size_);
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
  const float* estimates_ = nullptr;
  int64_t estimate_stride_ = 0;
};

// Indexed pages and the tail page; a padding row has none.
int64_t num_row_pages(const SparseDecodeParams& p, int64_t req) {
  const int64_t seq_len = p.rows.seq_lens[req];
  if (seq_len <= 0) return 0;
  return std::min(num_indexed_pages(seq_len, p.pages.block_size) + 1, p.rows.max_blocks);
}

// Rows of a host page, from kv_cache where a line of them is there.
template <typename T>
void list_host_rows(const SemanticPages& pages, int64_t host_page, int64_t head, const T* rows,
                    int64_t start, int64_t end, RowList<T>& list) {
  const int64_t lines_a_page = pages.block_size / kLineRows;
  const int32_t* lines = pages.line_table + (host_page * pages.num_kv_heads + head) * lines_a_page;
  for (int64_t row = start; row < end;) {
    const int64_t line = row / kLineRows, next = std::min(end, (line + 1) * kLineRows);
    const int64_t found = lines[line];
    const T* of_line = found < 0 ? rows + line * kLineRows * pages.kv_row_stride
                                 : static_cast<const T*>(pages.kv_cache) +
                                       found / lines_a_page * pages.kv_block_stride +
                                       head * pages.kv_head_stride +
                                       found % lines_a_page * kLineRows * pages.kv_row_stride;
    list.add_tokens(of_line + row % kLineRows * pages.kv_row_stride, next - row,
                    pages.kv_row_stride);
    row = next;
  }
}

template <typename T>
void list_rows(const SparseDecodeParams& p, int64_t req, int64_t head, int64_t first_page,
               int64_t last_page, RowList<T>& list) {
  const SemanticPages& pages = p.pages;
  const int64_t seq_len = p.rows.seq_lens[req], row_stride = pages.kv_row_stride;
  const int64_t num_indexed = num_indexed_pages(seq_len, pages.block_size);
  const bool dense = is_dense(seq_len, p.rows.min_sparse_lens[req]);
  const uint8_t* selected = p.selected + (req * pages.num_kv_heads + head) * p.max_clusters;
  list.clear();
  for (int64_t page = first_page; page < last_page; ++page) {
    const int64_t block = p.rows.block_table[req * p.rows.block_table_stride + page];
    const T* rows = block >= 0
                        ? static_cast<const T*>(pages.kv_cache) + block * pages.kv_block_stride +
                              head * pages.kv_head_stride
                        : static_cast<const T*>(pages.host_cache) +
                              (-1 - block) * pages.host_page_stride + head * pages.host_head_stride;
    if (dense || page == num_indexed) {  // the tail page has no index
      const int64_t num_left = seq_len - page * pages.block_size;
      list.add_tokens(rows, std::min(num_left, pages.block_size), row_stride);
      continue;
    }
    const int16_t* ends = ends_of_page(pages, p.rows, req, head, page);
    const int64_t place = p.rows.index_table[req * p.rows.index_table_stride + page];
    const T* mean_values = static_cast<const T*>(pages.centroids) +
                           place * pages.centroid_block_stride + head * pages.centroid_head_stride +
                           pages.centroid_value_offset;
    int64_t start = page == 0 ? p.num_sink_tokens : 0;
    list.add_tokens(rows, start, row_stride);
    for (int64_t c = 0; c < pages.num_clusters; ++c) {
      const int64_t cluster = page * pages.num_clusters + c;
      const int64_t end = std::clamp<int64_t>(ends[c], start, pages.block_size);  // stays in list
      if (selected[cluster] && block < 0 && pages.line_table != nullptr) {
        list_host_rows(pages, -1 - block, head, rows, start, end, list);
      } else if (selected[cluster]) {
        list.add_tokens(rows + start * row_stride, end - start, row_stride);
      } else if (p.tail_estimate && end > start) {
        list.add_mean(mean_values + c * pages.centroid_row_stride, cluster, log_count(end - start));
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
  const int64_t max_pages = (p.rows.max_blocks + p.num_splits - 1) / p.num_splits;
  torch::stable::parallel_for(0, num_tasks, 1, [&](int64_t begin, int64_t end) {
    GroupAttention<T> attention(group, head_size);
    RowList<T> list(head_size, max_pages * p.pages.block_size, max_pages * p.pages.num_clusters);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t split = task % p.num_splits, head = task / p.num_splits % num_kv_heads;
      const int64_t req = task / p.num_splits / num_kv_heads;
      const int64_t pages_per_split = (num_row_pages(p, req) + p.num_splits - 1) / p.num_splits;
      const int64_t first_page = split * pages_per_split;
      list_rows(p, req, head, first_page,
                std::min(first_page + pages_per_split, num_row_pages(p, req)), list);
      attention.reset(p, req, head * group);
      attention.attend(list);
      const int64_t first_head = req * p.rows.num_heads + head * group;
      attention.store(p.workspace + (first_head * p.num_splits + split) * (head_size + 2),
                      p.num_splits * (head_size + 2));
    }
  });
  torch::stable::parallel_for(
      0, p.rows.num_reqs * p.rows.num_heads, 64, [&](int64_t begin, int64_t end) {
        std::vector<float> merged(head_size);
        for (int64_t task = begin; task < end; ++task) {
          merge_splits<T>(p, task / p.rows.num_heads, task % p.rows.num_heads, merged);
        }
      });
}

void sparse_decode(Tensor query, Tensor kv_cache, Tensor centroids, Tensor spreads,
                   Tensor cluster_ends, Tensor block_table, Tensor seq_lens, Tensor min_sparse_lens,
                   Tensor estimates, Tensor selected, double scale, int64_t num_sink_tokens,
                   bool tail_estimate, Tensor workspace, Tensor output, OptionalTensor index_table,
                   OptionalTensor host_cache, OptionalTensor line_table) {
  const SparseDecodeParams params =
      check_sparse_decode(query, kv_cache, centroids, spreads, cluster_ends, block_table, seq_lens,
                          min_sparse_lens, estimates, selected, scale, num_sink_tokens,
                          tail_estimate, workspace, output, index_table, host_cache, line_table);
  CLUSTERKV_DISPATCH_KV_DTYPE(kv_cache.scalar_type(), "sparse_decode",
                              sparse_decode_kernel<scalar_t>(params));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(clusterkv, CPU, m) { m.impl("sparse_decode", TORCH_BOX(&sparse_decode)); }

}  // namespace clusterkv::cpu
