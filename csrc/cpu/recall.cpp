// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the vllm_clusterkv project
//
// One task recalls for one row and KV head: which lines it needs, which of them its hot
// blocks hold, and the others in place of those used least recently.
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <vector>

#include "../checks.h"
#include "cluster_tokens.h"
#include "dispatch.h"

namespace clusterkv::cpu {
namespace {

struct Scratch {
  std::vector<uint64_t> needed;  // [pages] a bit a line; found ones are cleared
  std::vector<int32_t> order, used;
};

// Marks the lines of selected clusters' rows in pages on the host.
void mark_lines(const RecallParams& p, int64_t req, int64_t head, int64_t num_pages,
                std::vector<uint64_t>& needed) {
  const SemanticPages& pages = p.pages;
  const uint8_t* selected = p.selected + (req * pages.num_kv_heads + head) * p.max_clusters;
  needed.assign(num_pages, 0);
  for (int64_t page = 0; page < num_pages; ++page) {
    if (p.rows.block_table[req * p.rows.block_table_stride + page] >= 0) continue;
    const int16_t* ends = ends_of_page(pages, p.rows, req, head, page);
    int64_t start = page == 0 ? p.num_sink_tokens : 0;
    for (int64_t c = 0; c < pages.num_clusters; ++c) {
      const int64_t end = std::clamp<int64_t>(ends[c], start, pages.block_size);
      if (selected[page * pages.num_clusters + c] && end > start) {
        for (int64_t line = start / kLineRows; line <= (end - 1) / kLineRows; ++line) {
          needed[page] |= uint64_t{1} << line;
        }
      }
      start = end;
    }
  }
}

// The weight of the selected clusters among all, of the query heads together.
double selected_mass(const RecallParams& p, int64_t req, int64_t head, int64_t num_pages) {
  const SemanticPages& pages = p.pages;
  const int64_t group = p.rows.num_heads / pages.num_kv_heads;
  const uint8_t* selected = p.selected + (req * pages.num_kv_heads + head) * p.max_clusters;
  double mass = 0;
  for (int64_t h = 0; h < group; ++h) {
    const float* scores = p.scores + (req * p.rows.num_heads + head * group + h) * p.max_clusters;
    double max = -INFINITY, all = 0, taken = 0;
    for (int64_t page = 0; page < num_pages; ++page) {
      const int16_t* ends = ends_of_page(pages, p.rows, req, head, page);
      int64_t start = page == 0 ? p.num_sink_tokens : 0;
      for (int64_t c = 0; c < pages.num_clusters; ++c) {
        const int64_t count = ends[c] - start, i = page * pages.num_clusters + c;
        start = ends[c];
        if (count <= 0) continue;
        const double higher = std::max<double>(max, scores[i]);
        const double scale = std::exp(max - higher);
        const double weight = count * std::exp(scores[i] - higher);
        all = all * scale + weight;
        taken = taken * scale + (selected[i] ? weight : 0);
        max = higher;
      }
    }
    mass += taken / all / group;
  }
  return mass;
}

template <typename T>
void recall_of_row(const RecallParams& p, int64_t req, int64_t head, Scratch& s) {
  const SemanticPages& pages = p.pages;
  const int64_t seq_len = p.rows.seq_lens[req], slot = p.row_slots[req];
  if (slot < 0 || is_dense(seq_len, p.rows.min_sparse_lens[req])) return;
  const auto started = std::chrono::steady_clock::now();
  const int64_t num_pages = num_indexed_pages(seq_len, pages.block_size);
  const int64_t lines_a_page = pages.block_size / kLineRows, num = p.num_positions;
  const int32_t* blocks = p.rows.block_table + req * p.rows.block_table_stride;
  const int32_t* hot_blocks = p.hot_blocks + slot * (num / lines_a_page);
  int32_t* lines = p.hot_lines + (slot * pages.num_kv_heads + head) * num;
  int32_t* order = p.hot_order + (slot * pages.num_kv_heads + head) * num;
  const auto entry_of = [&](int64_t line) -> int32_t& {  // of a line of the row
    const int64_t host_page = -1 - blocks[line / lines_a_page];
    return pages
        .line_table[(host_page * pages.num_kv_heads + head) * lines_a_page + line % lines_a_page];
  };
  mark_lines(p, req, head, num_pages, s.needed);

  // Stable: positions not used, as they were, then those used, as they were.
  s.order.clear();
  s.used.clear();
  for (int64_t i = 0; i < num; ++i) {
    const int32_t position = order[i], line = lines[position];
    uint64_t* needed = line >= 0 ? &s.needed[line / lines_a_page] : nullptr;
    const uint64_t bit = uint64_t{1} << (line >= 0 ? line % lines_a_page : 0);
    if (needed != nullptr && *needed & bit) {
      *needed &= ~bit;
      s.used.push_back(position);
    } else {
      s.order.push_back(position);
    }
  }
  int64_t victims = 0, left = 0;
  for (int64_t page = 0; page < num_pages; ++page) {
    for (uint64_t bits = s.needed[page]; bits != 0; bits &= bits - 1) {
      if (victims == static_cast<int64_t>(s.order.size())) {
        ++left;
        continue;
      }
      const int64_t in_page = __builtin_ctzll(bits);
      const int32_t position = s.order[victims++];
      if (lines[position] >= 0) entry_of(lines[position]) = -1;
      lines[position] = static_cast<int32_t>(page * lines_a_page + in_page);
      const int64_t block = hot_blocks[position / lines_a_page], at = position % lines_a_page;
      entry_of(lines[position]) = static_cast<int32_t>(block * lines_a_page + at);
      const T* source = static_cast<const T*>(pages.host_cache) +
                        (-1 - blocks[page]) * pages.host_page_stride +
                        head * pages.host_head_stride + in_page * kLineRows * pages.kv_row_stride;
      T* target = static_cast<T*>(pages.kv_cache) + block * pages.kv_block_stride +
                  head * pages.kv_head_stride + at * kLineRows * pages.kv_row_stride;
      for (int64_t row = 0; row < kLineRows; ++row) {
        std::copy_n(source + row * pages.kv_row_stride, 2 * pages.head_size,
                    target + row * pages.kv_row_stride);
      }
    }
  }
  int32_t* out = std::copy(s.order.begin() + victims, s.order.end(), order);
  out = std::copy(s.used.begin(), s.used.end(), out);
  std::copy(s.order.begin(), s.order.begin() + victims, out);
  int64_t counts[kNumCounters] = {static_cast<int64_t>(s.used.size()), victims, left, 1};
  counts[kNanoseconds] =
      std::chrono::nanoseconds(std::chrono::steady_clock::now() - started).count();
  if (seq_len % kMassEvery == 1 && num_pages > 0) {
    counts[kMass] = std::llround(kMassUnit * selected_mass(p, req, head, num_pages));
    counts[kMassSamples] = 1;
  }
  for (int i = 0; i < kNumCounters; ++i) {
    __atomic_fetch_add(&p.counters[i], counts[i], __ATOMIC_RELAXED);
  }
}

template <typename T>
void recall_kernel(const RecallParams& p) {
  const int64_t num_kv_heads = p.pages.num_kv_heads;
  torch::stable::parallel_for(
      0, p.rows.num_reqs * num_kv_heads, 1, [&](int64_t begin, int64_t end) {
        Scratch scratch;
        for (int64_t task = begin; task < end; ++task) {
          recall_of_row<T>(p, task / num_kv_heads, task % num_kv_heads, scratch);
        }
      });
}

void recall(Tensor selected, Tensor scores, Tensor kv_cache, Tensor index, Tensor block_table,
            Tensor seq_lens, Tensor min_sparse_lens, int64_t num_sink_tokens, Tensor index_table,
            Tensor host_cache, Tensor row_slots, Tensor hot_blocks, Tensor line_table,
            Tensor hot_lines, Tensor hot_order, Tensor counters) {
  const RecallParams params = check_recall(
      selected, scores, kv_cache, index, block_table, seq_lens, min_sparse_lens, num_sink_tokens,
      index_table, host_cache, row_slots, hot_blocks, line_table, hot_lines, hot_order, counters);
  CLUSTERKV_DISPATCH_KV_DTYPE(kv_cache.scalar_type(), "recall", recall_kernel<scalar_t>(params));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(clusterkv, CPU, m) { m.impl("recall", TORCH_BOX(&recall)); }

}  // namespace clusterkv::cpu
