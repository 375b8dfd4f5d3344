// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the vllm_clusterkv project
//
// Budgeted selection, one block for a row and KV head. Weights are not negative, so
// their bits ascend with them: a histogram of tokens by a weight's leading bits says in
// which bin the budget ends. Bins above are taken whole; the clusters of that bin are
// ranked one against another, or, if they are many, told apart by their next bits.
//
// The time is that of a chain of dependent steps, so what a thread needs again stays in
// its registers: tokens, scores and weights of its clusters, kPerThread at most. A row
// with more clusters than that goes through in chunks and reads its scores several times.
#pragma once

#include "../params.h"
#include "ptx.cuh"

namespace clusterkv::cuda {

constexpr int kSelectThreads = 1024;
constexpr int kSelectWarps = kSelectThreads / 32;
constexpr int kSelectMaxGroup = 16;
constexpr int kHeadsAtOnce = 4;
constexpr int kFirstShift = 20;  // 11 leading bits: the exponent and 3 of the mantissa
constexpr int kNextBits = 10;    // then twice 10
constexpr int kBins = 1 << (31 - kFirstShift);
constexpr int kMaxCandidates = 256;  // clusters of one bin to rank by comparison

struct SelectShared {
  int bins[kBins];                // tokens by leading bits
  int max_bits[kSelectMaxGroup];  // of a head's scores, as ordered_bits
  float warp_sum[kSelectMaxGroup][kSelectWarps];
  float inverse_sum[kSelectMaxGroup];  // 1 / sum of count * exp(score - max)
  int warp_tokens[kSelectWarps];
  uint32_t candidate_key[kMaxCandidates];
  int candidate[kMaxCandidates];
  int candidate_tokens[kMaxCandidates];
  int num_candidates;
  int bin;    // in which the budget ends
  int above;  // tokens in the bins above it
  int taken;
};

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

