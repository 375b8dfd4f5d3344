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
//   means           the mean values of 16 clusters of a page, with logits score + log(count)
//   selected rows   any 16 rows of selected clusters
//   selected means  means of any 16 selected clusters, with their weights negative
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
// of at most kWindowPages pages, a single one as a rule.
#pragma once

#include "../params.h"
#include "merge_partials.cuh"
#include "page_shape.h"
#include "ptx.cuh"
#include "tile_attention.cuh"

namespace clusterkv::cuda {

// A selected cluster of a window, in a word: its number in the window, its first row in the
// page, and the rows of the selected clusters before.
struct Entry {
  static constexpr int kRowBits = 8, kBeforeBits = 13;
  uint32_t bits;

  __device__ Entry(uint32_t bits) : bits(bits) {}
  __device__ Entry(int cluster, int first_row, int rows_before)
      : bits(static_cast<uint32_t>(cluster) << (kRowBits + kBeforeBits) |
             static_cast<uint32_t>(first_row) << kBeforeBits | static_cast<uint32_t>(rows_before)) {
  }
  __device__ int cluster() const { return static_cast<int>(bits >> (kRowBits + kBeforeBits)); }
  __device__ int first_row() const { return static_cast<int>(bits >> kBeforeBits & 0xff); }
  __device__ int rows_before() const { return static_cast<int>(bits & ((1 << kBeforeBits) - 1)); }
};

// What the threads of a block tell each other of a window.
template <int kHeadSize>
struct SparseShared {
  using Traits = DecodeTraits<kHeadSize>;
  static constexpr int kWindowPages = Traits::kThreads / 4;  // a quarter of a page a thread
  static constexpr int kWindowClusters = kWindowPages * kMostClusters;
  static_assert(kWindowPages * kPageRows <= 1 << Entry::kBeforeBits, "rows before fit an entry");
  static_assert(kWindowClusters <= 1 << (32 - Entry::kRowBits - Entry::kBeforeBits),
                "numbers of clusters fit an entry");
  const void* pages[kWindowPages];     // the window's, of this KV head
  const int32_t* lines[kWindowPages];  // their entries in line_table, or null
  const uint8_t* indexes[kWindowPages];
  uint32_t entries[kWindowClusters];  // the selected clusters'
  int warp_totals[Traits::kWarps];
};

// The rows of one request and KV head, of which a block attends to its split.
template <typename T>
struct DecodeRow {
  const T* kv;           // of this KV head
  const T* host;         // likewise
  const int32_t* lines;  // likewise, or null
  const uint8_t* index;  // likewise
  const int32_t* block_table;
  const int32_t* index_table;
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

// What this thread needs of a tile of means: words of clusters 2 j and 2 j + 1, and of 8 + those;
// steps, scores and ends of clusters g and g + 8.
template <typename T, int kHeadSize, int kHeadTiles>
struct MeansTile {
  uint32_t words[2][kHeadSize / 32];
  T steps[2];
  float scores[kHeadTiles][4];
  int ends[2], previous_ends[2];
};

// From the codes of a page's mean values to those of this lane's pair of clusters `pair` of a
// tile of 16.
template <int kHeadSize>
__device__ __forceinline__ int pair_offset(int tile, int pair, int g) {
  return ((tile * 8 + pair) * 8 + g) * (kHeadSize / 32) * 4;
}

// Attends to the means of a split's clusters. A tile's are on their way while the one before is
// attended to, and the next one's index is looked up.
template <typename T, int kHeadSize, int kHeadTiles>
__device__ void attend_to_means(const SparseDecodeParams& p, const DecodeRow<T>& row,
                                const SplitPages& pages,
                                DecodeWarp<T, kHeadSize, kHeadTiles>& warp) {
  using Tile = MeansTile<T, kHeadSize, kHeadTiles>;
  constexpr int kStep = DecodeTraits<kHeadSize>::kWarps;
  const int num_tiles = pages.size << pages.log_clusters >> 4;
  const int first_tile = threadIdx.x / 32;
  if (first_tile >= num_tiles) return;
  const IndexFields& fields = p.pages.fields;

  // Beyond the last tile, that is looked up and loaded again: no branches.
  const auto look_up = [&](int tile) {
    return row.index_table[pages.page(min(tile, num_tiles - 1) * kTileRows)];
  };
  const auto load = [&](int any_tile, int place, Tile& loaded) {
    const int tile = min(any_tile, num_tiles - 1);
    const int first = pages.in_page(tile * kTileRows);
    const uint8_t* index = row.index + place * p.pages.index_block_stride;
    const uint8_t* codes = index + fields.value_codes;
    const T* steps = reinterpret_cast<const T*>(index + fields.value_steps);
    const int16_t* ends = reinterpret_cast<const int16_t*>(index + fields.cluster_ends);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      load_words(codes + pair_offset<kHeadSize>(first / 16, warp.j + i * 4, warp.g),
                 loaded.words[i]);
      const int c = first + warp.g + i * 8;
      loaded.steps[i] = __ldcg(steps + c);
      loaded.ends[i] = __ldcg(ends + c);
      loaded.previous_ends[i] = __ldcg(ends + max(c - 1, 0));
      const float* scores = row.scores + pages.in_row(tile * kTileRows) + warp.g + i * 8;
#pragma unroll
      for (int t = 0; t < kHeadTiles; ++t) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const int head = min(t * 8 + warp.j * 2 + h, row.group - 1);
          loaded.scores[t][i * 2 + h] = __ldcg(scores + head * p.max_clusters);
        }
      }
    }
  };

  Tile next;
  load(first_tile, look_up(first_tile), next);
  int place = look_up(first_tile + kStep);
  for (int tile = first_tile; tile < num_tiles; tile += kStep) {
    const Tile now = next;
    load(tile + kStep, place, next);
    place = look_up(tile + 2 * kStep);
    float logits[kHeadTiles][4];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int mean = tile * kTileRows + warp.g + i * 8;
      const int sinks = pages.page(mean) == 0 ? static_cast<int>(p.num_sink_tokens) : 0;
      const int count = now.ends[i] - (pages.in_page(mean) > 0 ? now.previous_ends[i] : sinks);
#pragma unroll
      for (int t = 0; t < kHeadTiles; ++t) {
        logits[t][i * 2] = mean_logit(now.scores[t][i * 2], count);
        logits[t][i * 2 + 1] = mean_logit(now.scores[t][i * 2 + 1], count);
      }
    }
    const float steps[2] = {static_cast<float>(now.steps[0]), static_cast<float>(now.steps[1])};
    warp.attend_means(now.words, steps, logits, 1.0f);
  }
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

