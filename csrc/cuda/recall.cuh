// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the vllm_clusterkv project
//
// Recall of selected lines from the host, one block for a row and KV head: which lines it
// needs, which of them its hot blocks hold, and the others in place of those used least
// recently. Blocks share nothing, so there is no lock and the result is the same each time.
//
// Host memory is pinned and mapped at its own address: a warp reads a line across the bus,
// 16 bytes a lane and up to eight of these under way at once, as it would from the device.
#pragma once

#include "../params.h"
#include "block_sum.cuh"
#include "page_shape.h"
#include "ptx.cuh"

namespace clusterkv::cuda {

constexpr int kRecallThreads = 256;
constexpr int kRecallWarps = kRecallThreads / 32;
static_assert(kLinesAPage == 32, "a page's lines are the bits of a word");

// Of some clusters: the highest score, and sums of tokens * exp(score - highest).
struct Weights {
  float max = -INFINITY, all = 0.0f, taken = 0.0f;

  __device__ void add(float other_max, float other_all, float other_taken) {
    const float higher = fmaxf(max, other_max);
    if (higher == -INFINITY) return;
    const float own = fast_exp2((max - higher) * kLog2e);
    const float others = fast_exp2((other_max - higher) * kLog2e);
    all = all * own + other_all * others;
    taken = taken * own + other_taken * others;
    max = higher;
  }
};

// In dynamic shared memory, of a row with `max_blocks` pages and P positions.
struct RecallShared {
  int* warp_totals;     // of block_exclusive_sum
  Weights* weights;     // of each warp
  uint32_t* needed;     // [max_blocks] a bit a line; found ones are cleared
  int32_t* held;        // [P] line of each position, in the order of hot_order
  int32_t* missing;     // held's memory, after it: the lines to bring, in the row's order
  uint16_t* positions;  // [P] as hot_order
  uint16_t* ranked;     // [P] unused positions from the front, used ones from the back

  __device__ RecallShared(unsigned char* smem, int max_blocks, int num_positions)
      : warp_totals(reinterpret_cast<int*>(smem)),
        weights(reinterpret_cast<Weights*>(warp_totals + kRecallWarps)),
        needed(reinterpret_cast<uint32_t*>(weights + kRecallWarps)),
        held(reinterpret_cast<int32_t*>(needed + max_blocks)),
        missing(held),
        positions(reinterpret_cast<uint16_t*>(held + num_positions)),
        ranked(positions + num_positions) {}

