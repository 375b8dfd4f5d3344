// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the vllm_clusterkv project
//
// Decode attention over chosen rows of the KV cache, split over blocks and merged.
//
// A warp attends to tiles of 16 rows, each with its own running softmax. Keys are the
// rows and query heads the columns of a fragment (S^T = K Q^T, O^T = V^T P^T), so up to
// eight query heads fill a tensor core's tile. Tiles come to shared memory through
// cp.async, kStages deep and for each warp apart: in the loop no warp waits for another.
//
// A tile is one of
//   exact rows   any 16 rows of the row's pages: sinks, selected clusters, tail page
//   dense rows   16 consecutive tokens of a row that is attended to densely
//   means        the mean values of 16 clusters; their logits are scores + log(count),
//                or minus infinity where a cluster was selected
//
// Split s of a sparse row has pages s, s + num_splits, ... and every num_splits-th tile
// of the tail page. It takes its pages in windows of as many clusters as it has threads.
#pragma once

#include "../params.h"
#include "ptx.cuh"

namespace clusterkv::cuda {

constexpr int kTileRows = 16;
constexpr int kPageRows = 256;
constexpr float kLog2 = 1.4426950408889634f;  // logits are in base 2

template <int kHeadSize>
struct DecodeTraits {
  static constexpr int kWarps = kHeadSize > 128 ? 2 : 4;
  static constexpr int kThreads = kWarps * 32;
  static constexpr int kStages = 2;
  static constexpr int kChunks = kHeadSize / 4;  // of 16 bytes, in a row K | V
  static constexpr int kStageBytes = kTileRows * kChunks * 16;
  static constexpr int kTileBytes = kWarps * kStages * kStageBytes;
  static constexpr int kMaxWindowPages = kThreads / 8;  // a page has 8 clusters or more
};

// What the threads of a block tell each other of a window.
template <int kHeadSize>
struct SparseShared {
  using Traits = DecodeTraits<kHeadSize>;
  // Rows of the window and the tail page, slot * 256 + row. The tail page's slot is
  // kMaxWindowPages.
  uint16_t list[(Traits::kMaxWindowPages + 1) * kPageRows];
  float log_counts[Traits::kThreads];  // minus infinity: no mean to attend to
  int blocks[Traits::kMaxWindowPages];
  int warp_totals[Traits::kWarps];
};

// Attention of one warp to the rows it has seen, for 8 * kHeadTiles query heads. In
// fragments, query heads are columns: this thread's are t * 8 + 2 j and + 1.
template <int kHeadSize, int kHeadTiles>
struct WarpState {
  float max[kHeadTiles][2];
  float sum[kHeadTiles][2];                  // of this thread's rows only
  float out[kHeadTiles][kHeadSize / 16][4];  // elements g and g + 8 of 16, not normalised

  __device__ WarpState() {
#pragma unroll
    for (int t = 0; t < kHeadTiles; ++t) {
      max[t][0] = max[t][1] = -INFINITY;
      sum[t][0] = sum[t][1] = 0.0f;
#pragma unroll
      for (int d = 0; d < kHeadSize / 16; ++d) {
        out[t][d][0] = out[t][d][1] = out[t][d][2] = out[t][d][3] = 0.0f;
      }
    }
  }
};

// Where a 16-byte chunk of a tile's row is: chunks are permuted within each group of
// eight, so that ldmatrix reads eight rows from different banks.
template <int kChunks>
__device__ __forceinline__ uint32_t chunk_offset(int row, int chunk) {
  return static_cast<uint32_t>(row * kChunks + (chunk ^ (row & 7))) * 16;
}

template <typename T, int kHeadSize, int kHeadTiles>
struct DecodeWarp {
  using Traits = DecodeTraits<kHeadSize>;
  static constexpr int kSteps = kHeadSize / 16;

  WarpState<kHeadSize, kHeadTiles> state;
  uint32_t query[kHeadTiles][kSteps][2];
  uint32_t stages;  // this warp's, in shared memory
  int lane, g, j;

  __device__ void load_query(const T* heads, int64_t head_stride, int group) {
#pragma unroll
    for (int t = 0; t < kHeadTiles; ++t) {
      const int head = t * 8 + g;
      const T* row = heads + head * head_stride + j * 2;
#pragma unroll
      for (int k = 0; k < kSteps; ++k) {
        const bool valid = head < group;
        query[t][k][0] = valid ? *reinterpret_cast<const uint32_t*>(row + k * 16) : 0;
        query[t][k][1] = valid ? *reinterpret_cast<const uint32_t*>(row + k * 16 + 8) : 0;
      }
    }
  }

