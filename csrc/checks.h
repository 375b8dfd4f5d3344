// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the vllm_clusterkv project
//
// Turns op arguments into params structs and checks every one of them. Used by
// the CPU and the CUDA launchers alike, so a CPU run shows what a CUDA user sees.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <initializer_list>
#include <optional>
#include <string>

#include "params.h"

namespace clusterkv {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline void check_dim(const Tensor& t, const char* name, int64_t dim) {
  STD_TORCH_CHECK(t.dim() == dim, name, " must have ", dim, " dimensions, got ", t.dim());
}

inline void check_size(const Tensor& t, const char* name, int64_t dim, int64_t expected,
                       const char* meaning) {
  STD_TORCH_CHECK(t.size(dim) == expected, name, ".size(", dim, ") must equal ", meaning, " (",
                  expected, "), got ", t.size(dim));
}

inline void check_dtype(const Tensor& t, const char* name, ScalarType dtype) {
  STD_TORCH_CHECK(t.scalar_type() == dtype, name, " must have dtype ",
                  torch::headeronly::toString(dtype), ", got ",
                  torch::headeronly::toString(t.scalar_type()));
}

inline void check_dense_rows(const Tensor& t, const char* name) {
  STD_TORCH_CHECK(t.size(t.dim() - 1) <= 1 || t.stride(t.dim() - 1) == 1, name,
                  " must be dense in its last dimension, got stride ", t.stride(t.dim() - 1));
}

inline void check_contiguous(const Tensor& t, const char* name) {
  STD_TORCH_CHECK(t.is_contiguous(), name, " must be contiguous");
}

struct NamedTensor {
  const char* name;
  const Tensor& tensor;
};

inline std::string device_name(const Tensor& t) {
  if (t.is_cpu()) return "cpu";
  return t.is_cuda() ? "cuda:" + std::to_string(t.get_device_index()) : "another kind of device";
}

// Every tensor of a call is on the device of kv_cache: a kernel follows their pointers.
inline void check_devices(const Tensor& kv_cache, std::initializer_list<NamedTensor> others) {
  const bool is_cuda = kv_cache.is_cuda();
  const auto index = kv_cache.get_device_index();
  for (const NamedTensor& other : others) {
    const Tensor& t = other.tensor;
    STD_TORCH_CHECK(t.is_cuda() == is_cuda && t.get_device_index() == index, other.name,
                    " must be on the device of kv_cache (", device_name(kv_cache), "), got ",
                    device_name(t));
  }
}

inline SemanticPages check_pages(const Tensor& kv_cache, const Tensor& index) {
  check_dim(kv_cache, "kv_cache", 4);
  check_dim(index, "index", 3);
  const ScalarType dtype = kv_cache.scalar_type();
  STD_TORCH_CHECK(
      dtype == ScalarType::BFloat16 || dtype == ScalarType::Half || dtype == ScalarType::Float,
      "kv_cache must have dtype BFloat16, Half or Float, got ", torch::headeronly::toString(dtype));
  check_dtype(index, "index", ScalarType::Byte);
  SemanticPages pages{};
  pages.num_blocks = kv_cache.size(0);
  pages.num_kv_heads = kv_cache.size(1);
  pages.block_size = kv_cache.size(2);
  const int64_t row_size = kv_cache.size(3);
  STD_TORCH_CHECK(pages.num_kv_heads > 0,
                  "kv_cache.size(1), the KV heads, must be at least 1, got ", pages.num_kv_heads);
  STD_TORCH_CHECK(row_size > 0 && row_size % 16 == 0 && row_size <= 512,
                  "kv_cache.size(3) must be 2 * head_size, which is a multiple of 8 and at most "
                  "256, got ",
                  row_size);
  STD_TORCH_CHECK(pages.block_size > 0 && pages.block_size <= 256,
                  "kv_cache.size(2), the page, must be 1 to 256 tokens, got ", pages.block_size);
  pages.head_size = row_size / 2;
  int64_t sizes[3];
  for (int i = 0; i < 3; ++i) {
    const int64_t num_clusters = int64_t{16} << i;
    const IndexFields fields =
        index_fields(pages.head_size, num_clusters, static_cast<int64_t>(kv_cache.element_size()));
    sizes[i] = fields.bytes;
    if (index.size(2) == fields.bytes) {
      pages.num_clusters = num_clusters;
      pages.fields = fields;
    }
  }
  STD_TORCH_CHECK(pages.num_clusters > 0, "index.size(2) must be ", sizes[0], ", ", sizes[1],
                  " or ", sizes[2], ", the bytes of 16, 32 or 64 clusters a page, got ",
                  index.size(2));
  check_size(index, "index", 0, pages.num_blocks, "num_blocks");
  check_size(index, "index", 1, pages.num_kv_heads, "num_kv_heads");
  check_dense_rows(kv_cache, "kv_cache");
  check_dense_rows(index, "index");
  pages.kv_cache = kv_cache.data_ptr();
  pages.index = static_cast<uint8_t*>(index.data_ptr());
  pages.kv_block_stride = kv_cache.stride(0);
  pages.kv_head_stride = kv_cache.stride(1);
  pages.kv_row_stride = kv_cache.stride(2);
  pages.index_block_stride = index.stride(0);
  pages.index_head_stride = index.stride(1);
  // Fields are read as numbers of up to 4 bytes.
  STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(pages.index) % 4 == 0 &&
                      pages.index_block_stride % 4 == 0 && pages.index_head_stride % 4 == 0,
                  "index must be at a multiple of 4 bytes, and its strides multiples of 4, got "
                  "strides ",
                  pages.index_block_stride, " and ", pages.index_head_stride);
  return pages;
}