// A quarter of a page's clusters, a thread's share of a window.
struct WindowClusters {
  static constexpr int kMostRuns = kMostClusters / 16;
  int first;              // in the row; -1 for none
  int start;              // first row in the page
  int num_runs;           // of four clusters
  int block;              // the page's, or -1 - h
  const uint8_t* index;   // the page's
  uint2 ends[kMostRuns];  // as cluster_ends

  // Those of the window that begins with the split's page `window`.
  template <typename T>
  __device__ WindowClusters(const SparseDecodeParams& p, const DecodeRow<T>& row,
                            const SplitPages& pages, int window)
      : first(-1), start(0), num_runs(pages.num_clusters / 16), block(0), index(nullptr) {
#pragma unroll
    for (uint2& run : ends) run = uint2{};
    const int thread = threadIdx.x, page_in_split = window + thread / 4;
    if (page_in_split < pages.size) {
      const int page = pages.split + page_in_split * pages.num_splits;
      const int c = thread % 4 * num_runs * 4;
      block = row.block_table[page];
      index = row.index + row.index_table[page] * p.pages.index_block_stride;
      const int16_t* of_page =
          reinterpret_cast<const int16_t*>(index + p.pages.fields.cluster_ends);
      first = (page << pages.log_clusters) + c;
      start = c > 0 ? of_page[c - 1] : page == 0 ? static_cast<int>(p.num_sink_tokens) : 0;
#pragma unroll
      for (int run = 0; run < kMostRuns; ++run) {
        if (run < num_runs) ends[run] = reinterpret_cast<const uint2*>(of_page + c)[run];
      }
    }
  }

  // Calls body(cluster of the share, first row, rows) for each cluster in `selected`, of whose
  // runs each has a byte a cluster.
  template <typename Body>
  __device__ void for_each(const uint32_t (&selected)[kMostRuns], const Body& body) const {
    int begin = start;
#pragma unroll
    for (int run = 0; run < kMostRuns; ++run) {
      if (run >= num_runs) break;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const uint32_t pair = i < 2 ? ends[run].x : ends[run].y;
        const int end = static_cast<int16_t>(i % 2 == 0 ? pair & 0xffff : pair >> 16);
        if (selected[run] >> (8 * i) & 1 && end > begin) body(run * 4 + i, begin, end - begin);
        begin = end;
      }
    }
  }
};