  // Lanes 0 to 15 give the tile's rows, null for none (zeros). kKeys: K and V of a
  // row, else V alone.
  template <bool kKeys>
  __device__ void load_tile(const T* row_of_lane, int stage) {
    constexpr int kCopied = kKeys ? Traits::kChunks : Traits::kChunks / 2;
    constexpr int kFirst = Traits::kChunks - kCopied;
    const uint32_t base = stages + stage * Traits::kStageBytes;
    const uint64_t address = reinterpret_cast<uint64_t>(row_of_lane);
#pragma unroll
    for (int i = 0; i < kTileRows * kCopied / 32; ++i) {
      const int copy = i * 32 + lane;
      const int row = copy / kCopied, chunk = copy % kCopied;
      const T* source = reinterpret_cast<const T*>(__shfl_sync(~0u, address, row));
      cp_async_16(base + chunk_offset<Traits::kChunks>(row, kFirst + chunk), source + chunk * 8,
                  source != nullptr);
    }
  }

  // Logits of a tile's keys, in base 2. Rows from num_valid on get minus infinity.
  __device__ void score_tile(int stage, int num_valid, float scale,
                             float (&logits)[kHeadTiles][4]) const {
    const uint32_t base = stages + stage * Traits::kStageBytes;
    const int row = lane % 16, half = lane / 16;
    float acc[kHeadTiles][4] = {};
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
      uint32_t keys[4];
      ldmatrix_x4(keys, base + chunk_offset<Traits::kChunks>(row, k * 2 + half));
#pragma unroll
      for (int t = 0; t < kHeadTiles; ++t) {
        mma_m16n8k16<T>(acc[t], keys, query[t][k][0], query[t][k][1]);
      }
    }
#pragma unroll
    for (int t = 0; t < kHeadTiles; ++t) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        logits[t][i] = g + i / 2 * 8 < num_valid ? acc[t][i] * (scale * kLog2) : -INFINITY;
      }
    }
  }

  // Takes a tile's values into the state.
  __device__ void attend_tile(int stage, const float (&logits)[kHeadTiles][4]) {
    uint32_t weights[kHeadTiles][2];
#pragma unroll
    for (int t = 0; t < kHeadTiles; ++t) {
      float p[4], decay[2];
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        float max = fmaxf(logits[t][c], logits[t][c + 2]);
#pragma unroll
        for (int i = 4; i < 32; i *= 2) max = fmaxf(max, __shfl_xor_sync(~0u, max, i));
        max = fmaxf(max, state.max[t][c]);
        const float origin = max == -INFINITY ? 0.0f : max;
        decay[c] = fast_exp2(state.max[t][c] - origin);
        p[c] = fast_exp2(logits[t][c] - origin);
        p[c + 2] = fast_exp2(logits[t][c + 2] - origin);
        state.sum[t][c] = state.sum[t][c] * decay[c] + p[c] + p[c + 2];
        state.max[t][c] = max;
      }
      if (__any_sync(~0u, decay[0] != 1.0f || decay[1] != 1.0f)) {
#pragma unroll
        for (int d = 0; d < kSteps; ++d) {
          state.out[t][d][0] *= decay[0];
          state.out[t][d][1] *= decay[1];
          state.out[t][d][2] *= decay[0];
          state.out[t][d][3] *= decay[1];
        }
      }
      weights[t][0] = movmatrix_trans(pack<T>(p[0], p[1]));
      weights[t][1] = movmatrix_trans(pack<T>(p[2], p[3]));
    }
    const uint32_t base = stages + stage * Traits::kStageBytes;
    const int row = lane % 8 + lane / 16 * 8, half = lane / 8 % 2;
#pragma unroll
    for (int d = 0; d < kSteps; ++d) {
      uint32_t values[4];
      ldmatrix_x4_trans(values,
                        base + chunk_offset<Traits::kChunks>(row, kHeadSize / 8 + d * 2 + half));
#pragma unroll
      for (int t = 0; t < kHeadTiles; ++t) {
        mma_m16n8k16<T>(state.out[t][d], values, weights[t][0], weights[t][1]);
      }
    }
  }
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
    cp_async_wait<1>();
    __syncwarp();
    float logits[kHeadTiles][4];
    warp.score_tile(stage, row.seq_len - tile * kTileRows, p.scale, logits);
    warp.attend_tile(stage, logits);
    __syncwarp();
    stage ^= 1;
  }
}

