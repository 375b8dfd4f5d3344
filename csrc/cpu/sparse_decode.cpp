// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the vllm_clusterkv project
//
// Split-KV decode attention. One task attends the query heads of one KV head to a
// contiguous range of pages; the splits are merged by log-sum-exp. A task first lists
// its rows and then takes them tile by tile, asking for the next tile while it works
// on one: selected clusters lie scattered, and no processor guesses where. Then come
// the means, all of a page at once, those of selected clusters with a weight of zero.
// Splits depend on the row alone, so results do not depend on the batch or the threads.
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <vector>

#include "../checks.h"
#include "cluster_tokens.h"
#include "dispatch.h"
#include "short_means.h"

namespace clusterkv::cpu {
namespace {

constexpr int64_t kTileRows = 32;  // two tiles of K and V fit L1 at head size 128
constexpr int64_t kMostLogits = std::max(kTileRows, kMostClusters);
constexpr float kNegInf = -std::numeric_limits<float>::infinity();

// Tokens that each row of a tile stands for.
constexpr std::array<float, kTileRows> kOnes = [] {
  std::array<float, kTileRows> ones{};
  for (float& one : ones) one = 1.0f;
  return ones;
}();

// The rows that one task attends to. Listing a row of the first tile asks for it.
template <typename T>
class RowList {
 public:
  RowList(int64_t head_size, int64_t max_tokens)
      : head_size_(head_size), tokens_(max_tokens + kTileRows) {}

  void clear() { num_tokens_ = 0; }

  void add_tokens(const T* first_row, int64_t num_rows, int64_t row_stride) {
    for (int64_t i = 0; i < num_rows; ++i) tokens_[num_tokens_ + i] = first_row + i * row_stride;
    for (int64_t i = 0; i < std::min(num_rows, kTileRows - num_tokens_); ++i) {
      prefetch(tokens_[num_tokens_ + i], 2 * head_size_);
    }
    num_tokens_ += num_rows;
  }

  // Repeats the last row, so that a tile can look ahead from any of its rows.
  void pad() {
    if (num_tokens_ > 0) std::fill_n(&tokens_[num_tokens_], kTileRows, tokens_[num_tokens_ - 1]);
  }

  int64_t num_tokens() const { return num_tokens_; }
  const T* const* tokens() const { return tokens_.data(); }  // rows K|V

 private:
  const int64_t head_size_;
  std::vector<const T*> tokens_;
  int64_t num_tokens_ = 0;
};

// Online softmax of one query group over the tiles of a split.
template <typename T>
class GroupAttention {
 public:
  GroupAttention(int64_t group, int64_t head_size)
      : group_(group),
        head_size_(head_size),
        num_places_(num_value_places(head_size)),
        query_(group * head_size),
        logits_(group * kMostLogits),
        output_(group * head_size),
        of_means_(group * num_places_),
        max_(group),
        sum_(group) {}

  void reset(const SparseDecodeParams& p, int64_t req, int64_t first_head) {
    for (int64_t g = 0; g < group_; ++g) {
      float* q = query_.data() + g * head_size_;
      load_packed(static_cast<const T*>(p.query) + req * p.query_row_stride +
                      (first_head + g) * p.query_head_stride,
                  q, head_size_);
      for (int64_t d = 0; d < head_size_; ++d) q[d] *= p.scale;
    }
    std::fill(output_.begin(), output_.end(), 0.0f);
    std::fill(of_means_.begin(), of_means_.end(), 0.0f);
    std::fill(max_.begin(), max_.end(), kNegInf);
    std::fill(sum_.begin(), sum_.end(), 0.0f);
  }

  void attend(RowList<T>& list) {
    list.pad();
    for (int64_t row = 0; row < list.num_tokens(); row += kTileRows) {
      attend_tokens(list.tokens() + row, list.num_tokens() - row);
    }
  }