// Where pages' indexes are, for the rows of a batch.
using OptionalTensor = std::optional<Tensor>;

inline void check_index_table(const Tensor& kv_cache, const OptionalTensor& index_table,
                              SemanticPages& pages, DecodeRows& rows) {
  if (!index_table.has_value()) return;
  const Tensor& t = *index_table;
  check_devices(kv_cache, {{"index_table", t}});
  check_dim(t, "index_table", 2);
  check_dtype(t, "index_table", ScalarType::Int);
  check_size(t, "index_table", 0, rows.num_reqs, "num_reqs");
  check_size(t, "index_table", 1, rows.max_blocks, "max_blocks");
  check_dense_rows(t, "index_table");
  rows.index_table = static_cast<const int32_t*>(t.data_ptr());
  rows.index_table_stride = t.stride(0);
  pages.index_block_stride = kIndexUnit;
}

inline void check_host_cache(const Tensor& kv_cache, const OptionalTensor& host_cache,
                             SemanticPages& pages) {
  if (!host_cache.has_value()) return;
  const Tensor& t = *host_cache;
  STD_TORCH_CHECK(t.is_cpu(), "host_cache must be on the CPU, got ", device_name(t));
  check_dim(t, "host_cache", 4);
  check_dtype(t, "host_cache", kv_cache.scalar_type());
  check_size(t, "host_cache", 1, pages.num_kv_heads, "num_kv_heads");
  check_size(t, "host_cache", 2, pages.block_size, "block_size");
  check_size(t, "host_cache", 3, 2 * pages.head_size, "2 * head_size");
  check_dense_rows(t, "host_cache");
  STD_TORCH_CHECK(t.stride(2) == pages.kv_row_stride,
                  "host_cache.stride(2) must equal kv_cache's (", pages.kv_row_stride, "), got ",
                  t.stride(2));
  pages.host_cache = t.data_ptr();
  pages.host_page_stride = t.stride(0);
  pages.host_head_stride = t.stride(1);
  pages.num_host_pages = t.size(0);
}

inline void check_line_table(const Tensor& kv_cache, const OptionalTensor& line_table,
                             SemanticPages& pages) {
  if (!line_table.has_value()) return;
  const Tensor& t = *line_table;
  check_devices(kv_cache, {{"line_table", t}});
  check_dim(t, "line_table", 3);
  check_dtype(t, "line_table", ScalarType::Int);
  check_size(t, "line_table", 0, pages.num_host_pages, "host_cache's pages");
  check_size(t, "line_table", 1, pages.num_kv_heads, "num_kv_heads");
  check_size(t, "line_table", 2, pages.block_size / kLineRows, "block_size / 8");
  check_contiguous(t, "line_table");
  pages.line_table = static_cast<int32_t*>(t.data_ptr());
}

