// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the vllm_clusterkv project
//
// Decode attention over chosen rows of the KV cache, split over blocks: which rows.
// tile_attention.cuh has how a warp attends to them, merge_partials.cuh what becomes of
// the warps' and splits' results.
//
// A tile is one of
//   dense rows      16 consecutive tokens of a row that is attended to densely
//   exact rows      16 rows of a page: sinks, the tail page
//   means           the mean values of 16 clusters, with logits score + log(count)
//   selected rows   any 16 rows of selected clusters
//   selected means  means of 16 selected clusters, with their weights negative
//
// Selecting clusters takes long next to attending to them, and few multiprocessors. So
// all that does not need the selection is done while it runs: the means of all clusters
// are attended to. Afterwards the selected clusters' rows come in and their means are
// taken out again. Little is lost by that: the rows of a cluster weigh at least as much
// as its mean (Jensen's inequality), a score adds at most kSpreadMost to that, and a
// mean's weight comes and goes with the same bits (WarpState::max).
//
// Split s of a sparse row has pages s, s + num_splits, ... and every num_splits-th tile
// of the sinks and the tail page. It takes the selected clusters of its pages in windows
// of at most kWindowClusters clusters, a single one as a rule.
#pragma once

#include "../params.h"
#include "merge_partials.cuh"
#include "page_shape.h"
#include "ptx.cuh"
#include "tile_attention.cuh"

namespace clusterkv::cuda {

constexpr int kClustersAThread = 8;  // of one page: pages have 8, 16 or 32

// What the threads of a block tell each other of a window.
template <int kHeadSize>
struct SparseShared {
  using Traits = DecodeTraits<kHeadSize>;
  static constexpr int kWindowClusters = Traits::kThreads * kClustersAThread;
  const void* pages[kWindowClusters / 8];     // the window's, of this KV head
  const int32_t* lines[kWindowClusters / 8];  // their entries in line_table, or null
  // The selected clusters: number in the window, page in the window * 256 + first row,
  // and the rows of the selected clusters before.
  uint16_t clusters[kWindowClusters];
  uint16_t starts[kWindowClusters];
  uint16_t rows_before[kWindowClusters + 1];
  int places[kWindowClusters / 8];  // of the window's pages' indexes
  int warp_totals[Traits::kWarps];
};

// The rows of one request and KV head, of which a block attends to its split.
template <typename T>
struct DecodeRow {
  const T* kv;           // of this KV head
  const T* host;         // likewise
  const int32_t* lines;  // likewise, or null
  const T* mean_values;  // likewise
  const int16_t* cluster_ends;
  const int32_t* block_table;
  const int32_t* index_table;
  const float* estimates;   // [group, max_clusters]
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
    warp.load_tile(source, stage);
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

// A split's pages: split, split + num_splits, ...
struct SplitPages {
  int split, num_splits;
  int size;
  int log_clusters, num_clusters;  // a page

