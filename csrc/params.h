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

// One layer of the KV cache as semantic pages. `kv_dtype` is bf16, fp16 or fp32.
struct SemanticPages {
  void* kv_cache;         // [num_blocks, num_kv_heads, block_size, 2 * head_size] kv_dtype; K|V
  void* centroids;        // [num_blocks, num_kv_heads, 2, num_clusters, head_size] kv_dtype;
                          // of each head all mean keys, then all mean values
  void* spreads;          // [num_blocks, num_kv_heads, head_size + num_clusters] kv_dtype;
                          // of each head the profile, then the clusters' radii
  int16_t* cluster_ends;  // [num_blocks, num_kv_heads, num_clusters]; row after a cluster's last
  // Of score_clusters and index_pages: [num_blocks, num_kv_heads, code_bytes(...)]; of each head
  // num_coded_dims deviations in kv_dtype, as many dimensions in 16 bits each, ascending, and the
  // steps. vllm_clusterkv/key_codes.py says where a key's bits are.
  uint8_t* codes;
  int64_t kv_block_stride;
  int64_t kv_head_stride;
  int64_t kv_row_stride;
  int64_t centroid_block_stride;
  int64_t centroid_head_stride;
  int64_t centroid_value_offset;  // from a mean key to its mean value
  int64_t centroid_row_stride;
  int64_t spread_block_stride;
  int64_t spread_head_stride;
  int64_t ends_block_stride;
  int64_t ends_head_stride;
  int64_t codes_block_stride;
  int64_t codes_head_stride;
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
  const int32_t* index_table;      // likewise; where a page's index is, in the block strides of
                                   // centroids, spreads and cluster_ends: block_table as a rule
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
  float* scores;     // [num_reqs, num_heads, max_clusters]; contiguous
  float* estimates;  // as scores
  // [num_reqs, num_heads, num_tiles(max_clusters), 2]; contiguous. Of a tile's clusters with
  // tokens: max score, and sum of tokens * exp(score - max). None has tokens: -inf and 0.
  float* tile_stats;
  int64_t max_clusters;  // last dimension of scores and selected
};

struct SelectClustersParams {
  SemanticPages pages;  // cluster_ends read
  DecodeRows rows;
  const float* scores;      // [num_reqs, num_heads, max_clusters]; contiguous
  const float* tile_stats;  // [num_reqs, num_heads, num_tiles(max_clusters), 2]; contiguous
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
  const float* estimates;   // [num_reqs, num_heads, max_clusters]; contiguous
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

// What the variance of a cluster's logits adds to its estimate:
// min(kSpreadWeight * (sqrt(1 + variance) - 1), kSpreadMost).
constexpr float kSpreadWeight = 0.75f;
constexpr float kSpreadMost = 4.0f;

// Codes of keys: steps of 16 columns, half the distance between two levels, in deviations, and
// the bound of query times deviation, which is rounded to fp16.
constexpr int64_t kCodeSteps = 16;
constexpr float kCodeStep = 0.4978f;
constexpr float kLargestWeight = 65504.0f;

// Dimensions that a page's codes tell of.
CLUSTERKV_HOST_DEVICE constexpr int64_t num_coded_dims(int64_t head_size) {
  return head_size <= 64 ? 16 : (head_size + 127) / 128 * 32;
}

// Keys of a cluster that have codes, at most.
CLUSTERKV_HOST_DEVICE constexpr int64_t num_coded_keys(int64_t num_clusters) {
  return 16 * kCodeSteps / num_clusters;
}

// Bytes of a page and KV head's codes.
CLUSTERKV_HOST_DEVICE constexpr int64_t code_bytes(int64_t head_size, int64_t element_size) {
  return num_coded_dims(head_size) * (element_size + 2 + 4 * kCodeSteps);
}

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

// Clusters that share an entry of tile_stats: neighbours, of two pages if these have 8.
constexpr int64_t kTileClusters = 16;

CLUSTERKV_HOST_DEVICE inline int64_t num_tiles(int64_t num_clusters) {
  return (num_clusters + kTileClusters - 1) / kTileClusters;
}

// Complete pages before the one that holds the current token; a sparse row's are indexed.
CLUSTERKV_HOST_DEVICE inline int64_t num_indexed_pages(int64_t seq_len, int64_t block_size) {
  return seq_len > 0 ? (seq_len - 1) / block_size : 0;
}

// Whether a row attends to all its tokens and has no use for the index of its pages.
CLUSTERKV_HOST_DEVICE inline bool is_dense(int64_t seq_len, int64_t min_sparse_len) {
  return seq_len < min_sparse_len;
}

}  // namespace clusterkv