inline DecodeRows check_rows(const SemanticPages& pages, const Tensor& block_table,
                             const Tensor& seq_lens, const Tensor& min_sparse_lens,
                             int64_t num_heads) {
  check_dim(block_table, "block_table", 2);
  check_dim(seq_lens, "seq_lens", 1);
  check_dim(min_sparse_lens, "min_sparse_lens", 1);
  check_dtype(block_table, "block_table", ScalarType::Int);
  check_dtype(seq_lens, "seq_lens", ScalarType::Int);
  check_dtype(min_sparse_lens, "min_sparse_lens", ScalarType::Int);
  check_size(block_table, "block_table", 0, seq_lens.size(0), "num_reqs");
  check_size(min_sparse_lens, "min_sparse_lens", 0, seq_lens.size(0), "num_reqs");
  check_dense_rows(block_table, "block_table");
  check_dense_rows(seq_lens, "seq_lens");
  check_dense_rows(min_sparse_lens, "min_sparse_lens");
  STD_TORCH_CHECK(num_heads > 0 && num_heads % pages.num_kv_heads == 0,
                  "the query's num_heads must be a multiple of num_kv_heads (", pages.num_kv_heads,
                  "), got ", num_heads);
  const auto* blocks = static_cast<const int32_t*>(block_table.data_ptr());
  return {blocks,
          blocks,
          static_cast<const int32_t*>(seq_lens.data_ptr()),
          static_cast<const int32_t*>(min_sparse_lens.data_ptr()),
          block_table.stride(0),
          block_table.stride(0),
          seq_lens.size(0),
          block_table.size(1),
          num_heads};
}

inline void check_query(const SemanticPages& pages, const Tensor& query, const Tensor& kv_cache,
                        const char* name) {
  check_dim(query, name, 3);
  check_dtype(query, name, kv_cache.scalar_type());
  check_size(query, name, 2, pages.head_size, "head_size");
  check_dense_rows(query, name);
}

inline void check_per_cluster(const Tensor& t, const char* name, ScalarType dtype,
                              const DecodeRows& rows, int64_t heads, int64_t num_clusters) {
  check_dim(t, name, 3);
  check_dtype(t, name, dtype);
  check_size(t, name, 0, rows.num_reqs, "num_reqs");
  check_size(t, name, 1, heads, "its number of heads");
  STD_TORCH_CHECK(t.size(2) == rows.max_blocks * num_clusters, name,
                  ".size(2) must equal max_blocks * num_clusters (", rows.max_blocks * num_clusters,
                  "), got ", t.size(2));
  check_contiguous(t, name);
}

inline void check_softmax_sums(const Tensor& t, const DecodeRows& rows) {
  check_dim(t, "softmax_sums", 4);
  check_dtype(t, "softmax_sums", ScalarType::Float);
  check_size(t, "softmax_sums", 0, rows.num_reqs, "num_reqs");
  check_size(t, "softmax_sums", 1, rows.num_heads, "num_heads");
  check_size(t, "softmax_sums", 3, 2, "max and sum");
  STD_TORCH_CHECK(t.size(2) >= 1, "softmax_sums.size(2), the parts, must be at least 1");
  check_contiguous(t, "softmax_sums");
}

inline void check_num_sink_tokens(const SemanticPages& pages, int64_t num_sink_tokens) {
  STD_TORCH_CHECK(num_sink_tokens >= 0 && num_sink_tokens < pages.block_size,
                  "num_sink_tokens must be 0 to block_size - 1 (", pages.block_size - 1, "), got ",
                  num_sink_tokens);
}

