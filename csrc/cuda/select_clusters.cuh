// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the vllm_clusterkv project
//
// Budgeted selection, one block for a row and KV head. Weights are not negative, so
// their bits ascend with them: a histogram of tokens by a weight's leading bits says in
// which bin the budget ends. Bins above are taken whole; the clusters of that bin are
// ranked one against another, or, if they are many, told apart by their next bits.
//
// The time is that of a chain of dependent steps, run once: loops are left rolled, since
// fetching instructions for the first time costs more than looping does.
#pragma once

#include "../params.h"
#include "ptx.cuh"

namespace clusterkv::cuda {

constexpr int kMaxSelectThreads = 1024;  // the launcher chooses
constexpr int kMaxSelectWarps = kMaxSelectThreads / 32;
constexpr int kSelectMaxGroup = 16;
constexpr int kHeadsAtOnce = 4;
constexpr int kFirstShift = 20;  // 11 leading bits: the exponent and 3 of the mantissa
constexpr int kNextBits = 10;    // then twice 10
constexpr int kBins = 1 << (31 - kFirstShift);
constexpr int kMaxCandidates = 256;             // clusters of one bin to rank by comparison
constexpr int kBytesPerCluster = 6;             // weight bits and tokens, kept in shared memory
constexpr int kMaxSelectSmemBytes = 78 * 1024;  // rows too long for it compute them again
constexpr float kLog2e = 1.4426950408889634f;

struct SelectShared {
  int bins[kBins];                // tokens by leading bits
  int max_bits[kSelectMaxGroup];  // of a head's scores, as ordered_bits
  float warp_sum[kSelectMaxGroup][kMaxSelectWarps];
  float inverse_sum[kSelectMaxGroup];  // 1 / sum of count * exp(score - max)
  int warp_tokens[kMaxSelectWarps];
  uint32_t candidate_key[kMaxCandidates];
  int candidate[kMaxCandidates];
  int candidate_tokens[kMaxCandidates];
  int num_candidates;
  int bin;    // in which the budget ends
  int above;  // tokens in the bins above it
  int taken;
};

// Tokens of a row's cluster. Not inlined: several loops call it.
__device__ __noinline__ int count_tokens(const int16_t* cluster_ends, int64_t ends_block_stride,
                                         const int32_t* block_table, int log_clusters,
                                         int num_sink_tokens, int cluster) {
  const int page = cluster >> log_clusters, i = cluster & ((1 << log_clusters) - 1);
  const int16_t* ends = cluster_ends + block_table[page] * ends_block_stride;
  const int before = ends[max(i - 1, 0)];
  return ends[i] - (i > 0 ? before : page == 0 ? num_sink_tokens : 0);
}

// One row and KV head.
struct SelectRow {
  const float* scores;  // [group, max_clusters]
  int64_t max_clusters;
  int group;
  int num_clusters;
  const int16_t* cluster_ends;  // of this KV head
  int64_t ends_block_stride;
  const int32_t* block_table;
  int log_clusters;
  int num_sink_tokens;

  __device__ __forceinline__ int tokens(int cluster) const {
    return count_tokens(cluster_ends, ends_block_stride, block_table, log_clusters, num_sink_tokens,
                        cluster);
  }

  // Of a head beyond the group, the last one's.
  __device__ float score(int head, int cluster) const {
    return scores[min(head, group - 1) * max_clusters + cluster];
  }
};

// Integers in the order of the floats whose bits they are made of, and back.
__device__ __forceinline__ int ordered_bits(float value) {
  const int bits = __float_as_int(value);
  return bits ^ (bits >> 31 & 0x7fffffff);
}

__device__ __forceinline__ float from_ordered_bits(int bits) {
  return __int_as_float(bits ^ (bits >> 31 & 0x7fffffff));
}

__device__ __forceinline__ float warp_sum(float value) {
#pragma unroll
  for (int i = 16; i > 0; i /= 2) value += __shfl_xor_sync(~0u, value, i);
  return value;
}

__device__ __forceinline__ int warp_inclusive_sum(int value) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int i = 1; i < 32; i *= 2) {
    const int other = __shfl_up_sync(~0u, value, i);
    if (lane >= i) value += other;
  }
  return value;
}

__device__ __forceinline__ int num_select_threads() { return blockDim.x; }
__device__ __forceinline__ int num_select_warps() { return num_select_threads() / 32; }