  __device__ SplitPages(const SparseDecodeParams& p, int num_pages)
      : split(blockIdx.x), num_splits(static_cast<int>(p.num_splits)) {
    size = num_pages > split ? (num_pages - 1 - split) / num_splits + 1 : 0;
    num_clusters = static_cast<int>(p.pages.num_clusters);
    log_clusters = 31 - __clz(num_clusters);
  }
  // Page in the row of the split's cluster `i`, and the cluster's number in that page.
  __device__ int page(int i) const { return split + (i >> log_clusters) * num_splits; }
  __device__ int in_page(int i) const { return i & (num_clusters - 1); }
  __device__ int in_row(int i) const { return page(i) << log_clusters | in_page(i); }
};

// Logit of a cluster's mean, in base 2, the same bits wherever it is asked for.
__device__ __forceinline__ float mean_logit(float score, int count) {
  return count > 0 ? __fmaf_rn(score, kLog2e, __log2f(static_cast<float>(count))) : -INFINITY;
}

// Attends to the means of a split's clusters. Its tiles are of values alone, so more of
// them fit where the others' stages are.
template <typename T, int kHeadSize, int kHeadTiles>
__device__ void attend_to_means(const SparseDecodeParams& p, const DecodeRow<T>& row,
                                const SplitPages& pages,
                                DecodeWarp<T, kHeadSize, kHeadTiles>& warp) {
  using Traits = DecodeTraits<kHeadSize>;
  constexpr int kStep = Traits::kWarps, kStages = Traits::kValueStages;
  const int num_means = pages.size << pages.log_clusters;
  const int num_tiles = (num_means + kTileRows - 1) / kTileRows;
  const int first_tile = threadIdx.x / 32;
  if (first_tile >= num_tiles) return;

  // Beyond the last tile, the last mean is looked up, and zeros are fetched: no branches.
  struct Places {
    int of[2];  // of the tile's first and last eight means
  };
  const auto look_up = [&](int tile) {
    Places places;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      places.of[i] = row.index_table[pages.page(min(tile * kTileRows + i * 8, num_means - 1))];
    }
    return places;
  };
  const auto load_values = [&](int tile, const Places& places, int stage) {
    const int mean = tile * kTileRows + warp.lane;
    const T* source =
        row.mean_values +
        int64_t{warp.lane < 8 ? places.of[0] : places.of[1]} * p.pages.centroid_block_stride +
        pages.in_page(mean) * p.pages.centroid_row_stride;
    const bool valid = warp.lane < kTileRows && mean < num_means;
    warp.load_values(valid ? source : nullptr, stage * Traits::kValueStageBytes);
    cp_async_commit();
  };
  // What the logits of means g and g + 8 are made of.
  float estimates[kHeadTiles][4];
  int ends[2], previous_ends[2];
  const auto load_logits = [&](int tile, const Places& places) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int mean = min(tile * kTileRows + warp.g + i * 8, num_means - 1);
      const int c = pages.in_page(mean);
      const int16_t* of_page = row.cluster_ends + places.of[i] * p.pages.ends_block_stride;
      ends[i] = of_page[c];
      previous_ends[i] = of_page[max(c - 1, 0)];
#pragma unroll
      for (int t = 0; t < kHeadTiles; ++t) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const int head = min(t * 8 + warp.j * 2 + h, row.group - 1);
          estimates[t][i * 2 + h] =
              __ldcg(row.estimates + head * p.max_clusters + pages.in_row(mean));
        }
      }
    }
  };

  Places places[kStages];  // of the next tiles
#pragma unroll
  for (int i = 0; i < kStages; ++i) places[i] = look_up(first_tile + i * kStep);
#pragma unroll
  for (int i = 0; i < kStages - 1; ++i) load_values(first_tile + i * kStep, places[i], i);
  load_logits(first_tile, places[0]);
  int stage = 0;
  for (int tile = first_tile; tile < num_tiles; tile += kStep) {
    float logits[kHeadTiles][4];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int mean = tile * kTileRows + warp.g + i * 8;
      const int sinks = pages.page(mean) == 0 ? static_cast<int>(p.num_sink_tokens) : 0;
      const int start = pages.in_page(mean) > 0 ? previous_ends[i] : sinks;
      const int count = mean < num_means ? ends[i] - start : 0;
#pragma unroll
      for (int t = 0; t < kHeadTiles; ++t) {
        logits[t][i * 2] = mean_logit(estimates[t][i * 2], count);
        logits[t][i * 2 + 1] = mean_logit(estimates[t][i * 2 + 1], count);
      }
    }
    load_logits(tile + kStep, places[1]);
    load_values(tile + (kStages - 1) * kStep, places[kStages - 1],
                stage == 0 ? kStages - 1 : stage - 1);
#pragma unroll
    for (int i = 1; i < kStages; ++i) places[i - 1] = places[i];
    places[kStages - 1] = look_up(tile + kStages * kStep);
    cp_async_wait<kStages - 1>();
    __syncwarp();
    warp.attend_values(stage * Traits::kValueStageBytes, logits, 1.0f);
    __syncwarp();
    stage = stage == kStages - 1 ? 0 : stage + 1;
  }
  cp_async_wait<0>();  // the zeros beyond the last tile
  __syncwarp();
}