inline IndexPagesParams check_index_pages(const Tensor& kv_cache, const Tensor& index,
                                          const Tensor& block_ids, const Tensor& num_sink_tokens,
                                          int64_t num_iters) {
  IndexPagesParams params{};
  check_devices(kv_cache,
                {{"index", index}, {"block_ids", block_ids}, {"num_sink_tokens", num_sink_tokens}});
  params.pages = check_pages(kv_cache, index);
  check_dim(block_ids, "block_ids", 1);
  check_dim(num_sink_tokens, "num_sink_tokens", 1);
  check_dtype(block_ids, "block_ids", ScalarType::Int);
  check_dtype(num_sink_tokens, "num_sink_tokens", ScalarType::Int);
  check_size(num_sink_tokens, "num_sink_tokens", 0, block_ids.size(0), "block_ids.size(0)");
  check_contiguous(block_ids, "block_ids");
  check_contiguous(num_sink_tokens, "num_sink_tokens");
  STD_TORCH_CHECK(num_iters >= 1, "num_iters must be at least 1, got ", num_iters);
  params.block_ids = static_cast<const int32_t*>(block_ids.data_ptr());
  params.num_sink_tokens = static_cast<const int32_t*>(num_sink_tokens.data_ptr());
  params.num_pages = block_ids.size(0);
  params.num_iters = num_iters;
  return params;
}

inline ScoreClustersParams check_score_clusters(
    const Tensor& query, const Tensor& kv_cache, const Tensor& index, const Tensor& block_table,
    const Tensor& seq_lens, const Tensor& min_sparse_lens, double scale, int64_t num_sink_tokens,
    const Tensor& scores, const Tensor& softmax_sums, const OptionalTensor& index_table) {
  ScoreClustersParams params{};
  check_devices(kv_cache, {{"query", query},
                           {"index", index},
                           {"block_table", block_table},
                           {"seq_lens", seq_lens},
                           {"min_sparse_lens", min_sparse_lens},
                           {"scores", scores},
                           {"softmax_sums", softmax_sums}});
  params.pages = check_pages(kv_cache, index);
  check_query(params.pages, query, kv_cache, "query");
  params.rows = check_rows(params.pages, block_table, seq_lens, min_sparse_lens, query.size(1));
  check_index_table(kv_cache, index_table, params.pages, params.rows);
  check_size(query, "query", 0, params.rows.num_reqs, "num_reqs");
  check_per_cluster(scores, "scores", ScalarType::Float, params.rows, params.rows.num_heads,
                    params.pages.num_clusters);
  check_softmax_sums(softmax_sums, params.rows);
  check_num_sink_tokens(params.pages, num_sink_tokens);
  params.query = query.data_ptr();
  params.query_row_stride = query.stride(0);
  params.query_head_stride = query.stride(1);
  params.scale = static_cast<float>(scale);
  params.num_sink_tokens = num_sink_tokens;
  params.scores = static_cast<float*>(scores.data_ptr());
  params.softmax_sums = static_cast<float*>(softmax_sums.data_ptr());
  params.num_parts = softmax_sums.size(2);
  params.max_clusters = scores.size(2);
  return params;
}

inline SelectClustersParams check_select_clusters(
    const Tensor& scores, const Tensor& softmax_sums, const Tensor& kv_cache, const Tensor& index,
    const Tensor& block_table, const Tensor& seq_lens, const Tensor& min_sparse_lens,
    int64_t num_sink_tokens, int64_t token_budget, const Tensor& selected,
    const Tensor& num_attended, const OptionalTensor& index_table) {
  SelectClustersParams params{};
  check_devices(kv_cache, {{"scores", scores},
                           {"softmax_sums", softmax_sums},
                           {"index", index},
                           {"block_table", block_table},
                           {"seq_lens", seq_lens},
                           {"min_sparse_lens", min_sparse_lens},
                           {"selected", selected},
                           {"num_attended", num_attended}});
  params.pages = check_pages(kv_cache, index);
  check_dim(scores, "scores", 3);
  params.rows = check_rows(params.pages, block_table, seq_lens, min_sparse_lens, scores.size(1));
  check_index_table(kv_cache, index_table, params.pages, params.rows);
  const int64_t num_clusters = params.pages.num_clusters;
  check_per_cluster(scores, "scores", ScalarType::Float, params.rows, params.rows.num_heads,
                    num_clusters);
  check_softmax_sums(softmax_sums, params.rows);
  check_per_cluster(selected, "selected", ScalarType::Byte, params.rows, params.pages.num_kv_heads,
                    num_clusters);
  check_dim(num_attended, "num_attended", 2);
  check_dtype(num_attended, "num_attended", ScalarType::Int);
  check_size(num_attended, "num_attended", 0, params.rows.num_reqs, "num_reqs");
  check_size(num_attended, "num_attended", 1, params.pages.num_kv_heads, "num_kv_heads");
  check_contiguous(num_attended, "num_attended");
  check_num_sink_tokens(params.pages, num_sink_tokens);
  STD_TORCH_CHECK(token_budget >= 1, "token_budget must be at least 1, got ", token_budget);
  params.scores = static_cast<const float*>(scores.data_ptr());
  params.softmax_sums = static_cast<const float*>(softmax_sums.data_ptr());
  params.num_parts = softmax_sums.size(2);
  params.max_clusters = scores.size(2);
  params.num_sink_tokens = num_sink_tokens;
  params.token_budget = token_budget;
  params.selected = static_cast<uint8_t*>(selected.data_ptr());
  params.num_attended = static_cast<int32_t*>(num_attended.data_ptr());
  return params;
}

