// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the vllm_clusterkv project
//
// Decode attention over chosen rows of the KV cache, split over blocks: which rows.
// tile_attention.cuh has how a warp attends to them, merge_partials.cuh what becomes of
// the warps' and splits' results.
//
// A tile is one of
//   exact rows   any 16 rows of the row's pages: sinks, selected clusters, tail page
//   dense rows   16 consecutive tokens of a row that is attended to densely
//   means        the mean values of 16 clusters; their logits are scores + log(count),
//                or minus infinity where a cluster was selected
//
// Split s of a sparse row has pages s, s + num_splits, ... and every num_splits-th tile
// of the tail page. It takes its pages in windows of at most kWindowClusters clusters, a
// single one as a rule.
#pragma once

#include "../params.h"
#include "merge_partials.cuh"
#include "ptx.cuh"
#include "tile_attention.cuh"

namespace clusterkv::cuda {

constexpr int kPageRows = 256;
constexpr int kClustersAThread = 8;  // of one page: pages have 8, 16 or 32

// What the threads of a block tell each other of a window.
template <int kHeadSize>
struct SparseShared {
  using Traits = DecodeTraits<kHeadSize>;
  static constexpr int kWindowClusters = Traits::kThreads * kClustersAThread;
  // The selected clusters: page in the window * 256 + first row, and the rows of the
  // selected clusters before.
  uint16_t starts[kWindowClusters];
  uint16_t rows_before[kWindowClusters];
  float log_counts[kWindowClusters];  // of all; minus infinity: no mean
  int warp_totals[Traits::kWarps];
};

// The rows of one request and KV head, of which a block attends to its split.
template <typename T>
struct DecodeRow {
  const T* kv;           // of this KV head
  const T* mean_values;  // likewise
  const int16_t* cluster_ends;
  const int32_t* block_table;
  const float* scores;      // [group, max_clusters]
  const uint8_t* selected;  // [max_clusters]
  int seq_len;
  int num_pages;  // indexed
  int group;
};

// Attends to every row's token: tiles of consecutive tokens, dealt to all warps.
template <typename T, int kHeadSize, int kHeadTiles>
__device__ void attend_densely(const SparseDecodeParams& p, const DecodeRow<T>& row,
                               DecodeWarp<T, kHeadSize, kHeadTiles>& warp) {
  using Traits = DecodeTraits<kHeadSize>;
  const int num_tiles = (row.seq_len + kTileRows - 1) / kTileRows;
  const int first = (threadIdx.x / 32) * static_cast<int>(p.num_splits) + blockIdx.x;
  const int step = Traits::kWarps * static_cast<int>(p.num_splits);
  const auto load = [&](int tile, int stage) {
    const int token = tile * kTileRows + warp.lane;
    const T* source = nullptr;
    if (warp.lane < kTileRows && token < row.seq_len) {
      const int64_t block = row.block_table[token / kPageRows];
      source = row.kv + block * p.pages.kv_block_stride + token % kPageRows * p.pages.kv_row_stride;
    }
    warp.template load_tile<true>(source, stage);
  };
  if (first < num_tiles) load(first, 0);
  cp_async_commit();
  int stage = 0;
  for (int tile = first; tile < num_tiles; tile += step) {
    if (tile + step < num_tiles) load(tile + step, stage ^ 1);
    cp_async_commit();
    warp.wait_tile();
    float logits[kHeadTiles][4];
    warp.score_tile(stage, row.seq_len - tile * kTileRows, p.scale, logits);
    warp.attend_tile(stage, logits);
    __syncwarp();
    stage ^= 1;
  }
}

// Eight consecutive clusters of one page, a thread's share of a window.
struct WindowClusters {
  alignas(16) uint16_t ends[8];  // as cluster_ends
  int first;                     // in the row; -1 for none
  int start;                     // first row in the page
};

// What is known before the selection is.
template <typename T>
__device__ __forceinline__ WindowClusters find_clusters(const SparseDecodeParams& p,
                                                        const DecodeRow<T>& row, int first_page,
                                                        int num_window_pages) {
  const int num_clusters = static_cast<int>(p.pages.num_clusters);
  const int slot = static_cast<int>(threadIdx.x) * 8 / num_clusters;
  const int c = static_cast<int>(threadIdx.x) * 8 % num_clusters;
  WindowClusters found{};
  found.first = -1;
  if (slot < num_window_pages) {
    const int page = first_page + slot * static_cast<int>(p.num_splits);
    const int16_t* ends = row.cluster_ends + row.block_table[page] * p.pages.ends_block_stride;
    found.first = page * num_clusters + c;
    found.start = c > 0 ? ends[c - 1] : page == 0 ? static_cast<int>(p.num_sink_tokens) : 0;
    *reinterpret_cast<uint4*>(found.ends) = *reinterpret_cast<const uint4*>(ends + c);
  }
  return found;
}

// Attends to sinks, selected clusters, the tail page and the means of the rest.
template <typename T, int kHeadSize, int kHeadTiles>
__device__ void attend_sparsely(const SparseDecodeParams& p, const DecodeRow<T>& row,
                                SparseShared<kHeadSize>& shared,
                                DecodeWarp<T, kHeadSize, kHeadTiles>& warp) {
  using Traits = DecodeTraits<kHeadSize>;
  constexpr int kStep = Traits::kWarps;
  const int num_splits = static_cast<int>(p.num_splits), split = blockIdx.x;
  const int num_clusters = static_cast<int>(p.pages.num_clusters);
  const int log_clusters = 31 - __clz(num_clusters);
  const int max_window_pages = SparseShared<kHeadSize>::kWindowClusters >> log_clusters;
  const int own_pages = row.num_pages > split ? (row.num_pages - 1 - split) / num_splits + 1 : 0;
  const int thread = threadIdx.x, lane = warp.lane, warp_index = thread / 32;

  // The tail page's tiles are dealt from the last split on: it has the fewest pages.
  const int all_tail_rows = row.seq_len - row.num_pages * kPageRows;
  const int first_tail_tile = num_splits - 1 - split;
  int num_tail_rows = 0;
  for (int tile = first_tail_tile; tile * kTileRows < all_tail_rows; tile += num_splits) {
    num_tail_rows += min(kTileRows, all_tail_rows - tile * kTileRows);
  }

  for (int window = 0; window == 0 || window < own_pages; window += max_window_pages) {
    const int first_page = split + window * num_splits;
    const int window_pages = max(0, min(max_window_pages, own_pages - window));
    const int num_means = p.tail_estimate ? window_pages << log_clusters : 0;
    const int mean_tiles = (num_means + kTileRows - 1) / kTileRows;
    const auto page_of = [&](int slot) { return first_page + slot * num_splits; };
    const auto mean_of_lane = [&](int tile) -> const T* {
      const int mean = tile * kTileRows + lane;
      if (lane >= kTileRows || mean >= num_means) return nullptr;
      const int64_t block = row.block_table[page_of(mean >> log_clusters)];
      return row.mean_values + block * p.pages.centroid_block_stride +
             (mean & (num_clusters - 1)) * p.pages.centroid_row_stride;
    };

    // Means do not depend on the selection: they are fetched before it is there.
    const WindowClusters clusters = find_clusters(p, row, first_page, window_pages);
    if (warp_index < mean_tiles) warp.template load_tile<false>(mean_of_lane(warp_index), 0);
    cp_async_commit();
    if (window == 0) wait_for_previous_kernel();

    uint64_t selected = 0;  // a byte a cluster
    if (clusters.first >= 0) {
      selected = *reinterpret_cast<const uint64_t*>(row.selected + clusters.first);
    }
    int own = 0;  // selected clusters * 2^16 + their rows
    int start = clusters.start;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int count = clusters.ends[i] - start;
      const bool is_selected = selected >> (8 * i) & 1;
      start = clusters.ends[i];
      own += is_selected && count > 0 ? 1 << 16 | count : 0;
      shared.log_counts[thread * 8 + i] =
          is_selected || count <= 0 ? -INFINITY : log2f(static_cast<float>(count));
    }
    int inclusive = own;
#pragma unroll
    for (int i = 1; i < 32; i *= 2) {
      const int other = __shfl_up_sync(~0u, inclusive, i);
      if (lane >= i) inclusive += other;
    }
    if (lane == 31) shared.warp_totals[warp_index] = inclusive;
    __syncthreads();
    int before = inclusive - own, total = 0;
#pragma unroll
    for (int w = 0; w < Traits::kWarps; ++w) {
      if (w < warp_index) before += shared.warp_totals[w];
      total += shared.warp_totals[w];
    }
    start = clusters.start;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int count = clusters.ends[i] - start;
      if (selected >> (8 * i) & 1 && count > 0) {
        shared.starts[before >> 16] =
            static_cast<uint16_t>((thread * 8 >> log_clusters) * kPageRows + start);
        shared.rows_before[before >> 16] = static_cast<uint16_t>(before);
        before += 1 << 16 | count;
      }
      start = clusters.ends[i];
    }
    __syncthreads();

