// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the vllm_clusterkv project
//
// One plain struct per op, the contract between checks.h and the kernels.
// Shapes are row-major with a dense last dimension; strides are in elements.
// No torch headers here: CUDA device code includes this file.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define CLUSTERKV_HOST_DEVICE __host__ __device__
#else
#define CLUSTERKV_HOST_DEVICE
#endif

namespace clusterkv {

// Where the fields of a KV head's index are, in bytes; page_layout.IndexFields says what they are.
// Element arrays are of kv_dtype. All begin at a multiple of 16 bytes.
struct IndexFields {
  int64_t value_codes;     // key codes come first: [num_clusters, padded_dims / 2] bytes each
  int64_t cluster_ends;    // [num_clusters] int16; row after a cluster's last
  int64_t key_steps;       // [num_clusters]
  int64_t radii;           // [num_clusters]
  int64_t value_steps;     // [num_clusters]
  int64_t key_base;        // [head_size]
  int64_t key_deviations;  // [head_size]
  int64_t profile;         // [head_size]
  int64_t bytes;
};

// Dimensions that means have codes of.
CLUSTERKV_HOST_DEVICE constexpr int64_t padded_dims(int64_t head_size) {
  return (head_size + 31) / 32 * 32;
}

CLUSTERKV_HOST_DEVICE constexpr IndexFields index_fields(int64_t head_size, int64_t num_clusters,
                                                         int64_t element_size) {
  IndexFields fields{};
  fields.value_codes = num_clusters * padded_dims(head_size) / 2;
  fields.cluster_ends = 2 * fields.value_codes;
  fields.key_steps = fields.cluster_ends + num_clusters * 2;
  fields.radii = fields.key_steps + num_clusters * element_size;
  fields.value_steps = fields.radii + num_clusters * element_size;
  fields.key_base = fields.value_steps + num_clusters * element_size;
  fields.key_deviations = fields.key_base + head_size * element_size;
  fields.profile = fields.key_deviations + head_size * element_size;
  fields.bytes = fields.profile + head_size * element_size;
  return fields;
}

// One layer of the KV cache as semantic pages. `kv_dtype` is bf16, fp16 or fp32.
struct SemanticPages {
  void* kv_cache;      // [num_blocks, num_kv_heads, block_size, 2 * head_size] kv_dtype; K|V
  uint8_t* index;      // [num_blocks, num_kv_heads, fields.bytes]
  IndexFields fields;  // of a page and KV head
  int64_t kv_block_stride;
  int64_t kv_head_stride;
  int64_t kv_row_stride;
  int64_t index_block_stride;  // in bytes, as the next one
  int64_t index_head_stride;
  // Pages outside of kv_cache, strided like it within a head: [num_host_pages, ...], or null.
  const void* host_cache;
  int64_t host_page_stride;
  int64_t host_head_stride;
  int64_t num_host_pages;
  // [num_host_pages, num_kv_heads, block_size / kLineRows], contiguous, or null: where in
  // kv_cache a line of a host page is too, as block * lines a page + line; -1 for nowhere.
  int32_t* line_table;
  int64_t num_blocks;
  int64_t num_kv_heads;
  int64_t block_size;    // tokens a page
  int64_t num_clusters;  // clusters a page and KV head
  int64_t head_size;
};

// The decode rows of a batch.
struct DecodeRows {
  const int32_t* block_table;      // [num_reqs, max_blocks]; -1 - h for page h of host_cache
  const int32_t* index_table;      // likewise; where a page's index is, in the block stride of
                                   // the indexes: block_table as a rule
  const int32_t* seq_lens;         // [num_reqs]; tokens including the current one, 0 for padding
  const int32_t* min_sparse_lens;  // [num_reqs]; shorter rows are attended densely
  int64_t block_table_stride;
  int64_t index_table_stride;
  int64_t num_reqs;
  int64_t max_blocks;
  int64_t num_heads;
};

struct IndexPagesParams {
  SemanticPages pages;             // read and rewritten
  const int32_t* block_ids;        // [num_pages]; -1 entries are skipped
  const int32_t* num_sink_tokens;  // [num_pages]; leading rows left in place, unclustered
  int64_t num_pages;
  int64_t num_iters;  // rounds of assignment and update
};

struct ScoreClustersParams {
  SemanticPages pages;  // all but kv_cache read
  DecodeRows rows;
  const void* query;  // [num_reqs, num_heads, head_size] kv_dtype
  int64_t query_row_stride;
  int64_t query_head_stride;
  float scale;
  int64_t num_sink_tokens;
  float* scores;  // [num_reqs, num_heads, max_clusters]; contiguous
  // [num_reqs, num_heads, num_parts, 2]; contiguous. Of a part's clusters with tokens: max
  // score, and sum of tokens * exp(score - max). None has tokens: -inf and 0.
  float* softmax_sums;
  int64_t num_parts;     // page i of a row is in part i % num_parts
  int64_t max_clusters;  // last dimension of scores and selected
};

struct SelectClustersParams {
  SemanticPages pages;  // cluster_ends read
  DecodeRows rows;
  const float* scores;        // [num_reqs, num_heads, max_clusters]; contiguous
  const float* softmax_sums;  // [num_reqs, num_heads, num_parts, 2]; contiguous
  int64_t num_parts;
  int64_t max_clusters;
  int64_t num_sink_tokens;
  int64_t token_budget;
  uint8_t* selected;      // [num_reqs, num_kv_heads, max_clusters]; contiguous
  int32_t* num_attended;  // [num_reqs, num_kv_heads]; contiguous
};

// P is positions: lines that a request's hot blocks hold of a KV head.
struct RecallParams {
  SemanticPages pages;  // kv_cache's hot blocks and line_table rewritten
  DecodeRows rows;
  const uint8_t* selected;  // [num_reqs, num_kv_heads, max_clusters]; contiguous
  const float* scores;      // [num_reqs, num_heads, max_clusters]; contiguous
  int64_t max_clusters;
  int64_t num_sink_tokens;
  const int32_t* row_slots;   // [num_reqs]; -1 for none
  const int32_t* hot_blocks;  // [num_slots, P / lines a page]; contiguous
  int32_t* hot_lines;         // [num_slots, num_kv_heads, P]; contiguous; page of the row * lines a
                              // page + line, -1 for none
  int32_t* hot_order;         // [num_slots, num_kv_heads, P]; contiguous; least recently used first
  int64_t num_positions;      // P
  int64_t* counters;          // [kNumCounters]
};

struct SparseDecodeParams {
  SemanticPages pages;  // all read
  DecodeRows rows;
  const void* query;  // [num_reqs, num_heads, head_size] kv_dtype
  int64_t query_row_stride;
  int64_t query_head_stride;
  const float* scores;      // [num_reqs, num_heads, max_clusters]; contiguous
  const uint8_t* selected;  // [num_reqs, num_kv_heads, max_clusters]; contiguous
  int64_t max_clusters;
  float scale;
  int64_t num_sink_tokens;
  bool tail_estimate;
  float* workspace;  // [num_reqs, num_heads, num_splits, head_size + 2]: output, max, sum
  int64_t num_splits;
  void* output;  // [num_reqs, num_heads, head_size] kv_dtype
  int64_t output_row_stride;
  int64_t output_head_stride;
};

// What the variance of a cluster's logits adds to its score:
// min(kSpreadWeight * (sqrt(1 + variance) - 1), kSpreadMost).
constexpr float kSpreadWeight = 0.75f;
constexpr float kSpreadMost = 4.0f;

// The code of a mean's element that is the base: between 7 and 8.
constexpr float kMiddleCode = 7.5f;

// The bound of fp16 products of a query with deviations.
constexpr float kLargestHalf = 65504.0f;

// Rows that are recalled together.
constexpr int64_t kLineRows = 8;

// What recall counts: lines found, recalled, and left on the host; rows and KV heads it
// recalled for, and the nanoseconds that took, summed; of those that were looked at for it, the
// weight of the selected clusters among all (in 1 / kMassUnit), and how many they were.
enum Counter { kFound, kRecalled, kLeft, kCalls, kNanoseconds, kMass, kMassSamples, kNumCounters };
constexpr double kMassUnit = 1 << 20;

// A row is looked at when it has one token more than a multiple of so many.
constexpr int64_t kMassEvery = 64;

// Bytes that an entry of an index_table counts.
constexpr int64_t kIndexUnit = 512;

// Clusters of a page and KV head, at most.
constexpr int64_t kMostClusters = 64;

// Complete pages before the one that holds the current token; a sparse row's are indexed.
CLUSTERKV_HOST_DEVICE inline int64_t num_indexed_pages(int64_t seq_len, int64_t block_size) {
  return seq_len > 0 ? (seq_len - 1) / block_size : 0;
}

// Whether a row attends to all its tokens and has no use for the index of its pages.
CLUSTERKV_HOST_DEVICE inline bool is_dense(int64_t seq_len, int64_t min_sparse_len) {
  return seq_len < min_sparse_len;
}

}  // namespace clusterkv