inline SparseDecodeParams check_sparse_decode(
    const Tensor& query, const Tensor& kv_cache, const Tensor& index, const Tensor& block_table,
    const Tensor& seq_lens, const Tensor& min_sparse_lens, const Tensor& scores,
    const Tensor& selected, double scale, int64_t num_sink_tokens, bool tail_estimate,
    const Tensor& workspace, const Tensor& output, const OptionalTensor& index_table,
    const OptionalTensor& host_cache, const OptionalTensor& line_table) {
  SparseDecodeParams params{};
  check_devices(kv_cache, {{"query", query},
                           {"index", index},
                           {"block_table", block_table},
                           {"seq_lens", seq_lens},
                           {"min_sparse_lens", min_sparse_lens},
                           {"scores", scores},
                           {"selected", selected},
                           {"workspace", workspace},
                           {"output", output}});
  params.pages = check_pages(kv_cache, index);
  check_query(params.pages, query, kv_cache, "query");
  check_query(params.pages, output, kv_cache, "output");
  params.rows = check_rows(params.pages, block_table, seq_lens, min_sparse_lens, query.size(1));
  check_index_table(kv_cache, index_table, params.pages, params.rows);
  check_size(query, "query", 0, params.rows.num_reqs, "num_reqs");
  check_host_cache(kv_cache, host_cache, params.pages);
  check_line_table(kv_cache, line_table, params.pages);
  check_size(output, "output", 0, params.rows.num_reqs, "num_reqs");
  check_size(output, "output", 1, params.rows.num_heads, "num_heads");
  const int64_t num_clusters = params.pages.num_clusters;
  check_per_cluster(scores, "scores", ScalarType::Float, params.rows, params.rows.num_heads,
                    num_clusters);
  check_per_cluster(selected, "selected", ScalarType::Byte, params.rows, params.pages.num_kv_heads,
                    num_clusters);
  check_num_sink_tokens(params.pages, num_sink_tokens);
  check_dim(workspace, "workspace", 4);
  check_dtype(workspace, "workspace", ScalarType::Float);
  check_size(workspace, "workspace", 0, params.rows.num_reqs, "num_reqs");
  check_size(workspace, "workspace", 1, params.rows.num_heads, "num_heads");
  check_size(workspace, "workspace", 3, params.pages.head_size + 2, "head_size + 2");
  STD_TORCH_CHECK(workspace.size(2) >= 1, "workspace.size(2), the splits, must be at least 1");
  check_contiguous(workspace, "workspace");
  params.query = query.data_ptr();
  params.query_row_stride = query.stride(0);
  params.query_head_stride = query.stride(1);
  params.scores = static_cast<const float*>(scores.data_ptr());
  params.selected = static_cast<const uint8_t*>(selected.data_ptr());
  params.max_clusters = scores.size(2);
  params.scale = static_cast<float>(scale);
  params.num_sink_tokens = num_sink_tokens;
  params.tail_estimate = tail_estimate;
  params.workspace = static_cast<float*>(workspace.data_ptr());
  params.num_splits = workspace.size(2);
  params.output = output.data_ptr();
  params.output_row_stride = output.stride(0);
  params.output_head_stride = output.stride(1);
  return params;
}