    // Exact rows: sinks, selected clusters, tail page.
    const int num_selected = total >> 16, selected_rows = total & 0xffff;
    const int sinks = first_page == 0 && window_pages > 0 ? static_cast<int>(p.num_sink_tokens) : 0;
    const int num_rows = sinks + selected_rows + (window == 0 ? num_tail_rows : 0);
    const auto row_of_lane = [&](int tile) -> const T* {
      int i = tile * kTileRows + lane;
      if (lane >= kTileRows || i >= num_rows) return nullptr;
      int page, at;
      if (i < sinks) {
        page = 0;
        at = i;
      } else if ((i -= sinks) < selected_rows) {
        int entry = 0;  // the last one with rows_before <= i
        for (int step = 1 << (31 - __clz(num_selected)); step > 0; step /= 2) {
          if (entry + step < num_selected && shared.rows_before[entry + step] <= i) entry += step;
        }
        at = shared.starts[entry] + i - shared.rows_before[entry];
        page = page_of(at / kPageRows);
        at %= kPageRows;
      } else {
        i -= selected_rows;
        page = row.num_pages;
        at = (first_tail_tile + i / kTileRows * num_splits) * kTileRows + i % kTileRows;
      }
      return row.kv + int64_t{row.block_table[page]} * p.pages.kv_block_stride +
             at * p.pages.kv_row_stride;
    };
    // Scores of a tile of means: of rows g and g + 8, and this thread's heads.
    const auto load_scores = [&](int tile, float (&scores)[kHeadTiles][4]) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int mean = min(tile * kTileRows + warp.g + i / 2 * 8, num_means - 1);
        const int cluster =
            page_of(mean >> log_clusters) * num_clusters + (mean & (num_clusters - 1));
#pragma unroll
        for (int t = 0; t < kHeadTiles; ++t) {
          const int head = min(t * 8 + warp.j * 2 + i % 2, row.group - 1);
          scores[t][i] = row.scores[head * p.max_clusters + cluster];
        }
      }
    };

    // One tile is attended to, one is on its way, of one more the rows are looked up.
    const int num_tiles = mean_tiles + (num_rows + kTileRows - 1) / kTileRows;
    float next_scores[kHeadTiles][4];
    const T* source = nullptr;  // of this lane, in the tile to fetch next
    const auto look_up = [&](int tile) {
      if (tile < num_tiles) {
        source = tile < mean_tiles ? mean_of_lane(tile) : row_of_lane(tile - mean_tiles);
      }
    };
    const auto load = [&](int tile, int stage) {
      if (tile < mean_tiles) {
        warp.template load_tile<false>(source, stage);
        load_scores(tile, next_scores);
      } else if (tile < num_tiles) {
        warp.template load_tile<true>(source, stage);
      }
    };
    if (warp_index < mean_tiles) {
      load_scores(warp_index, next_scores);
    } else {
      look_up(warp_index);
      load(warp_index, 0);
    }
    cp_async_commit();
    look_up(warp_index + kStep);
    int stage = 0;
    for (int tile = warp_index; tile < num_tiles; tile += kStep) {
      float logits[kHeadTiles][4];
      if (tile < mean_tiles) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int mean = tile * kTileRows + warp.g + i / 2 * 8;
          const float log_count = mean < num_means ? shared.log_counts[mean] : -INFINITY;
#pragma unroll
          for (int t = 0; t < kHeadTiles; ++t) {
            logits[t][i] =
                log_count == -INFINITY ? log_count : next_scores[t][i] * kLog2e + log_count;
          }
        }
      }
      load(tile + kStep, stage ^ 1);
      cp_async_commit();
      look_up(tile + 2 * kStep);
      warp.wait_tile();
      if (tile >= mean_tiles) {
        warp.score_tile(stage, num_rows - (tile - mean_tiles) * kTileRows, p.scale, logits);
      }
      warp.attend_tile(stage, logits);
      __syncwarp();
      stage ^= 1;
    }
    __syncthreads();  // shared is written anew
  }
}