// Sum over the threads before this one, and over all of them in `total`.
__device__ __forceinline__ int block_exclusive_sum(int value, int* warp_totals, int& total) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int inclusive = warp_inclusive_sum(value);
  if (lane == 31) warp_totals[warp] = inclusive;
  __syncthreads();
  const int warps = warp_inclusive_sum(lane < num_select_warps() ? warp_totals[lane] : 0);
  total = __shfl_sync(~0u, warps, 31);
  const int before = __shfl_sync(~0u, warps, warp > 0 ? warp - 1 : 0);
  __syncthreads();  // warp_totals may be written again
  return (warp > 0 ? before : 0) + inclusive - value;
}

// Finds the bin in which `above` plus the tokens of the bins from the top reach the
// budget. The bins hold enough.
__device__ __forceinline__ void find_bin(int num_bins, int above, int budget, SelectShared& s) {
  const int per_thread = (num_bins + num_select_threads() - 1) / num_select_threads();
  const int top = num_bins - 1 - static_cast<int>(threadIdx.x) * per_thread;
  int tokens = 0;
#pragma unroll 2
  for (int i = 0; i < per_thread && top - i >= 0; ++i) tokens += s.bins[top - i];
  int total;
  int before = above + block_exclusive_sum(tokens, s.warp_tokens, total);
  if (before < budget && before + tokens >= budget) {
#pragma unroll 1
    for (int i = 0; i < per_thread && top - i >= 0; ++i) {
      if (before + s.bins[top - i] >= budget) {
        s.bin = top - i;
        s.above = before;
        break;
      }
      before += s.bins[top - i];
    }
  }
  __syncthreads();
}

// The weight a token of the cluster whose scores these are, as bits.
__device__ __noinline__ uint32_t weight_bits(const float* scores, int64_t max_clusters, int group,
                                             const int* max_bits, const float* inverse_sum) {
  float weight = 0.0f;
#pragma unroll kHeadsAtOnce
  for (int h = 0; h < group; ++h) {
    const float max = from_ordered_bits(max_bits[h]);
    weight += fast_exp2((scores[h * max_clusters] - max) * kLog2e) * inverse_sum[h];
  }
  return __float_as_uint(weight) & 0x7fffffffu;  // NaN, too, has a bin
}

// The selection of one row and KV head by a block. A thread has clusters threadIdx.x,
// threadIdx.x + blockDim.x, ...
struct Selection {
  const SelectRow& row;
  SelectShared& s;
  const bool cached;
  uint32_t* key_cache;    // [num_clusters]
  uint16_t* count_cache;  // [num_clusters]

  // Tokens of one of this thread's clusters.
  __device__ int tokens(int c) const { return cached ? count_cache[c] : row.tokens(c); }

  // The weight a token, as bits.
  __device__ __forceinline__ uint32_t key(int c) const {
    return cached ? key_cache[c]
                  : weight_bits(row.scores + c, row.max_clusters, row.group, s.max_bits,
                                s.inverse_sum);
  }

  // Calls visit(cluster, key, tokens) with all threads, until all clusters of the row
  // have been; one beyond it has no tokens.
  template <typename Visit>
  __device__ __forceinline__ void for_each(const Visit& visit) const {
#pragma unroll 1
    for (int first = 0; first < row.num_clusters; first += num_select_threads()) {
      const int c = first + static_cast<int>(threadIdx.x);
      const int count = c < row.num_clusters ? tokens(c) : 0;
      visit(c, count > 0 ? key(c) : 0, count);
    }
  }