  static size_t bytes(int64_t max_blocks, int64_t num_positions) {
    return kRecallWarps * (sizeof(int) + sizeof(Weights)) + max_blocks * sizeof(uint32_t) +
           num_positions * (sizeof(int32_t) + 2 * sizeof(uint16_t));
  }
};

// Sets the bits of lines with rows of selected clusters, of pages on the host.
__device__ __forceinline__ void mark_lines(const RecallParams& p, int req, int head, int num_pages,
                                           const int32_t* blocks, uint32_t* needed) {
  const SemanticPages& pages = p.pages;
  const int32_t* places = p.rows.index_table + req * p.rows.index_table_stride;
  const uint8_t* selected = p.selected + (req * pages.num_kv_heads + head) * p.max_clusters;
  const uint8_t* cluster_ends =
      pages.index + head * pages.index_head_stride + pages.fields.cluster_ends;
  const int log_clusters = 31 - __clz(static_cast<int>(pages.num_clusters));
  for (int i = threadIdx.x * 8; i < num_pages << log_clusters; i += kRecallThreads * 8) {
    const int page = i >> log_clusters, c = i & ((1 << log_clusters) - 1);
    const uint64_t taken = *reinterpret_cast<const uint64_t*>(selected + i);  // a byte a cluster
    if (taken == 0 || blocks[page] >= 0) continue;
    const auto* of_page =
        reinterpret_cast<const int16_t*>(cluster_ends + places[page] * pages.index_block_stride);
    alignas(16) int16_t ends[8];
    *reinterpret_cast<uint4*>(ends) = *reinterpret_cast<const uint4*>(of_page + c);
    int start = c > 0 ? of_page[c - 1] : page == 0 ? static_cast<int>(p.num_sink_tokens) : 0;
    uint32_t lines = 0;
#pragma unroll
    for (int k = 0; k < 8; ++k) {
      if (taken >> (8 * k) & 1 && ends[k] > start) {
        const int first = start / kRowsALine;
        const int last = (ends[k] - 1) / kRowsALine;
        lines |= (2u << last) - (1u << first);
      }
      start = ends[k];
    }
    if (lines != 0) atomicOr(needed + page, lines);
  }
}

// Ranks positions by their turn to be replaced; returns how many are used in this step.
__device__ __forceinline__ int rank_positions(const RecallShared& s, int num_positions) {
  int num_used = 0;
  for (int first = 0; first < num_positions; first += kRecallThreads) {
    const int i = first + static_cast<int>(threadIdx.x);
    bool used = false;
    if (i < num_positions && s.held[i] >= 0) {
      uint32_t* lines = s.needed + s.held[i] / kLinesAPage;
      const uint32_t bit = 1u << s.held[i] % kLinesAPage;
      used = (*lines & bit) != 0;
      if (used) atomicAnd(lines, ~bit);  // no other position holds it
    }
    int total;
    const int before = num_used + block_exclusive_sum<kRecallThreads>(used, s.warp_totals, total);
    num_used += total;
    if (i < num_positions)
      s.ranked[used ? num_positions - 1 - before : i - before] = s.positions[i];
  }
  return num_used;
}

// Lists the lines that are needed still, at most `room`; returns how many there are.
__device__ __forceinline__ int list_missing(const RecallShared& s, int num_pages, int room) {
  int num_missing = 0;
  for (int first = 0; first < num_pages; first += kRecallThreads) {
    const int page = first + static_cast<int>(threadIdx.x);
    uint32_t lines = page < num_pages ? s.needed[page] : 0;
    int total;
    int at = num_missing + block_exclusive_sum<kRecallThreads>(__popc(lines), s.warp_totals, total);
    num_missing += total;
    for (; lines != 0 && at < room; lines &= lines - 1) {
      s.missing[at++] = page * kLinesAPage + __ffs(static_cast<int>(lines)) - 1;
    }
  }
  return num_missing;
}

// The weight of the selected clusters among all, of the query heads together; for thread 0.
__device__ __forceinline__ float selected_mass(const RecallParams& p, const RecallShared& s,
                                               int req, int head, int num_pages) {
  const SemanticPages& pages = p.pages;
  const int group = static_cast<int>(p.rows.num_heads / pages.num_kv_heads);
  const int32_t* places = p.rows.index_table + req * p.rows.index_table_stride;
  const uint8_t* selected = p.selected + (req * pages.num_kv_heads + head) * p.max_clusters;
  const uint8_t* cluster_ends =
      pages.index + head * pages.index_head_stride + pages.fields.cluster_ends;
  const int log_clusters = 31 - __clz(static_cast<int>(pages.num_clusters));
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  float mass = 0.0f;
  for (int h = 0; h < group; ++h) {
    const float* scores = p.scores + (req * p.rows.num_heads + head * group + h) * p.max_clusters;
    Weights own;
    for (int i = threadIdx.x * 8; i < num_pages << log_clusters; i += kRecallThreads * 8) {
      const int page = i >> log_clusters, c = i & ((1 << log_clusters) - 1);
      const auto* of_page =
          reinterpret_cast<const int16_t*>(cluster_ends + places[page] * pages.index_block_stride);
      int start = c > 0 ? of_page[c - 1] : page == 0 ? static_cast<int>(p.num_sink_tokens) : 0;
      for (int k = 0; k < 8; ++k) {
        const int count = of_page[c + k] - start;
        start = of_page[c + k];
        if (count > 0) own.add(scores[i + k], count, selected[i + k] ? count : 0.0f);
      }
    }
    for (int d = 16; d > 0; d /= 2) {
      const float max = __shfl_xor_sync(~0u, own.max, d);
      const float all = __shfl_xor_sync(~0u, own.all, d);
      const float taken = __shfl_xor_sync(~0u, own.taken, d);
      own.add(max, all, taken);
    }
    if (lane == 0) s.weights[warp] = own;
    __syncthreads();
    if (threadIdx.x == 0) {
      for (int w = 1; w < kRecallWarps; ++w) {
        own.add(s.weights[w].max, s.weights[w].all, s.weights[w].taken);
      }
      mass += own.taken / own.all / group;
    }
    __syncthreads();
  }
  return mass;
}

// Grid: [num_kv_heads, num_reqs].
__global__ void __launch_bounds__(kRecallThreads) recall_kernel(const RecallParams p) {
  extern __shared__ __align__(16) unsigned char smem[];
  // At once, unlike other kernels: blocks of this one run when select_clusters has what
  // score_clusters wrote, so the next kernel, too, may read that without a wait.
  start_next_kernel();
  const SemanticPages& pages = p.pages;
  const int req = blockIdx.y, head = blockIdx.x;
  const int num_positions = static_cast<int>(p.num_positions);
  const RecallShared s(smem, static_cast<int>(p.rows.max_blocks), num_positions);
  const int64_t seq_len = __ldcg(p.rows.seq_lens + req);
  const int64_t slot = __ldcg(p.row_slots + req);
  if (slot < 0 || seq_len == 0 || is_dense(seq_len, __ldcg(p.rows.min_sparse_lens + req))) {
    wait_for_previous_kernel();
    return;
  }
  const int num_pages = static_cast<int>(num_indexed_pages(seq_len, kPageRows));
  const int32_t* blocks = p.rows.block_table + req * p.rows.block_table_stride;
  const int32_t* hot_blocks = p.hot_blocks + slot * (num_positions / kLinesAPage);
  int32_t* lines = p.hot_lines + (slot * pages.num_kv_heads + head) * num_positions;
  int32_t* order = p.hot_order + (slot * pages.num_kv_heads + head) * num_positions;
  const auto entry_of = [&](int line) {  // of a line of the row, in line_table
    const int64_t host_page = -1 - blocks[line / kLinesAPage];
    return pages.line_table + (host_page * pages.num_kv_heads + head) * kLinesAPage +
           line % kLinesAPage;
  };

  for (int i = threadIdx.x; i < num_pages; i += kRecallThreads) s.needed[i] = 0;
  for (int i = threadIdx.x; i < num_positions; i += kRecallThreads) {
    const int position = order[i];
    s.positions[i] = static_cast<uint16_t>(position);
    s.held[i] = lines[position];
  }
  __syncthreads();
  wait_for_previous_kernel();
  const uint64_t started = global_timer();
  mark_lines(p, req, head, num_pages, blocks, s.needed);
  __syncthreads();
  const int num_used = rank_positions(s, num_positions);
  const int num_unused = num_positions - num_used;
  const int num_missing = list_missing(s, num_pages, num_unused);
  const int num_victims = min(num_missing, num_unused);
  __syncthreads();

  // Victims are those used last, behind the ones that were found.
  for (int i = threadIdx.x; i < num_positions; i += kRecallThreads) {
    const int k = i + num_victims;
    order[i] = s.ranked[k < num_unused      ? k
                        : k < num_positions ? num_positions - 1 - (k - num_unused)
                                            : k - num_positions];
  }

  // In units of 16 bytes.
  constexpr int kAtOnce = 8;
  const auto* host_cache = static_cast<const uint4*>(pages.host_cache);
  auto* kv_cache = static_cast<uint4*>(pages.kv_cache);
  const int64_t row_stride = pages.kv_row_stride / 8;
  const int row_units = static_cast<int>(pages.head_size) / 4;
  const int num_units = kRowsALine * row_units;
  const int lane = threadIdx.x % 32;
  for (int i = threadIdx.x / 32; i < num_victims; i += kRecallThreads / 32) {
    const int position = s.ranked[i], line = s.missing[i];
    const int64_t host_page = -1 - blocks[line / kLinesAPage];
    const int64_t block = hot_blocks[position / kLinesAPage];
    const int at = position % kLinesAPage;
    const uint4* source = host_cache +
                          (host_page * pages.host_page_stride + head * pages.host_head_stride) / 8 +
                          line % kLinesAPage * kRowsALine * row_stride;
    uint4* target = kv_cache + (block * pages.kv_block_stride + head * pages.kv_head_stride) / 8 +
                    at * kRowsALine * row_stride;
    for (int first = 0; first < num_units; first += 32 * kAtOnce) {
      uint4 units[kAtOnce];
#pragma unroll
      for (int k = 0; k < kAtOnce; ++k) {
        const int unit = first + k * 32 + lane;
        if (unit < num_units) {
          units[k] = load_now(source + unit / row_units * row_stride + unit % row_units);
        }
      }
      if (first == 0 && lane == 0) {  // while they are under way
        const int old = lines[position];
        if (old >= 0) *entry_of(old) = -1;
        lines[position] = line;
        *entry_of(line) = static_cast<int32_t>(block * kLinesAPage + at);
      }
#pragma unroll
      for (int k = 0; k < kAtOnce; ++k) {
        const int unit = first + k * 32 + lane;
        if (unit < num_units) target[unit / row_units * row_stride + unit % row_units] = units[k];
      }
    }
  }

  const bool is_sample = seq_len % kMassEvery == 1 && num_pages > 0;
  const float mass = is_sample ? selected_mass(p, s, req, head, num_pages) : 0.0f;
  __syncthreads();
  if (threadIdx.x == 0) {
    const auto count = [&](Counter what, uint64_t number) {
      atomicAdd(reinterpret_cast<unsigned long long*>(p.counters) + what,
                static_cast<unsigned long long>(number));
    };
    count(kFound, num_used);
    count(kRecalled, num_victims);
    count(kLeft, num_missing - num_victims);
    count(kCalls, 1);
    count(kNanoseconds, global_timer() - started);
    if (is_sample) {
      count(kMass, llrintf(static_cast<float>(kMassUnit) * mass));
      count(kMassSamples, 1);
    }
  }
}

}  // namespace clusterkv::cuda