// A window's clusters, one a thread: what the list and the means need to know of them.
struct WindowCluster {
  int page;  // in the row; -1 if the window has no cluster for this thread
  int64_t block;
  int start;  // first row in the page
  int count;  // rows; 0 if empty
};

// What is known before the selection is.
template <typename T>
__device__ WindowCluster find_cluster(const SparseDecodeParams& p, const DecodeRow<T>& row,
                                      int first_page, int num_window_pages) {
  const int num_clusters = static_cast<int>(p.pages.num_clusters);
  const int slot = static_cast<int>(threadIdx.x) / num_clusters, c = threadIdx.x % num_clusters;
  WindowCluster found{-1, 0, 0, 0};
  if (slot < num_window_pages) {
    found.page = first_page + slot * static_cast<int>(p.num_splits);
    found.block = row.block_table[found.page];
    const int16_t* ends = row.cluster_ends + found.block * p.pages.ends_block_stride;
    const int sinks = found.page == 0 ? static_cast<int>(p.num_sink_tokens) : 0;
    found.start = c > 0 ? ends[c - 1] : sinks;
    found.count = ends[c] - found.start;
  }
  return found;
}

// Attends to sinks, selected clusters, the tail page and the means of the rest.
template <typename T, int kHeadSize, int kHeadTiles>
__device__ void attend_sparsely(const SparseDecodeParams& p, const DecodeRow<T>& row,
                                SparseShared<kHeadSize>& shared,
                                DecodeWarp<T, kHeadSize, kHeadTiles>& warp) {
  using Traits = DecodeTraits<kHeadSize>;
  const int num_splits = static_cast<int>(p.num_splits), split = blockIdx.x;
  const int num_clusters = static_cast<int>(p.pages.num_clusters);
  const int log_clusters = 31 - __clz(num_clusters);
  const int max_window_pages = Traits::kThreads >> log_clusters;
  const int own_pages = row.num_pages > split ? (row.num_pages - 1 - split) / num_splits + 1 : 0;
  const int thread = threadIdx.x, lane = warp.lane, warp_index = thread / 32;
  const int tail_rows = row.seq_len - row.num_pages * kPageRows;
  const int64_t tail_block = row.block_table[row.num_pages];

  WindowCluster next = find_cluster(p, row, split, min(max_window_pages, own_pages));
  for (int window = 0; window == 0 || window < own_pages; window += max_window_pages) {
    const WindowCluster cluster = next;
    const int first_page = split + window * num_splits;
    const int window_pages = max(0, min(max_window_pages, own_pages - window));
    const int num_means = p.tail_estimate ? window_pages << log_clusters : 0;
    const int mean_tiles = (num_means + kTileRows - 1) / kTileRows;
    const int slot = thread >> log_clusters;
    if (cluster.page >= 0 && (thread & (num_clusters - 1)) == 0) {
      shared.blocks[slot] = static_cast<int>(cluster.block);
    }
    __syncthreads();

    // Row `mean` of the means, and its index among the scores of the row.
    const auto score_index = [&](int mean) {
      return (first_page + (mean >> log_clusters) * num_splits) * num_clusters +
             (mean & (num_clusters - 1));
    };
    const auto load_means = [&](int tile, int stage) {
      const int mean = tile * kTileRows + lane;
      const T* source = nullptr;
      if (lane < kTileRows && mean < num_means) {
        source = row.mean_values +
                 shared.blocks[mean >> log_clusters] * p.pages.centroid_block_stride +
                 (mean & (num_clusters - 1)) * p.pages.centroid_row_stride;
      }
      warp.template load_tile<false>(source, stage);
    };

    // Means do not depend on the selection: they are fetched before it is there.
    if (warp_index < mean_tiles) load_means(warp_index, 0);
    cp_async_commit();
    if (window == 0) wait_for_previous_kernel();
    const bool selected = cluster.page >= 0 &&
                          row.selected[cluster.page * num_clusters + (thread & (num_clusters - 1))];
    shared.log_counts[thread] =
        selected || cluster.count == 0 ? -INFINITY : log2f(static_cast<float>(cluster.count));

    // The rows to attend to exactly, as slot * 256 + row: sinks, clusters, tail page.
    const int count = selected ? cluster.count : 0;
    int inclusive = count;
#pragma unroll
    for (int i = 1; i < 32; i *= 2) {
      const int other = __shfl_up_sync(~0u, inclusive, i);
      if (lane >= i) inclusive += other;
    }
    if (lane == 31) shared.warp_totals[warp_index] = inclusive;
    const int sinks = first_page == 0 && window_pages > 0 ? static_cast<int>(p.num_sink_tokens) : 0;
    for (int i = thread; i < sinks; i += Traits::kThreads) {
      shared.list[i] = static_cast<uint16_t>(i);
    }
    __syncthreads();
    int num_rows = sinks, position = sinks + inclusive - count;
#pragma unroll
    for (int w = 0; w < Traits::kWarps; ++w) {
      if (w < warp_index) position += shared.warp_totals[w];
      num_rows += shared.warp_totals[w];
    }
    const int code = slot * kPageRows + cluster.start;
    for (int i = 0; i < count; ++i) shared.list[position + i] = static_cast<uint16_t>(code + i);
    if (window == 0) {
      // Splits with fewer pages come first.
      for (int tile = num_splits - 1 - split; tile * kTileRows < tail_rows; tile += num_splits) {
        const int i = tile * kTileRows + thread;
        if (thread < kTileRows && i < tail_rows) {
          shared.list[num_rows + thread] =
              static_cast<uint16_t>(Traits::kMaxWindowPages * kPageRows + i);
        }
        num_rows += min(kTileRows, tail_rows - tile * kTileRows);
      }
    }
    __syncthreads();

    const auto load_rows = [&](int tile, int stage) {
      const int i = tile * kTileRows + lane;
      const T* source = nullptr;
      if (lane < kTileRows && i < num_rows) {
        const int at = shared.list[i], slot = at / kPageRows;
        const int64_t block =
            slot == Traits::kMaxWindowPages ? tail_block : int64_t{shared.blocks[slot]};
        source = row.kv + block * p.pages.kv_block_stride + at % kPageRows * p.pages.kv_row_stride;
      }
      warp.template load_tile<true>(source, stage);
    };
    // Scores of a tile of means: of rows g and g + 8, and this thread's heads.
    const auto load_scores = [&](int tile, float (&scores)[kHeadTiles][4]) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int mean = min(tile * kTileRows + warp.g + i / 2 * 8, num_means - 1);
#pragma unroll
        for (int t = 0; t < kHeadTiles; ++t) {
          const int head = min(t * 8 + warp.j * 2 + i % 2, row.group - 1);
          scores[t][i] = row.scores[head * p.max_clusters + score_index(mean)];
        }
      }
    };
    float next_scores[kHeadTiles][4];
    const auto load = [&](int tile, int stage) {
      if (tile < mean_tiles) {
        load_means(tile, stage);
        load_scores(tile, next_scores);
      } else {
        load_rows(tile - mean_tiles, stage);
      }
    };

    const int num_tiles = mean_tiles + (num_rows + kTileRows - 1) / kTileRows;
    if (warp_index < mean_tiles) {
      load_scores(warp_index, next_scores);
    } else if (warp_index < num_tiles) {
      load_rows(warp_index - mean_tiles, 0);
    }
    cp_async_commit();
    const int next_window = window + max_window_pages;
    next = find_cluster(p, row, split + next_window * num_splits,
                        max(0, min(max_window_pages, own_pages - next_window)));
    int stage = 0;
    for (int tile = warp_index; tile < num_tiles; tile += Traits::kWarps) {
      float logits[kHeadTiles][4];
      if (tile < mean_tiles) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int mean = tile * kTileRows + warp.g + i / 2 * 8;
          const float log_count = mean < num_means ? shared.log_counts[mean] : -INFINITY;
#pragma unroll
          for (int t = 0; t < kHeadTiles; ++t) {
            logits[t][i] =
                log_count == -INFINITY ? log_count : next_scores[t][i] * kLog2 + log_count;
          }
        }
      }
      if (tile + Traits::kWarps < num_tiles) load(tile + Traits::kWarps, stage ^ 1);
      cp_async_commit();
      cp_async_wait<1>();
      __syncwarp();
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

