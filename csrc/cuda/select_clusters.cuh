// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the vllm_clusterkv project
//
// Budgeted selection, one block for a row and KV head. Weights are not negative, so
// their bits ascend with them: a histogram of tokens by a weight's leading bits says in
// which bin the budget ends. Bins above are taken whole; the clusters of that bin are
// ranked one against another, or, if they are many, told apart by their next bits.
#pragma once

#include "../params.h"
#include "ptx.cuh"

namespace clusterkv::cuda {

constexpr int kSelectMaxThreads = 1024;
constexpr int kSelectMaxGroup = 16;
constexpr int kFirstShift = 20;  // 11 leading bits: the exponent and 3 of the mantissa
constexpr int kNextBits = 10;    // then twice 10
constexpr int kBins = 1 << (31 - kFirstShift);
constexpr int kHeadsAtOnce = 4;
constexpr int kMaxCandidates = 256;             // clusters of one bin to rank by comparison
constexpr int kBytesPerCluster = 6;             // weight bits and tokens, kept in shared memory
constexpr int kMaxSelectSmemBytes = 80 * 1024;  // rows too long for it compute them again

constexpr float kLog2e = 1.4426950408889634f;

struct SelectShared {
  int bins[kBins];                // tokens by leading bits
  int max_bits[kSelectMaxGroup];  // of a head's scores, as ordered_bits
  float warp_sum[kSelectMaxGroup][32];
  float inverse_sum[kSelectMaxGroup];  // 1 / sum of count * exp(score - max)
  int warp_tokens[32];
  uint32_t candidate_key[kMaxCandidates];
  int candidate[kMaxCandidates];
  int candidate_tokens[kMaxCandidates];
  int num_candidates;
  int bin;    // in which the budget ends
  int above;  // tokens in the bins above it
  int taken;
};

// Integers in the order of the floats whose bits they are made of, and back.
__device__ __forceinline__ int ordered_bits(float value) {
  const int bits = __float_as_int(value);
  return bits ^ (bits >> 31 & 0x7fffffff);
}

__device__ __forceinline__ float from_ordered_bits(int bits) {
  return __int_as_float(bits ^ (bits >> 31 & 0x7fffffff));
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

  // Of a head beyond the group, the last one's.
  __device__ float score(int head, int cluster) const {
    return scores[min(head, group - 1) * max_clusters + cluster];
  }

  __device__ int tokens(int cluster) const {
    const int page = cluster >> log_clusters, i = cluster & ((1 << log_clusters) - 1);
    const int16_t* ends = cluster_ends + block_table[page] * ends_block_stride;
    const int start = i > 0 ? ends[i - 1] : page == 0 ? num_sink_tokens : 0;
    return ends[i] - start;
  }

  // Bits of the weight a token; 0 for an empty cluster.
  __device__ uint32_t key(int cluster, int tokens, const SelectShared& s) const {
    if (tokens <= 0) return 0;
    float weight = 0.0f;
#pragma unroll 4
    for (int h = 0; h < group; ++h) {
      const float max = from_ordered_bits(s.max_bits[h]);
      weight += fast_exp2((scores[h * max_clusters + cluster] - max) * kLog2e) * s.inverse_sum[h];
    }
    return __float_as_uint(weight) & 0x7fffffffu;  // NaN, too, has a bin
  }
};

// Keys and tokens of a row's clusters: kept in shared memory, or computed at each use.
template <bool kCached>
struct SelectKeys {
  const SelectRow& row;
  const SelectShared& shared;
  uint32_t* keys;          // [num_clusters]
  uint16_t* token_counts;  // [num_clusters]

  __device__ int tokens(int c) const { return kCached ? token_counts[c] : row.tokens(c); }
  __device__ uint32_t key(int c) const {
    return kCached ? keys[c] : row.key(c, row.tokens(c), shared);
  }
};

__device__ __forceinline__ float warp_sum(float value) {
#pragma unroll
  for (int i = 16; i > 0; i /= 2) value += __shfl_xor_sync(~0u, value, i);
  return value;
}

// Sum over the threads before this one, and over all of them in `total`.
__device__ __forceinline__ int block_exclusive_sum(int value, int* warp_totals, int& total) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, num_warps = blockDim.x / 32;
  int inclusive = value;
#pragma unroll
  for (int i = 1; i < 32; i *= 2) {
    const int other = __shfl_up_sync(~0u, inclusive, i);
    if (lane >= i) inclusive += other;
  }
  if (lane == 31) warp_totals[warp] = inclusive;
  __syncthreads();
  int warp_total = lane < num_warps ? warp_totals[lane] : 0;
#pragma unroll
  for (int i = 1; i < 32; i *= 2) {
    const int other = __shfl_up_sync(~0u, warp_total, i);
    if (lane >= i) warp_total += other;
  }
  total = __shfl_sync(~0u, warp_total, 31);
  const int before = __shfl_sync(~0u, warp_total, warp > 0 ? warp - 1 : 0);
  __syncthreads();  // warp_totals may be written again
  return (warp > 0 ? before : 0) + inclusive - value;
}