// Grid: [num_splits, num_kv_heads, num_reqs].
template <typename T, int kHeadSize, int kHeadTiles>
__global__ void __launch_bounds__(DecodeTraits<kHeadSize>::kThreads)
    sparse_decode_kernel(const SparseDecodeParams p) {
  using Traits = DecodeTraits<kHeadSize>;
  extern __shared__ __align__(128) unsigned char smem[];
  auto& shared = *reinterpret_cast<SparseShared<kHeadSize>*>(smem + Traits::kTileBytes);
  const SemanticPages& pages = p.pages;
  const int req = blockIdx.z, kv_head = blockIdx.y;
  const int group = static_cast<int>(p.rows.num_heads / pages.num_kv_heads);
  const int64_t first_head = req * p.rows.num_heads + kv_head * group;
  DecodeRow<T> row;
  row.kv = static_cast<const T*>(pages.kv_cache) + kv_head * pages.kv_head_stride;
  row.mean_values = static_cast<const T*>(pages.centroids) + kv_head * pages.centroid_head_stride +
                    pages.centroid_value_offset;
  row.cluster_ends = pages.cluster_ends + kv_head * pages.ends_head_stride;
  row.block_table = p.rows.block_table + req * p.rows.block_table_stride;
  row.scores = p.scores + first_head * p.max_clusters;
  row.selected = p.selected + (req * pages.num_kv_heads + kv_head) * p.max_clusters;
  row.seq_len = p.rows.seq_lens[req];
  row.num_pages = static_cast<int>(num_indexed_pages(row.seq_len, kPageRows));
  row.group = group;

  DecodeWarp<T, kHeadSize, kHeadTiles> warp;
  warp.lane = threadIdx.x % 32;
  warp.g = warp.lane / 4;
  warp.j = warp.lane % 4;
  warp.stages = smem_address(smem) + threadIdx.x / 32 * Traits::kStages * Traits::kStageBytes;
  const bool dense = is_dense(row.seq_len, p.rows.min_sparse_lens[req]);
  if (dense || row.seq_len <= 0) wait_for_previous_kernel();
  if (row.seq_len > 0) {
    warp.load_query(static_cast<const T*>(p.query) + req * p.query_row_stride +
                        kv_head * group * p.query_head_stride,
                    p.query_head_stride, group);
    if (dense) {
      attend_densely(p, row, warp);
    } else {
      attend_sparsely(p, row, shared, warp);
    }
  }
  start_next_kernel();
  write_partial(p, first_head, group, reinterpret_cast<float*>(smem), warp);
}

}  // namespace clusterkv::cuda