// Attends to the sinks and the tail page.
template <typename T, int kHeadSize, int kHeadTiles>
__device__ void attend_to_ends(const SparseDecodeParams& p, const DecodeRow<T>& row,
                               const SplitPages& pages,
                               DecodeWarp<T, kHeadSize, kHeadTiles>& warp) {
  const int sinks = row.num_pages > 0 ? static_cast<int>(p.num_sink_tokens) : 0;
  const int sink_tiles = (sinks + kTileRows - 1) / kTileRows;
  const int tail_rows = row.seq_len - row.num_pages * kPageRows;
  const int num_tiles = sink_tiles + (tail_rows + kTileRows - 1) / kTileRows;
  // Dealt from the last split and warp on: they have the fewest means.
  constexpr int kWarps = DecodeTraits<kHeadSize>::kWarps;
  const int first_tile = pages.num_splits - 1 - pages.split +
                         (kWarps - 1 - static_cast<int>(threadIdx.x) / 32) * pages.num_splits;
  for (int tile = first_tile; tile < num_tiles; tile += kWarps * pages.num_splits) {
    const bool is_sink = tile < sink_tiles;
    const int first = (is_sink ? tile : tile - sink_tiles) * kTileRows;
    const int num_rows = (is_sink ? sinks : tail_rows) - first;
    const T* source =
        row.kv + int64_t{row.block_table[is_sink ? 0 : row.num_pages]} * p.pages.kv_block_stride +
        (first + warp.lane) * p.pages.kv_row_stride;
    warp.load_tile(warp.lane < min(kTileRows, num_rows) ? source : nullptr, 0);
    cp_async_commit();
    cp_async_wait<0>();
    __syncwarp();
    float logits[kHeadTiles][4];
    warp.score_tile(0, num_rows, p.scale, logits);
    warp.attend_tile(0, logits);
    __syncwarp();
  }
}

// Eight consecutive clusters of one page, a thread's share of a window.
struct WindowClusters {
  alignas(16) uint16_t ends[8];  // as cluster_ends
  int first;                     // in the row; -1 for none
  int start;                     // first row in the page
  int block;                     // the page's, or -1 - h
  int place;                     // of its index

  // Those of the window that begins with the split's page `window`.
  template <typename T>
  __device__ WindowClusters(const SparseDecodeParams& p, const DecodeRow<T>& row,
                            const SplitPages& pages, int window)
      : first(-1), start(0), block(0), place(0) {
    *reinterpret_cast<uint4*>(ends) = uint4{};
    const int i = (window << pages.log_clusters) + static_cast<int>(threadIdx.x) * 8;
    if (i < pages.size << pages.log_clusters) {
      const int page = pages.page(i), c = pages.in_page(i);
      block = row.block_table[page];
      place = row.index_table[page];
      const int16_t* of_page = row.cluster_ends + place * p.pages.ends_block_stride;
      first = pages.in_row(i);
      start = c > 0 ? of_page[c - 1] : page == 0 ? static_cast<int>(p.num_sink_tokens) : 0;
      *reinterpret_cast<uint4*>(ends) = *reinterpret_cast<const uint4*>(of_page + c);
    }
  }
};

// Lists a window's selected clusters; returns their number * 2^16 + their rows.
template <typename T, int kHeadSize>
__device__ int list_selected(const SemanticPages& pages, const DecodeRow<T>& row,
                             const WindowClusters& clusters, int log_clusters,
                             SparseShared<kHeadSize>& shared) {
  const int thread = threadIdx.x, lane = thread % 32, warp_index = thread / 32;
  if ((thread * 8 & ((1 << log_clusters) - 1)) == 0) {
    const int page = thread * 8 >> log_clusters;
    shared.places[page] = clusters.place;
    const int64_t host_page = -1 - clusters.block;
    shared.pages[page] = clusters.block >= 0 ? row.kv + clusters.block * pages.kv_block_stride
                                             : row.host + host_page * pages.host_page_stride;
    shared.lines[page] = clusters.block >= 0 || row.lines == nullptr
                             ? nullptr
                             : row.lines + host_page * pages.num_kv_heads * kLinesAPage;
  }
  uint64_t selected = 0;  // a byte a cluster
  if (clusters.first >= 0) {
    selected = *reinterpret_cast<const uint64_t*>(row.selected + clusters.first);
  }
  int own = 0, start = clusters.start;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const int count = clusters.ends[i] - start;
    start = clusters.ends[i];
    own += selected >> (8 * i) & 1 && count > 0 ? 1 << 16 | count : 0;
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
  for (int w = 0; w < DecodeTraits<kHeadSize>::kWarps; ++w) {
    if (w < warp_index) before += shared.warp_totals[w];
    total += shared.warp_totals[w];
  }
  start = clusters.start;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const int count = clusters.ends[i] - start;
    if (selected >> (8 * i) & 1 && count > 0) {
      const int entry = before >> 16;
      shared.clusters[entry] = static_cast<uint16_t>(thread * 8 + i);
      shared.starts[entry] =
          static_cast<uint16_t>((thread * 8 >> log_clusters) * kPageRows + start);
      shared.rows_before[entry] = static_cast<uint16_t>(before);
      before += 1 << 16 | count;
    }
    start = clusters.ends[i];
  }
  if (thread == 0) shared.rows_before[total >> 16] = static_cast<uint16_t>(total);
  __syncthreads();
  return total;
}