  __device__ int tokens(int cluster) const {
    const int page = cluster >> log_clusters, i = cluster & ((1 << log_clusters) - 1);
    const int16_t* ends = cluster_ends + block_table[page] * ends_block_stride;
    const int start = i > 0 ? ends[i - 1] : page == 0 ? num_sink_tokens : 0;
    return ends[i] - start;
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

// Sum over the threads before this one, and over all of them in `total`.
__device__ __forceinline__ int block_exclusive_sum(int value, int* warp_totals, int& total) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int inclusive = warp_inclusive_sum(value);
  if (lane == 31) warp_totals[warp] = inclusive;
  __syncthreads();
  const int warps = warp_inclusive_sum(warp_totals[lane]);
  total = __shfl_sync(~0u, warps, 31);
  const int before = __shfl_sync(~0u, warps, warp > 0 ? warp - 1 : 0);
  __syncthreads();  // warp_totals may be written again
  return (warp > 0 ? before : 0) + inclusive - value;
}

// Finds the bin in which `above` plus the tokens of the bins from the top reach the
// budget. The bins hold enough.
__device__ __forceinline__ void find_bin(int num_bins, int above, int budget, SelectShared& s) {
  const int per_thread = (num_bins + kSelectThreads - 1) / kSelectThreads;
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

// The selection of one row and KV head by a block. Thread t has clusters t, t +
// kSelectThreads, ... of each chunk of kPerThread * kSelectThreads.
template <int kPerThread>
struct Selection {
  const SelectRow& row;
  SelectShared& s;
  static constexpr int kChunk = kPerThread * kSelectThreads;
  const bool one_chunk;
  int tokens[kPerThread];  // 0 beyond the row, too
  float scores[kPerThread][kHeadsAtOnce];
  uint32_t keys[kPerThread];  // bits of the weight a token; 0 for an empty cluster

  __device__ Selection(const SelectRow& row, SelectShared& s)
      : row(row), s(s), one_chunk(row.num_clusters <= kChunk) {}

  __device__ int cluster(int chunk, int i) const {
    return chunk + i * kSelectThreads + static_cast<int>(threadIdx.x);
  }

  __device__ void load_tokens(int chunk) {
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) {
      const int c = cluster(chunk, i);
      tokens[i] = c < row.num_clusters ? row.tokens(c) : 0;
    }
  }

  // Of heads beyond the group, the last one's.
  __device__ void load_scores(int chunk, int first_head) {
#pragma unroll
    for (int h = 0; h < kHeadsAtOnce; ++h) {
      const int head = min(first_head + h, row.group - 1);
      const float* own = row.scores + head * row.max_clusters + cluster(chunk, 0);
#pragma unroll
      for (int i = 0; i < kPerThread; ++i) {
        const bool valid = cluster(chunk, i) < row.num_clusters;
        scores[i][h] = valid ? load_now(own + i * kSelectThreads) : 0.0f;
      }
    }
  }

  // Turns scores into exp(score - max); 0 for an empty cluster.
  __device__ void exponentiate(int first_head) {
#pragma unroll
    for (int h = 0; h < kHeadsAtOnce; ++h) {
      const float max = from_ordered_bits(s.max_bits[min(first_head + h, row.group - 1)]);
#pragma unroll
      for (int i = 0; i < kPerThread; ++i) {
        scores[i][h] = tokens[i] > 0 ? fast_exp2((scores[i][h] - max) * kLog2e) : 0.0f;
      }
    }
  }

  // Max, then 1 / sum, of each head's softmax.
  __device__ void normalise() {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    for (int chunk = 0; chunk < row.num_clusters; chunk += kChunk) {
      if (!one_chunk) load_tokens(chunk);
      for (int first = 0; first < row.group; first += kHeadsAtOnce) {
        load_scores(chunk, first);
#pragma unroll
        for (int h = 0; h < kHeadsAtOnce; ++h) {
          float max = -INFINITY;
#pragma unroll
          for (int i = 0; i < kPerThread; ++i) {
            max = tokens[i] > 0 ? fmaxf(max, scores[i][h]) : max;
          }
          const int of_warp = __reduce_max_sync(~0u, ordered_bits(max));
          if (lane == 0 && first + h < row.group) atomicMax(&s.max_bits[first + h], of_warp);
        }
      }
    }
    __syncthreads();
    for (int first = 0; first < row.group; first += kHeadsAtOnce) {
      float sum[kHeadsAtOnce] = {};
      for (int chunk = 0; chunk < row.num_clusters; chunk += kChunk) {
        if (!one_chunk) load_tokens(chunk);
        if (!one_chunk || row.group > kHeadsAtOnce) load_scores(chunk, first);
        exponentiate(first);
#pragma unroll
        for (int h = 0; h < kHeadsAtOnce; ++h) {
#pragma unroll
          for (int i = 0; i < kPerThread; ++i) sum[h] += tokens[i] * scores[i][h];
        }
      }
#pragma unroll
      for (int h = 0; h < kHeadsAtOnce; ++h) {
        sum[h] = warp_sum(sum[h]);
        if (lane == 0 && first + h < row.group) s.warp_sum[first + h][warp] = sum[h];
      }
    }
    __syncthreads();
    for (int h = warp; h < row.group; h += kSelectWarps) {
      const float sum = warp_sum(s.warp_sum[h][lane]);
      if (lane == 0) s.inverse_sum[h] = 1.0f / sum;
    }
    __syncthreads();
  }

  // Keys of a chunk's clusters. After normalise(), which leaves a single chunk's
  // exponentials of a single set of heads.
  __device__ void find_keys(int chunk) {
    if (!one_chunk) load_tokens(chunk);
    float weights[kPerThread] = {};
    for (int first = 0; first < row.group; first += kHeadsAtOnce) {
      if (!one_chunk || row.group > kHeadsAtOnce) {
        load_scores(chunk, first);
        exponentiate(first);
      }
#pragma unroll
      for (int h = 0; h < kHeadsAtOnce; ++h) {
        const float inverse = first + h < row.group ? s.inverse_sum[first + h] : 0.0f;
#pragma unroll
        for (int i = 0; i < kPerThread; ++i) weights[i] += scores[i][h] * inverse;
      }
    }
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) {
      keys[i] = __float_as_uint(weights[i]) & 0x7fffffffu;  // NaN, too, has a bin
    }
  }

  // Calls visit(cluster, key, tokens) with all threads, for each cluster of the row; a
  // cluster beyond it has no tokens.
  template <typename Visit>
  __device__ void for_each(const Visit& visit) {
    for (int chunk = 0; chunk < row.num_clusters; chunk += kChunk) {
      if (!one_chunk) find_keys(chunk);
#pragma unroll
      for (int i = 0; i < kPerThread; ++i) visit(cluster(chunk, i), keys[i], tokens[i]);
    }
  }