inline RecallParams check_recall(const Tensor& selected, const Tensor& scores,
                                 const Tensor& kv_cache, const Tensor& index,
                                 const Tensor& block_table, const Tensor& seq_lens,
                                 const Tensor& min_sparse_lens, int64_t num_sink_tokens,
                                 const Tensor& index_table, const Tensor& host_cache,
                                 const Tensor& row_slots, const Tensor& hot_blocks,
                                 const Tensor& line_table, const Tensor& hot_lines,
                                 const Tensor& hot_order, const Tensor& counters) {
  RecallParams params{};
  check_devices(kv_cache, {{"selected", selected},
                           {"scores", scores},
                           {"index", index},
                           {"block_table", block_table},
                           {"seq_lens", seq_lens},
                           {"min_sparse_lens", min_sparse_lens},
                           {"row_slots", row_slots},
                           {"hot_blocks", hot_blocks},
                           {"hot_lines", hot_lines},
                           {"hot_order", hot_order},
                           {"counters", counters}});
  params.pages = check_pages(kv_cache, index);
  const int64_t num_kv_heads = params.pages.num_kv_heads;
  check_dim(scores, "scores", 3);
  params.rows = check_rows(params.pages, block_table, seq_lens, min_sparse_lens, scores.size(1));
  check_index_table(kv_cache, index_table, params.pages, params.rows);
  check_host_cache(kv_cache, host_cache, params.pages);
  check_line_table(kv_cache, line_table, params.pages);
  check_per_cluster(scores, "scores", ScalarType::Float, params.rows, params.rows.num_heads,
                    params.pages.num_clusters);
  check_per_cluster(selected, "selected", ScalarType::Byte, params.rows, num_kv_heads,
                    params.pages.num_clusters);
  check_num_sink_tokens(params.pages, num_sink_tokens);
  STD_TORCH_CHECK(params.pages.block_size % kLineRows == 0,
                  "kv_cache.size(2) must be a multiple of ", kLineRows, ", got ",
                  params.pages.block_size);
  const int64_t lines_a_page = params.pages.block_size / kLineRows;
  check_dim(row_slots, "row_slots", 1);
  check_dim(hot_blocks, "hot_blocks", 2);
  for (const NamedTensor& t : {NamedTensor{"row_slots", row_slots},
                               {"hot_blocks", hot_blocks},
                               {"hot_lines", hot_lines},
                               {"hot_order", hot_order}}) {
    check_dtype(t.tensor, t.name, ScalarType::Int);
    check_contiguous(t.tensor, t.name);
  }
  check_size(row_slots, "row_slots", 0, params.rows.num_reqs, "num_reqs");
  params.num_positions = hot_blocks.size(1) * lines_a_page;
  for (const NamedTensor& t : {NamedTensor{"hot_lines", hot_lines}, {"hot_order", hot_order}}) {
    check_dim(t.tensor, t.name, 3);
    check_size(t.tensor, t.name, 0, hot_blocks.size(0), "num_slots");
    check_size(t.tensor, t.name, 1, num_kv_heads, "num_kv_heads");
    check_size(t.tensor, t.name, 2, params.num_positions, "the lines of a slot's hot blocks");
  }
  check_dim(counters, "counters", 1);
  check_dtype(counters, "counters", ScalarType::Long);
  check_size(counters, "counters", 0, kNumCounters, "what recall counts");
  check_contiguous(counters, "counters");
  check_size(scores, "scores", 2, selected.size(2), "selected's clusters");
  params.selected = static_cast<const uint8_t*>(selected.data_ptr());
  params.scores = static_cast<const float*>(scores.data_ptr());
  params.max_clusters = selected.size(2);
  params.num_sink_tokens = num_sink_tokens;
  params.row_slots = static_cast<const int32_t*>(row_slots.data_ptr());
  params.hot_blocks = static_cast<const int32_t*>(hot_blocks.data_ptr());
  params.hot_lines = static_cast<int32_t*>(hot_lines.data_ptr());
  params.hot_order = static_cast<int32_t*>(hot_order.data_ptr());
  params.counters = static_cast<int64_t*>(counters.data_ptr());
  return params;
}

}  // namespace clusterkv