// Lists a window's selected clusters; returns their number * 2^16 + their rows.
template <typename T, int kHeadSize>
__device__ int list_selected(const SemanticPages& pages, const DecodeRow<T>& row,
                             const WindowClusters& clusters, int log_clusters,
                             SparseShared<kHeadSize>& shared) {
  const int thread = threadIdx.x, warp_index = thread / 32, lane = thread % 32;
  if (clusters.first >= 0 && thread % 4 == 0) {
    const int page = thread / 4;
    const int64_t host_page = -1 - int64_t{clusters.block};
    shared.indexes[page] = clusters.index;
    shared.pages[page] = clusters.block >= 0 ? row.kv + clusters.block * pages.kv_block_stride
                                             : row.host + host_page * pages.host_page_stride;
    shared.lines[page] = clusters.block >= 0 || row.lines == nullptr
                             ? nullptr
                             : row.lines + host_page * pages.num_kv_heads * kLinesAPage;
  }
  uint32_t selected[WindowClusters::kMostRuns] = {};
  if (clusters.first >= 0) {
#pragma unroll
    for (int run = 0; run < WindowClusters::kMostRuns; ++run) {
      if (run < clusters.num_runs) {
        selected[run] = reinterpret_cast<const uint32_t*>(row.selected + clusters.first)[run];
      }
    }
  }
  int own = 0;
  clusters.for_each(selected, [&](int, int, int rows) { own += 1 << 16 | rows; });
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
  const int first_cluster = thread / 4 << log_clusters | thread % 4 * clusters.num_runs * 4;
  clusters.for_each(selected, [&](int i, int first_row, int rows) {
    shared.entries[before >> 16] = Entry(first_cluster + i, first_row, before & 0xffff).bits;
    before += 1 << 16 | rows;
  });
  __syncthreads();
  return total;
}

// Takes the means of a window's selected clusters out again: in tiles of 16, dealt from the last
// warp on, since the first ones have more tiles of rows.
template <typename T, int kHeadSize, int kHeadTiles>
__device__ void take_out_means(const SparseDecodeParams& p, const DecodeRow<T>& row,
                               const SplitPages& pages, int window, int num_selected, int num_rows,
                               const SparseShared<kHeadSize>& shared,
                               DecodeWarp<T, kHeadSize, kHeadTiles>& warp) {
  constexpr int kWarps = DecodeTraits<kHeadSize>::kWarps, kSegments = kHeadSize / 32;
  const int num_tiles = (num_selected + kTileRows - 1) / kTileRows;
  for (int tile = kWarps - 1 - static_cast<int>(threadIdx.x) / 32; tile < num_tiles;
       tile += kWarps) {
    const int first = tile * kTileRows;
    // Behind the last entry, the last one again, with no weight.
    const auto entry_at = [&](int i) { return Entry(shared.entries[min(i, num_selected - 1)]); };
    uint32_t words[2][kSegments];
    float steps[2], scores[kHeadTiles][4];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      uint32_t pair[2][kSegments];
      int halves[2];  // of the words: the lower or the upper
      const auto index_of = [&](int cluster) {
        return shared.indexes[cluster >> pages.log_clusters];
      };
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        const int cluster = entry_at(first + i * 8 + warp.j * 2 + k).cluster();
        const int c = pages.in_page(cluster);
        load_words(index_of(cluster) + p.pages.fields.value_codes +
                       pair_offset<kHeadSize>(c / 16, c % 16 / 2, warp.g),
                   pair[k]);
        halves[k] = c % 2;
      }
      const uint32_t order = (halves[0] ? 0x32u : 0x10u) | (halves[1] ? 0x7600u : 0x5400u);
#pragma unroll
      for (int q = 0; q < kSegments; ++q) words[i][q] = __byte_perm(pair[0][q], pair[1][q], order);
      const int cluster = entry_at(first + i * 8 + warp.g).cluster();
      const T* of_page = reinterpret_cast<const T*>(index_of(cluster) + p.pages.fields.value_steps);
      steps[i] = static_cast<float>(__ldcg(of_page + pages.in_page(cluster)));
      const float* of_cluster = row.scores + pages.in_row((window << pages.log_clusters) + cluster);
#pragma unroll
      for (int t = 0; t < kHeadTiles; ++t) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const int head = min(t * 8 + warp.j * 2 + h, row.group - 1);
          scores[t][i * 2 + h] = __ldcg(of_cluster + head * p.max_clusters);
        }
      }
    }
    float logits[kHeadTiles][4];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int at = first + i * 8 + warp.g;
      const int end = at + 1 < num_selected ? entry_at(at + 1).rows_before() : num_rows;
      const int count = at < num_selected ? end - entry_at(at).rows_before() : 0;