  // Max, then 1 / sum, of each head's softmax.
  __device__ __forceinline__ void normalise() const {
    const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
#pragma unroll 1
    for (int first = 0; first < row.group; first += kHeadsAtOnce) {
      float max[kHeadsAtOnce];
#pragma unroll
      for (int h = 0; h < kHeadsAtOnce; ++h) max[h] = -INFINITY;
#pragma unroll 2
      for (int c = thread; c < row.num_clusters; c += num_select_threads()) {
        const bool empty = tokens(c) <= 0;
#pragma unroll
        for (int h = 0; h < kHeadsAtOnce; ++h) {
          max[h] = empty ? max[h] : fmaxf(max[h], row.score(first + h, c));
        }
      }
#pragma unroll
      for (int h = 0; h < kHeadsAtOnce; ++h) {
        const int of_warp = __reduce_max_sync(~0u, ordered_bits(max[h]));
        if (lane == 0 && first + h < row.group) atomicMax(&s.max_bits[first + h], of_warp);
      }
    }
    __syncthreads();
#pragma unroll 1
    for (int first = 0; first < row.group; first += kHeadsAtOnce) {
      float highest[kHeadsAtOnce], sum[kHeadsAtOnce];
#pragma unroll
      for (int h = 0; h < kHeadsAtOnce; ++h) {
        highest[h] = from_ordered_bits(s.max_bits[min(first + h, row.group - 1)]);
        sum[h] = 0.0f;
      }
#pragma unroll 2
      for (int c = thread; c < row.num_clusters; c += num_select_threads()) {
        const int count = max(tokens(c), 0);
#pragma unroll
        for (int h = 0; h < kHeadsAtOnce; ++h) {
          const float exp = fast_exp2((row.score(first + h, c) - highest[h]) * kLog2e);
          sum[h] += count > 0 ? count * exp : 0.0f;
        }
      }
#pragma unroll
      for (int h = 0; h < kHeadsAtOnce; ++h) sum[h] = warp_sum(sum[h]);
#pragma unroll
      for (int h = 0; h < kHeadsAtOnce; ++h) {
        if (lane == 0 && first + h < row.group) s.warp_sum[first + h][warp] = sum[h];
      }
    }
    __syncthreads();
    if (warp < row.group) {
#pragma unroll 1
      for (int h = warp; h < row.group; h += num_select_warps()) {
        const float sum = warp_sum(lane < num_select_warps() ? s.warp_sum[h][lane] : 0.0f);
        if (lane == 0) s.inverse_sum[h] = 1.0f / sum;
      }
    }
    __syncthreads();
  }

  // Writes the flags; returns the tokens taken. All threads.
  __device__ __forceinline__ int run(int budget, uint8_t* selected) const {
    const int thread = threadIdx.x, lane = thread % 32;
    if (cached) {
#pragma unroll 2
      for (int c = thread; c < row.num_clusters; c += num_select_threads()) {
        count_cache[c] = row.tokens(c);
      }
    }
#pragma unroll 2
    for (int i = thread; i < kBins; i += num_select_threads()) s.bins[i] = 0;
    if (thread < kSelectMaxGroup) s.max_bits[thread] = ordered_bits(-INFINITY);
    if (thread == 0) s.taken = s.num_candidates = 0;
    __syncthreads();

    wait_for_previous_kernel();  // for the scores
    start_next_kernel();
    normalise();

    if (cached) {
#pragma unroll 1
      for (int c = thread; c < row.num_clusters; c += num_select_threads()) {
        key_cache[c] =
            weight_bits(row.scores + c, row.max_clusters, row.group, s.max_bits, s.inverse_sum);
      }
    }
    int shift = kFirstShift, log_bins = 31 - kFirstShift, above = 0;
    uint32_t leading = 0;  // bits above those of the round
    uint32_t prefix;       // and with them: key >> shift of the bin in which the budget ends
#pragma unroll 1
    while (true) {
      for_each([&](int, uint32_t key, int count) {
        if (count > 0 && key >> shift >> log_bins == leading) {
          atomicAdd(&s.bins[key >> shift & ((1 << log_bins) - 1)], count);
        }
      });
      __syncthreads();
      find_bin(1 << log_bins, above, budget, s);
      prefix = (leading << log_bins) + static_cast<uint32_t>(s.bin);
      above = s.above;
      // Candidates are flagged by those who rank them.
      for_each([&](int c, uint32_t key, int count) {
        const bool found = count > 0 && key >> shift == prefix;
        if (c < row.num_clusters && !found) selected[c] = count > 0 && key >> shift > prefix;
        const uint32_t lanes = __ballot_sync(~0u, found);
        if (lanes == 0) return;
        int slot = 0;
        if (lane == 0) slot = atomicAdd(&s.num_candidates, __popc(lanes));
        slot = __shfl_sync(~0u, slot, 0) + __popc(lanes & ((1u << lane) - 1));
        if (found && slot < kMaxCandidates) {
          s.candidate_key[slot] = key;
          s.candidate[slot] = c;
          s.candidate_tokens[slot] = count;
        }
      });
      __syncthreads();
      if (s.num_candidates <= kMaxCandidates || shift == 0) break;
      shift -= kNextBits;
      log_bins = kNextBits;
      leading = prefix;
      for (int i = thread; i < 1 << log_bins; i += num_select_threads()) s.bins[i] = 0;
      __syncthreads();
      if (thread == 0) s.num_candidates = 0;
    }

    if (s.num_candidates > kMaxCandidates) {
      take_in_order(prefix, budget, selected);
    } else {
      rank_candidates(budget, selected);
    }
    __syncthreads();
    return s.taken;
  }