// Merges the block's warps and writes their output, max and sum to the workspace.
template <typename T, int kHeadSize, int kHeadTiles>
__device__ void write_partial(const SparseDecodeParams& p, int64_t first_head, int group,
                              float* smem, DecodeWarp<T, kHeadSize, kHeadTiles>& warp) {
  using Traits = DecodeTraits<kHeadSize>;
  constexpr int kHeads = kHeadTiles * 8, kWarps = Traits::kWarps;
  constexpr int kPitch = kHeadSize + 4;  // fewer bank conflicts
  static_assert(kWarps * kHeads * (kPitch + 2) * 4 <= Traits::kTileBytes, "fits the stages");
  float* out = smem;                               // [kWarps, kHeads, kPitch]
  float* maxima = out + kWarps * kHeads * kPitch;  // [kWarps, kHeads]
  float* sums = maxima + kWarps * kHeads;
  const int warp_index = threadIdx.x / 32;
  cp_async_wait<0>();
  __syncthreads();
#pragma unroll
  for (int t = 0; t < kHeadTiles; ++t) {
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      const int head = warp_index * kHeads + t * 8 + warp.j * 2 + c;
      float sum = warp.state.sum[t][c];
#pragma unroll
      for (int i = 4; i < 32; i *= 2) sum += __shfl_xor_sync(~0u, sum, i);
      if (warp.g == 0) {
        maxima[head] = warp.state.max[t][c];
        sums[head] = sum;
      }
#pragma unroll
      for (int d = 0; d < kHeadSize / 16; ++d) {
        out[head * kPitch + d * 16 + warp.g] = warp.state.out[t][d][c];
        out[head * kPitch + d * 16 + warp.g + 8] = warp.state.out[t][d][c + 2];
      }
    }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < group * kHeadSize; i += Traits::kThreads) {
    const int head = i / kHeadSize, d = i % kHeadSize;
    float max = -INFINITY;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) max = fmaxf(max, maxima[w * kHeads + head]);
    const float origin = max == -INFINITY ? 0.0f : max;
    float value = 0.0f, sum = 0.0f;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      const float weight = fast_exp2(maxima[w * kHeads + head] - origin);
      value += weight * out[(w * kHeads + head) * kPitch + d];
      sum += weight * sums[w * kHeads + head];
    }
    float* partial =
        p.workspace + ((first_head + head) * p.num_splits + blockIdx.x) * (kHeadSize + 2);
    partial[d] = value;
    if (d == 0) {
      partial[kHeadSize] = max;
      partial[kHeadSize + 1] = sum;
    }
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
  if (dense || row.seq_len == 0) wait_for_previous_kernel();
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