  // Attends to the mean values of a page's clusters.
  //   scores: [group, num_clusters], rows score_stride apart
  //   counts: [num_clusters] tokens that a mean stands for; of at least one cluster not 0
  //   steps: [num_clusters]
  //   codes: of the mean values; those at `next` are asked for
  void attend_means(const float* scores, int64_t score_stride, const float* counts,
                    const float* steps, int64_t num_clusters, const uint8_t* codes,
                    const uint8_t* next) {
    for (int64_t g = 0; g < group_; ++g) {
      for (int64_t c = 0; c < num_clusters; c += kLanes) {
        const Vec score = load<Vec>(scores + g * score_stride + c), lowest = Vec{} + kNegInf;
        const Vec logit = load<Vec>(counts + c) > 0.0f ? score : lowest;
        std::memcpy(logits_.data() + g * kMostLogits + c, &logit, sizeof(logit));
      }
    }
    for_head_blocks(group_, [&](auto heads, int64_t first) {
      constexpr int kHeads = decltype(heads)::value;
      weigh_tile<kHeads>(first, num_clusters, counts);
      for (int64_t h = 0; h < kHeads; ++h) {
        for (int64_t c = 0; c < num_clusters; c += kLanes) {
          float* weights = logits_.data() + (first + h) * kMostLogits + c;
          // A step that is not finite does not matter where the weight is zero.
          const Vec weight = load<Vec>(weights), factor = weight * load<Vec>(steps + c);
          const Vec finite = weight == 0.0f ? weight : factor;
          std::memcpy(weights, &finite, sizeof(finite));
        }
      }
      add_weighted_codes<kHeads>(logits_.data() + first * kMostLogits, kMostLogits, codes, next,
                                 num_clusters, head_size_, of_means_.data() + first * num_places_);
    });
  }

  // Writes output (unnormalised), max and sum of each head: [head_size + 2] each.
  void store(float* partial, int64_t head_stride) const {
    for (int64_t g = 0; g < group_; ++g) {
      float* head = partial + g * head_stride;
      std::copy_n(output_.data() + g * head_size_, head_size_, head);
      for (int64_t d = 0; d < head_size_; ++d) {
        head[packed_place<T>(d, head_size_)] +=
            of_means_[g * num_places_ + value_place(head_size_, d)];
      }
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
                                         head_size_, logits_.data() + first * kMostLogits + row,
                                         kMostLogits);
      });
    }
    const int64_t padded = (num_rows + kLanes - 1) / kLanes * kLanes;
    for (int64_t g = 0; g < group_; ++g) {
      std::fill_n(logits_.data() + g * kMostLogits + num_rows, padded - num_rows, kNegInf);
    }
    for_head_blocks(group_, [&](auto heads, int64_t first) {
      constexpr int kHeads = decltype(heads)::value;
      weigh_tile<kHeads>(first, padded, kOnes.data());
      add_weighted_rows<kHeads>(logits_.data() + first * kMostLogits, kMostLogits, rows, num_rows,
                                std::min(kTileRows, num_left), head_size_, head_size_,
                                output_.data() + first * head_size_);
    });
  }

  // Turns logits into weights relative to the running maximum of their head, each of so many
  // tokens.
  template <int kHeads>
  void weigh_tile(int64_t first, int64_t num_logits, const float* counts) {
    Vec maxima[4] = {};
    for (int h = 0; h < kHeads; ++h) {
      const float* logits = logits_.data() + (first + h) * kMostLogits;
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
        float* of_means = of_means_.data() + (first + h) * num_places_;
        for (int64_t i = 0; i < num_places_; ++i) of_means[i] *= correction;
        sum_[first + h] *= correction;
        max = tile_max[h];
      }
    }
    Vec sums[4] = {};
    for (int h = 0; h < kHeads; ++h) {
      float* logits = logits_.data() + (first + h) * kMostLogits;
      for (int64_t i = 0; i < num_logits; i += kLanes) {
        const Vec weight =
            load<Vec>(counts + i) * fast_exp(load<Vec>(logits + i) - max_[first + h]);
        std::memcpy(logits + i, &weight, sizeof(weight));
        sums[h] += weight;
      }
    }
    const Vec4 sum = sum_lanes(sums);
    for (int h = 0; h < kHeads; ++h) sum_[first + h] += sum[h];
  }

  const int64_t group_, head_size_, num_places_;
  std::vector<float> query_;     // [group, head_size], scaled, in packed order
  std::vector<float> logits_;    // [group, kMostLogits]
  std::vector<float> output_;    // [group, head_size], in packed order
  std::vector<float> of_means_;  // [group, num_places], in the order of the codes
  std::vector<float> max_, sum_;
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
    int64_t start = page == 0 ? p.num_sink_tokens : 0;
    list.add_tokens(rows, start, row_stride);
    for (int64_t c = 0; c < pages.num_clusters; ++c) {
      const int64_t cluster = page * pages.num_clusters + c;
      const int64_t end = std::clamp<int64_t>(ends[c], start, pages.block_size);  // stays in list
      if (selected[cluster] && block < 0 && pages.line_table != nullptr) {
        list_host_rows(pages, -1 - block, head, rows, start, end, list);
      } else if (selected[cluster]) {
        list.add_tokens(rows + start * row_stride, end - start, row_stride);
      }
      start = end;
    }
  }
}