  // Eight lanes rank a candidate against the others.
  __device__ __forceinline__ void rank_candidates(int budget, uint8_t* selected) const {
    const int num_candidates = s.num_candidates, above = s.above, thread = threadIdx.x;
#pragma unroll 1
    for (int i = thread / 8; i < (num_candidates + 3) / 4 * 4; i += num_select_threads() / 8) {
      const bool valid = i < num_candidates;  // all of a warp's lanes take part
      const uint32_t key = valid ? s.candidate_key[i] : 0;
      const int cluster = valid ? s.candidate[i] : 0;
      int before = 0;
#pragma unroll 2
      for (int k = thread % 8; k < num_candidates; k += 8) {
        const uint32_t other = s.candidate_key[k];
        if (other > key || (other == key && s.candidate[k] < cluster)) {
          before += s.candidate_tokens[k];
        }
      }
#pragma unroll
      for (int d = 4; d > 0; d /= 2) before += __shfl_xor_sync(~0u, before, d);
      before += above;
      if (valid && thread % 8 == 0) {
        const bool taken = before < budget;
        selected[cluster] = taken;
        if (taken) atomicMax(&s.taken, before + s.candidate_tokens[i]);
      }
    }
  }

  // Takes clusters of equal weight in their order. Many equal weights are rare.
  __device__ __forceinline__ void take_in_order(uint32_t equal_key, int budget,
                                                uint8_t* selected) const {
    int above = s.above;
    for_each([&](int c, uint32_t key, int count) {
      const int tied = key == equal_key ? count : 0;
      int total;
      const int before = above + block_exclusive_sum(tied, s.warp_tokens, total);
      above += total;
      if (tied == 0) return;
      selected[c] = before < budget;
      if (before < budget) atomicMax(&s.taken, before + tied);
    });
  }
};

// Grid: [num_kv_heads, num_reqs]. key_cache: kBytesPerCluster for each of
// cached_clusters, an even number.
__device__ __forceinline__ void select_clusters_of_row(const SelectClustersParams& p,
                                                       int cached_clusters, uint32_t* key_cache,
                                                       SelectShared& shared) {
  const SemanticPages& pages = p.pages;
  const int req = blockIdx.y, kv_head = blockIdx.x;
  const int64_t seq_len = p.rows.seq_lens[req];
  const bool dense = is_dense(seq_len, p.rows.min_sparse_lens[req]);
  const int num_pages = dense ? 0 : static_cast<int>(num_indexed_pages(seq_len, pages.block_size));
  const int sinks = num_pages > 0 ? static_cast<int>(p.num_sink_tokens) : 0;
  const int clustered = num_pages * static_cast<int>(pages.block_size) - sinks;
  const int budget = static_cast<int>(p.token_budget);
  SelectRow row;
  row.group = static_cast<int>(p.rows.num_heads / pages.num_kv_heads);
  row.max_clusters = p.max_clusters;
  row.scores = p.scores + (req * p.rows.num_heads + kv_head * row.group) * p.max_clusters;
  row.num_clusters = num_pages * static_cast<int>(pages.num_clusters);
  row.cluster_ends = pages.cluster_ends + kv_head * pages.ends_head_stride;
  row.ends_block_stride = pages.ends_block_stride;
  row.block_table = p.rows.block_table + req * p.rows.block_table_stride;
  row.log_clusters = 31 - __clz(static_cast<int>(pages.num_clusters));
  row.num_sink_tokens = sinks;
  uint8_t* selected = p.selected + (req * pages.num_kv_heads + kv_head) * p.max_clusters;

  int taken = clustered;
  if (clustered <= budget) {
    wait_for_previous_kernel();
    start_next_kernel();
    for (int c = threadIdx.x; c < row.num_clusters; c += num_select_threads()) selected[c] = 1;
  } else {
    uint16_t* count_cache = reinterpret_cast<uint16_t*>(key_cache + cached_clusters);
    const bool cached = row.num_clusters <= cached_clusters;
    taken = Selection{row, shared, cached, key_cache, count_cache}.run(budget, selected);
  }
  if (threadIdx.x == 0) {
    p.num_attended[req * pages.num_kv_heads + kv_head] =
        static_cast<int>(seq_len) - clustered + taken;
  }
}

}  // namespace clusterkv::cuda