#pragma unroll
      for (int t = 0; t < kHeadTiles; ++t) {
        logits[t][i * 2] = mean_logit(scores[t][i * 2], count);
        logits[t][i * 2 + 1] = mean_logit(scores[t][i * 2 + 1], count);
      }
    }
    warp.attend_means(words, steps, logits, -1.0f);
  }
}

// Attends to the selected clusters' rows, and takes their means out. Waits for the
// kernel before.
template <typename T, int kHeadSize, int kHeadTiles>
__device__ void attend_to_selected(const SparseDecodeParams& p, const DecodeRow<T>& row,
                                   const SplitPages& pages, SparseShared<kHeadSize>& shared,
                                   DecodeWarp<T, kHeadSize, kHeadTiles>& warp) {
  using Traits = DecodeTraits<kHeadSize>;
  constexpr int kStep = Traits::kWarps;
  constexpr int kWindowPages = SparseShared<kHeadSize>::kWindowPages;
  const int lane = warp.lane;

  for (int window = 0; window == 0 || window < pages.size; window += kWindowPages) {
    const WindowClusters clusters(p, row, pages, window);
    if (window == 0) {
      wait_for_previous_kernel();
      start_next_kernel();
    }
    const int total = list_selected(p.pages, row, clusters, pages.log_clusters, shared);
    const int num_selected = total >> 16, num_rows = total & 0xffff;
    const int num_tiles = (num_rows + kTileRows - 1) / kTileRows;

    const auto row_of_lane = [&](int tile) -> const T* {
      const int i = tile * kTileRows + lane;
      if (lane >= kTileRows || i >= num_rows) return nullptr;
      int entry = 0;  // the last one with rows_before <= i
      for (int step = 1 << (31 - __clz(num_selected)); step > 0; step /= 2) {
        if (entry + step < num_selected && Entry(shared.entries[entry + step]).rows_before() <= i) {
          entry += step;
        }
      }
      const Entry found(shared.entries[entry]);
      const int page_in_window = found.cluster() >> pages.log_clusters;
      const auto* page = static_cast<const T*>(shared.pages[page_in_window]);
      const int32_t* lines = shared.lines[page_in_window];
      int page_row = found.first_row() + i - found.rows_before();
      if (lines != nullptr) {
        const int hot = __ldcg(lines + page_row / kRowsALine);
        if (hot >= 0) {
          page = row.kv + int64_t{hot / kLinesAPage} * p.pages.kv_block_stride;
          page_row = hot % kLinesAPage * kRowsALine + page_row % kRowsALine;
        }
      }
      return page + page_row * p.pages.kv_row_stride;
    };
    // One tile is attended to, one is on its way, of one more the rows are looked up.
    const T* source = nullptr;  // of this lane, in the tile to fetch next
    const auto look_up = [&](int tile) {
      if (tile < num_tiles) source = row_of_lane(tile);
    };
    const auto load = [&](int tile, int stage) {
      if (tile < num_tiles) warp.load_tile(source, stage);
      cp_async_commit();
    };
    const int first_tile = threadIdx.x / 32;
    look_up(first_tile);
    load(first_tile, 0);
    look_up(first_tile + kStep);
    if (p.tail_estimate)
      take_out_means(p, row, pages, window, num_selected, num_rows, shared, warp);
    int stage = 0;
    for (int tile = first_tile; tile < num_tiles; tile += kStep) {
      load(tile + kStep, stage ^ 1);
      look_up(tile + 2 * kStep);
      warp.wait_tile();
      float logits[kHeadTiles][4];
      warp.score_tile(stage, num_rows - tile * kTileRows, p.scale, logits);
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
  row.host = static_cast<const T*>(pages.host_cache) + kv_head * pages.host_head_stride;
  row.lines = pages.line_table == nullptr ? nullptr : pages.line_table + kv_head * kLinesAPage;
  row.index = pages.index + kv_head * pages.index_head_stride;
  row.block_table = p.rows.block_table + req * p.rows.block_table_stride;
  row.index_table = p.rows.index_table + req * p.rows.index_table_stride;
  row.scores = p.scores + first_head * p.max_clusters;
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
    if (p.tail_estimate) warp.finish();
  } else {
    attend_densely(p, row, warp);
    wait_for_previous_kernel();
    start_next_kernel();
  }
  write_partial(p, first_head, group, reinterpret_cast<float*>(smem), warp);
}

}  // namespace clusterkv::cuda