// Finds the bin in which `above` plus the tokens of the bins from the top reach the
// budget. The bins hold enough.
__device__ __forceinline__ void find_bin(int num_bins, int above, int budget, SelectShared& s) {
  const int per_thread = (num_bins + blockDim.x - 1) / blockDim.x;
  const int top = num_bins - 1 - static_cast<int>(threadIdx.x) * per_thread;
  int tokens = 0;
  for (int i = 0; i < per_thread && top - i >= 0; ++i) tokens += s.bins[top - i];
  int total;
  int before = above + block_exclusive_sum(tokens, s.warp_tokens, total);
  if (before < budget && before + tokens >= budget) {
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

// Takes clusters of equal weight in their order. Many equal weights are rare.
template <typename Keys>
__device__ void take_in_order(const Keys& keys, uint32_t key, int num_clusters, int above,
                              int budget, uint8_t* selected, SelectShared& s) {
  for (int first = 0; first < num_clusters; first += blockDim.x) {
    const int c = first + threadIdx.x;
    const bool tied = c < num_clusters && keys.key(c) == key;
    const int tokens = tied ? keys.tokens(c) : 0;
    int total;
    const int before = above + block_exclusive_sum(tokens, s.warp_tokens, total);
    const bool taken = tokens > 0 && before < budget;
    if (tied) selected[c] = taken;
    if (taken) atomicMax(&s.taken, before + tokens);
    above += total;
  }
  __syncthreads();
}

// Writes the flags of one row; returns the tokens taken. All threads.
template <bool kCached>
__device__ int select_row(const SelectRow& row, int budget, uint8_t* selected, uint32_t* key_cache,
                          uint16_t* token_cache, SelectShared& s) {
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  const int num_warps = blockDim.x / 32;
  const SelectKeys<kCached> keys{row, s, key_cache, token_cache};
  if (kCached) {
    for (int c = thread; c < row.num_clusters; c += blockDim.x) token_cache[c] = row.tokens(c);
  }
  for (int i = thread; i < kBins; i += blockDim.x) s.bins[i] = 0;
  if (thread < kSelectMaxGroup) s.max_bits[thread] = ordered_bits(-INFINITY);
  __syncthreads();

  wait_for_previous_kernel();  // for the scores
  start_next_kernel();

  // Max, then sum, of each head's softmax; four heads at a time have loads under way.
  for (int first = 0; first < row.group; first += kHeadsAtOnce) {
    float max[kHeadsAtOnce];
#pragma unroll
    for (int h = 0; h < kHeadsAtOnce; ++h) max[h] = -INFINITY;
#pragma unroll 2
    for (int c = thread; c < row.num_clusters; c += blockDim.x) {
      const bool empty = keys.tokens(c) <= 0;  // kCached: of this thread's own making
#pragma unroll
      for (int h = 0; h < kHeadsAtOnce; ++h) {
        const float score = row.score(first + h, c);
        max[h] = empty ? max[h] : fmaxf(max[h], score);
      }
    }
#pragma unroll
    for (int h = 0; h < kHeadsAtOnce; ++h) {
      const int of_warp = __reduce_max_sync(~0u, ordered_bits(max[h]));
      if (lane == 0 && first + h < row.group) atomicMax(&s.max_bits[first + h], of_warp);
    }
  }
  __syncthreads();
  for (int first = 0; first < row.group; first += kHeadsAtOnce) {
    float max[kHeadsAtOnce], sum[kHeadsAtOnce];
#pragma unroll
    for (int h = 0; h < kHeadsAtOnce; ++h) {
      max[h] = from_ordered_bits(s.max_bits[min(first + h, row.group - 1)]);
      sum[h] = 0.0f;
    }
#pragma unroll 2
    for (int c = thread; c < row.num_clusters; c += blockDim.x) {
      const int tokens = keys.tokens(c);
#pragma unroll
      for (int h = 0; h < kHeadsAtOnce; ++h) {
        const float exp = fast_exp2((row.score(first + h, c) - max[h]) * kLog2e);
        sum[h] += tokens > 0 ? tokens * exp : 0.0f;
      }
    }
#pragma unroll
    for (int h = 0; h < kHeadsAtOnce; ++h) {
      sum[h] = warp_sum(sum[h]);
      if (lane == 0 && first + h < row.group) s.warp_sum[first + h][warp] = sum[h];
    }
  }
  __syncthreads();
  for (int h = warp; h < row.group; h += num_warps) {
    const float sum = warp_sum(lane < num_warps ? s.warp_sum[h][lane] : 0.0f);
    if (lane == 0) s.inverse_sum[h] = 1.0f / sum;
  }
  __syncthreads();

  for (int c = thread; c < row.num_clusters; c += blockDim.x) {
    const int tokens = keys.tokens(c);
    const uint32_t key = row.key(c, tokens, s);
    if (kCached) key_cache[c] = key;
    if (tokens > 0) atomicAdd(&s.bins[key >> kFirstShift], tokens);
  }
  if (thread == 0) s.taken = 0;
  __syncthreads();

  int shift = kFirstShift;
  find_bin(kBins, 0, budget, s);
  uint32_t prefix = s.bin;  // key >> shift of the bin in which the budget ends
  while (true) {
    if (thread == 0) s.num_candidates = 0;
    __syncthreads();
    for (int first = 0; first < row.num_clusters; first += blockDim.x) {
      const int c = first + thread;
      const uint32_t key = c < row.num_clusters ? keys.key(c) : 0;
      const bool found = c < row.num_clusters && key >> shift == prefix;
      const uint32_t lanes = __ballot_sync(~0u, found);
      if (lanes == 0) continue;
      int slot = 0;
      if (lane == 0) slot = atomicAdd(&s.num_candidates, __popc(lanes));
      slot = __shfl_sync(~0u, slot, 0) + __popc(lanes & ((1u << lane) - 1));
      if (found && slot < kMaxCandidates) {
        s.candidate_key[slot] = key;
        s.candidate[slot] = c;
        s.candidate_tokens[slot] = keys.tokens(c);
      }
    }
    __syncthreads();
    if (s.num_candidates <= kMaxCandidates || shift == 0) break;
    shift -= kNextBits;
    for (int i = thread; i < 1 << kNextBits; i += blockDim.x) s.bins[i] = 0;
    __syncthreads();
    for (int c = thread; c < row.num_clusters; c += blockDim.x) {
      const uint32_t key = keys.key(c);
      if (key >> (shift + kNextBits) != prefix) continue;
      const int tokens = keys.tokens(c);
      if (tokens > 0) atomicAdd(&s.bins[(key >> shift) & ((1 << kNextBits) - 1)], tokens);
    }
    __syncthreads();
    find_bin(1 << kNextBits, s.above, budget, s);
    prefix = prefix << kNextBits | static_cast<uint32_t>(s.bin);
  }

  for (int c = thread; c < row.num_clusters; c += blockDim.x) {
    const uint32_t leading = keys.key(c) >> shift;
    if (leading != prefix) selected[c] = leading > prefix && keys.tokens(c) > 0;
  }
  const int above = s.above;
  if (s.num_candidates > kMaxCandidates) {
    take_in_order(keys, prefix, row.num_clusters, above, budget, selected, s);
  } else {
    // Eight lanes rank a candidate against the others.
    const int num_candidates = s.num_candidates;
    for (int i = thread / 8; i < (num_candidates + 3) / 4 * 4; i += blockDim.x / 8) {
      const bool valid = i < num_candidates;  // all of a warp's lanes take part
      const uint32_t key = valid ? s.candidate_key[i] : 0;
      const int cluster = valid ? s.candidate[i] : 0;
      int before = 0;
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
        const int tokens = s.candidate_tokens[i];
        const bool taken = tokens > 0 && before < budget;
        selected[cluster] = taken;
        if (taken) atomicMax(&s.taken, before + tokens);
      }
    }
    __syncthreads();
  }
  return s.taken;
}

// Grid: [num_kv_heads, num_reqs]. Dynamic shared memory: kBytesPerCluster for each of
// cached_clusters.
__global__ void __launch_bounds__(kSelectMaxThreads)
    select_clusters_kernel(const SelectClustersParams p, int cached_clusters) {
  extern __shared__ uint32_t key_cache[];
  __shared__ SelectShared shared;
  const SemanticPages& pages = p.pages;
  const int req = blockIdx.y, kv_head = blockIdx.x;
  const int64_t seq_len = p.rows.seq_lens[req];
  const bool dense = is_dense(seq_len, p.rows.min_sparse_lens[req]);
  const int num_pages = dense ? 0 : static_cast<int>(num_indexed_pages(seq_len, pages.block_size));
  const int sinks = num_pages > 0 ? static_cast<int>(p.num_sink_tokens) : 0;
  const int clustered = num_pages * static_cast<int>(pages.block_size) - sinks;
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
  if (clustered <= p.token_budget) {
    wait_for_previous_kernel();
    start_next_kernel();
    for (int c = threadIdx.x; c < row.num_clusters; c += blockDim.x) selected[c] = 1;
  } else if (row.num_clusters <= cached_clusters) {
    uint16_t* token_cache = reinterpret_cast<uint16_t*>(key_cache + cached_clusters);
    taken = select_row<true>(row, static_cast<int>(p.token_budget), selected, key_cache,
                             token_cache, shared);
  } else {
    taken = select_row<false>(row, static_cast<int>(p.token_budget), selected, nullptr, nullptr,
                              shared);
  }
  if (threadIdx.x == 0) {
    p.num_attended[req * pages.num_kv_heads + kv_head] =
        static_cast<int>(seq_len) - clustered + taken;
  }
}

}  // namespace clusterkv::cuda