// Merges the splits of one row and query head, 32 at a time. Grid: [num_heads, num_reqs].
template <typename T, int kHeadSize>
__global__ void __launch_bounds__(kHeadSize) merge_splits_kernel(const SparseDecodeParams p) {
  const int req = blockIdx.y, head = blockIdx.x, lane = threadIdx.x % 32;
  const int num_splits = static_cast<int>(p.num_splits);
  const float* partials =
      p.workspace + (req * p.rows.num_heads + head) * p.num_splits * (kHeadSize + 2);
  wait_for_previous_kernel();
  start_next_kernel();
  float max = -INFINITY, value = 0.0f, sum = 0.0f;
  for (int first = 0; first < num_splits; first += 32) {
    const float* own = partials + (first + lane) * (kHeadSize + 2);
    const bool valid = first + lane < num_splits;
    const float own_max = valid ? own[kHeadSize] : -INFINITY;
    const float own_sum = valid ? own[kHeadSize + 1] : 0.0f;
    float values[32];
#pragma unroll
    for (int s = 0; s < 32; ++s) {
      const int split = min(first + s, num_splits - 1);
      values[s] = load_now(partials + split * (kHeadSize + 2) + threadIdx.x);
    }
    float higher = own_max;
#pragma unroll
    for (int i = 16; i > 0; i /= 2) higher = fmaxf(higher, __shfl_xor_sync(~0u, higher, i));
    higher = fmaxf(higher, max);
    const float origin = higher == -INFINITY ? 0.0f : higher;
    const float decay = fast_exp2(max - origin), weight = fast_exp2(own_max - origin);
    value *= decay;
    sum *= decay;
    max = higher;
    float weighted = weight * own_sum;
#pragma unroll
    for (int i = 16; i > 0; i /= 2) weighted += __shfl_xor_sync(~0u, weighted, i);
    sum += weighted;
#pragma unroll
    for (int s = 0; s < 32; ++s) value += __shfl_sync(~0u, weight, s) * values[s];
  }
  T* output = static_cast<T*>(p.output) + req * p.output_row_stride + head * p.output_head_stride;
  output[threadIdx.x] = from_float<T>(sum == 0.0f ? 0.0f : value / sum);
}

}  // namespace clusterkv::cuda