  // Writes the flags; returns the tokens taken. All threads.
  __device__ int run(int budget, uint8_t* selected) {
    const int thread = threadIdx.x, lane = thread % 32;
    if (one_chunk) load_tokens(0);
    for (int i = thread; i < kBins; i += kSelectThreads) s.bins[i] = 0;
    if (thread < kSelectMaxGroup) s.max_bits[thread] = ordered_bits(-INFINITY);
    if (thread == 0) s.taken = 0;
    __syncthreads();

    wait_for_previous_kernel();  // for the scores
    start_next_kernel();
    normalise();
    if (one_chunk) find_keys(0);

    for_each([&](int, uint32_t key, int tokens) {
      if (tokens > 0) atomicAdd(&s.bins[key >> kFirstShift], tokens);
    });
    __syncthreads();
    int shift = kFirstShift;
    find_bin(kBins, 0, budget, s);
    uint32_t prefix = s.bin;  // key >> shift of the bin in which the budget ends
    while (true) {
      if (thread == 0) s.num_candidates = 0;
      __syncthreads();
      for_each([&](int c, uint32_t key, int tokens) {
        const bool found = tokens > 0 && key >> shift == prefix;
        const uint32_t lanes = __ballot_sync(~0u, found);
        if (lanes == 0) return;
        int slot = 0;
        if (lane == 0) slot = atomicAdd(&s.num_candidates, __popc(lanes));
        slot = __shfl_sync(~0u, slot, 0) + __popc(lanes & ((1u << lane) - 1));
        if (found && slot < kMaxCandidates) {
          s.candidate_key[slot] = key;
          s.candidate[slot] = c;
          s.candidate_tokens[slot] = tokens;
        }
      });
      __syncthreads();
      if (s.num_candidates <= kMaxCandidates || shift == 0) break;
      shift -= kNextBits;
      for (int i = thread; i < 1 << kNextBits; i += kSelectThreads) s.bins[i] = 0;
      __syncthreads();
      for_each([&](int, uint32_t key, int tokens) {
        if (tokens > 0 && key >> (shift + kNextBits) == prefix) {
          atomicAdd(&s.bins[key >> shift & ((1 << kNextBits) - 1)], tokens);
        }
      });
      __syncthreads();
      find_bin(1 << kNextBits, s.above, budget, s);
      prefix = prefix << kNextBits | static_cast<uint32_t>(s.bin);
    }

    // Candidates are flagged by those who rank them.
    for_each([&](int c, uint32_t key, int tokens) {
      const bool candidate = tokens > 0 && key >> shift == prefix;
      if (c < row.num_clusters && !candidate) selected[c] = tokens > 0 && key >> shift > prefix;
    });
    if (s.num_candidates > kMaxCandidates) {
      take_in_order(prefix, budget, selected);
    } else {
      rank_candidates(budget, selected);
    }
    __syncthreads();
    return s.taken;
  }

  // Eight lanes rank a candidate against the others.
  __device__ void rank_candidates(int budget, uint8_t* selected) {
    const int num_candidates = s.num_candidates, above = s.above;
    const int thread = threadIdx.x;
    for (int i = thread / 8; i < (num_candidates + 3) / 4 * 4; i += kSelectThreads / 8) {
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
        const bool taken = before < budget;
        selected[cluster] = taken;
        if (taken) atomicMax(&s.taken, before + s.candidate_tokens[i]);
      }
    }
  }

  // Takes clusters of equal weight in their order. Many equal weights are rare.
  __device__ void take_in_order(uint32_t equal_key, int budget, uint8_t* selected) {
    int above = s.above;
    for_each([&](int c, uint32_t key, int tokens) {
      const int tied = key == equal_key ? tokens : 0;
      int total;
      const int before = above + block_exclusive_sum(tied, s.warp_tokens, total);
      above += total;
      if (tied == 0) return;
      selected[c] = before < budget;
      if (before < budget) atomicMax(&s.taken, before + tied);
    });
  }
};

// Grid: [num_kv_heads, num_reqs].
__device__ __forceinline__ void select_clusters_of_row(const SelectClustersParams& p,
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
    for (int c = threadIdx.x; c < row.num_clusters; c += kSelectThreads) selected[c] = 1;
  } else if (row.num_clusters <= Selection<2>::kChunk) {
    taken = Selection<2>(row, shared).run(budget, selected);
  } else {
    taken = Selection<8>(row, shared).run(budget, selected);
  }
  if (threadIdx.x == 0) {
    p.num_attended[req * pages.num_kv_heads + kv_head] =
        static_cast<int>(seq_len) - clustered + taken;
  }
}

}  // namespace clusterkv::cuda