// Attends to the selected clusters' rows, and takes their means out. Waits for the
// kernel before.
template <typename T, int kHeadSize, int kHeadTiles>
__device__ void attend_to_selected(const SparseDecodeParams& p, const DecodeRow<T>& row,
                                   const SplitPages& pages, SparseShared<kHeadSize>& shared,
                                   DecodeWarp<T, kHeadSize, kHeadTiles>& warp) {
  using Traits = DecodeTraits<kHeadSize>;
  constexpr int kStep = Traits::kWarps;
  const int window_pages = SparseShared<kHeadSize>::kWindowClusters >> pages.log_clusters;
  const int lane = warp.lane;

  for (int window = 0; window == 0 || window < pages.size; window += window_pages) {
    const WindowClusters clusters(p, row, pages, window);
    if (window == 0) {
      wait_for_previous_kernel();
      start_next_kernel();
    }
    const int total = list_selected(p.pages, row, clusters, pages.log_clusters, shared);
    const int num_selected = total >> 16, num_rows = total & 0xffff;
    const int first_cluster = window << pages.log_clusters;  // of the split
    const int row_tiles = (num_rows + kTileRows - 1) / kTileRows;
    const int mean_tiles = p.tail_estimate ? (num_selected + kTileRows - 1) / kTileRows : 0;
    const int num_tiles = row_tiles + mean_tiles;

    const auto row_of_lane = [&](int tile) -> const T* {
      const int i = tile * kTileRows + lane;
      if (lane >= kTileRows || i >= num_rows) return nullptr;
      int entry = 0;  // the last one with rows_before <= i
      for (int step = 1 << (31 - __clz(num_selected)); step > 0; step /= 2) {
        if (entry + step < num_selected && shared.rows_before[entry + step] <= i) entry += step;
      }
      const int at = shared.starts[entry] + i - shared.rows_before[entry];
      const auto* page = static_cast<const T*>(shared.pages[at / kPageRows]);
      const int32_t* lines = shared.lines[at / kPageRows];
      int page_row = at % kPageRows;
      if (lines != nullptr) {
        const int hot = __ldcg(lines + page_row / kRowsALine);
        if (hot >= 0) {
          page = row.kv + int64_t{hot / kLinesAPage} * p.pages.kv_block_stride;
          page_row = hot % kLinesAPage * kRowsALine + page_row % kRowsALine;
        }
      }
      return page + page_row * p.pages.kv_row_stride;
    };
    const auto mean_of_lane = [&](int tile) -> const T* {
      const int entry = tile * kTileRows + lane;
      if (lane >= kTileRows || entry >= num_selected) return nullptr;
      const int cluster = shared.clusters[entry];
      return row.mean_values +
             int64_t{shared.places[cluster >> pages.log_clusters]} * p.pages.centroid_block_stride +
             pages.in_page(cluster) * p.pages.centroid_row_stride;
    };
    // One tile is attended to, one is on its way, of one more the rows are looked up.
    const T* source = nullptr;  // of this lane, in the tile to fetch next
    const auto look_up = [&](int tile) {
      if (tile < num_tiles) {
        source = tile < row_tiles ? row_of_lane(tile) : mean_of_lane(tile - row_tiles);
      }
    };
    float estimates[kHeadTiles][4];  // of rows g and g + 8, and this thread's heads
    const auto load = [&](int tile, int stage) {
      if (tile < row_tiles) {
        warp.load_tile(source, stage);
      } else if (tile < num_tiles) {
        warp.load_values(source, stage * Traits::kStageBytes);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int entry =
              min((tile - row_tiles) * kTileRows + warp.g + i / 2 * 8, num_selected - 1);
          const int cluster = pages.in_row(first_cluster + shared.clusters[entry]);
#pragma unroll
          for (int t = 0; t < kHeadTiles; ++t) {
            const int head = min(t * 8 + warp.j * 2 + i % 2, row.group - 1);
            estimates[t][i] = __ldcg(row.estimates + head * p.max_clusters + cluster);
          }
        }
      }
    };

    const int first_tile = threadIdx.x / 32;
    look_up(first_tile);
    load(first_tile, 0);
    cp_async_commit();
    look_up(first_tile + kStep);
    int stage = 0;
    for (int tile = first_tile; tile < num_tiles; tile += kStep) {
      float logits[kHeadTiles][4];
      if (tile >= row_tiles) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int entry = (tile - row_tiles) * kTileRows + warp.g + i / 2 * 8;
          const int count =
              entry < num_selected ? shared.rows_before[entry + 1] - shared.rows_before[entry] : 0;
#pragma unroll
          for (int t = 0; t < kHeadTiles; ++t) logits[t][i] = mean_logit(estimates[t][i], count);
        }
      }
      load(tile + kStep, stage ^ 1);
      cp_async_commit();
      look_up(tile + 2 * kStep);
      warp.wait_tile();
      if (tile < row_tiles) {
        warp.score_tile(stage, num_rows - tile * kTileRows, p.scale, logits);
        warp.attend_tile(stage, logits);
      } else {
        warp.attend_values(stage * Traits::kStageBytes, logits, -1.0f);
      }
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
  row.host = static_cast<const T*>(pages.host_cache) + kv_head * pages.host_head_stride;
  row.lines = pages.line_table == nullptr ? nullptr : pages.line_table + kv_head * kLinesAPage;
  row.mean_values = static_cast<const T*>(pages.centroids) + kv_head * pages.centroid_head_stride +
                    pages.centroid_value_offset;
  row.cluster_ends = pages.cluster_ends + kv_head * pages.ends_head_stride;
  row.block_table = p.rows.block_table + req * p.rows.block_table_stride;
  row.index_table = p.rows.index_table + req * p.rows.index_table_stride;
  row.estimates = p.estimates + first_head * p.max_clusters;
  row.selected = p.selected + (req * pages.num_kv_heads + kv_head) * p.max_clusters;
  row.seq_len = __ldcg(p.rows.seq_lens + req);
  row.num_pages = static_cast<int>(num_indexed_pages(row.seq_len, kPageRows));
  row.group = group;

  DecodeWarp<T, kHeadSize, kHeadTiles> warp;
  warp.lane = threadIdx.x % 32;
  warp.g = warp.lane / 4;
  warp.j = warp.lane % 4;
  warp.stages = smem_address(smem) + threadIdx.x / 32 * Traits::kStages * Traits::kStageBytes;
  const bool sparse =
      row.seq_len > 0 && !is_dense(row.seq_len, __ldcg(p.rows.min_sparse_lens + req));
  if (row.seq_len > 0) {
    warp.load_query(static_cast<const T*>(p.query) + req * p.query_row_stride +
                        kv_head * group * p.query_head_stride,
                    p.query_head_stride, group);
  }
  if (sparse) {
    const SplitPages pages(p, row.num_pages);
    if (p.tail_estimate) attend_to_means(p, row, pages, warp);
    attend_to_ends(p, row, pages, warp);
    attend_to_selected(p, row, pages, shared, warp);
  } else {
    attend_densely(p, row, warp);
    wait_for_previous_kernel();
    start_next_kernel();
  }
  write_partial(p, first_head, group, reinterpret_cast<float*>(smem), warp);
}

}  // namespace clusterkv::cuda