// Attends to the means of clusters that are not selected.
template <typename T>
void attend_means_of_pages(const SparseDecodeParams& p, int64_t req, int64_t head,
                           int64_t first_page, int64_t last_page, GroupAttention<T>& attention) {
  const SemanticPages& pages = p.pages;
  const int64_t seq_len = p.rows.seq_lens[req], num_clusters = pages.num_clusters;
  if (!p.tail_estimate || is_dense(seq_len, p.rows.min_sparse_lens[req])) return;
  last_page = std::min(last_page, num_indexed_pages(seq_len, pages.block_size));
  const uint8_t* selected = p.selected + (req * pages.num_kv_heads + head) * p.max_clusters;
  const int64_t group = p.rows.num_heads / pages.num_kv_heads;
  const float* scores = p.scores + (req * p.rows.num_heads + head * group) * p.max_clusters;
  for (int64_t page = first_page; page < last_page; ++page) {
    const uint8_t* index = index_of_page(pages, p.rows, req, head, page);
    const int64_t next_page = std::min(page + 1, last_page - 1);
    const uint8_t* next = index_of_page(pages, p.rows, req, head, next_page);
    prefetch(next + pages.fields.cluster_ends, num_clusters * sizeof(int16_t));
    prefetch(next + pages.fields.value_steps, num_clusters * sizeof(T));
    float counts[kMostClusters], steps[kMostClusters];
    count_page_tokens(ends_of_page(pages, p.rows, req, head, page), num_clusters, page,
                      p.num_sink_tokens, counts);
    const int64_t first = page * num_clusters;
    bool any = false;
    for (int64_t c = 0; c < num_clusters; ++c) {
      counts[c] = selected[first + c] ? 0.0f : counts[c];
      any |= counts[c] > 0.0f;
    }
    if (!any) continue;
    load_row(reinterpret_cast<const T*>(index + pages.fields.value_steps), steps, num_clusters);
    attention.attend_means(scores + first, p.max_clusters, counts, steps, num_clusters,
                           index + pages.fields.value_codes, next + pages.fields.value_codes);
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
    RowList<T> list(head_size, max_pages * p.pages.block_size);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t split = task % p.num_splits, head = task / p.num_splits % num_kv_heads;
      const int64_t req = task / p.num_splits / num_kv_heads;
      const int64_t pages_per_split = (num_row_pages(p, req) + p.num_splits - 1) / p.num_splits;
      const int64_t first_page = split * pages_per_split;
      const int64_t last_page = std::min(first_page + pages_per_split, num_row_pages(p, req));
      list_rows(p, req, head, first_page, last_page, list);
      attention.reset(p, req, head * group);
      attention.attend(list);
      attend_means_of_pages(p, req, head, first_page, last_page, attention);
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

void sparse_decode(Tensor query, Tensor kv_cache, Tensor index, Tensor block_table, Tensor seq_lens,
                   Tensor min_sparse_lens, Tensor scores, Tensor selected, double scale,
                   int64_t num_sink_tokens, bool tail_estimate, Tensor workspace, Tensor output,
                   OptionalTensor index_table, OptionalTensor host_cache,
                   OptionalTensor line_table) {
  const SparseDecodeParams params = check_sparse_decode(
      query, kv_cache, index, block_table, seq_lens, min_sparse_lens, scores, selected, scale,
      num_sink_tokens, tail_estimate, workspace, output, index_table, host_cache, line_table);
  CLUSTERKV_DISPATCH_KV_DTYPE(kv_cache.scalar_type(), "sparse_decode",
                              sparse_decode_kernel<scalar_t>(params));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(clusterkv, CPU, m) { m.impl("sparse_decode", TORCH_BOX(&sparse_decode)); }

}  // namespace clusterkv::cpu
