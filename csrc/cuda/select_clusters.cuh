// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the vllm_clusterkv project
//
// Budgeted selection, one block for a row and KV head. Weights are not negative, so
// their bits ascend with them: a histogram of tokens by how far a weight's bits are below
// those of the largest that can be says in which bin the budget ends. Bins before are
// taken whole; the clusters of that bin are ranked one against another, or, if they are
// many, told apart by their next bits.
//
// The time is that of a chain of dependent steps. Softmax sums come from score_clusters'
// tile_stats, so scores are read once; what a thread needs again stays in its registers:
// tokens and weights of its clusters. A row with more clusters than the threads have
// registers for goes through in chunks, and reads its scores several times.
#pragma once

#include "../params.h"
#include "block_sum.cuh"
#include "ptx.cuh"

namespace clusterkv::cuda {

// A block of all threads that a multiprocessor holds keeps what follows from starting
// there: kManyThreads for a few rows and heads, kFewThreads for many.
constexpr int kManyThreads = 1024, kFewThreads = 512;
constexpr int kHeadsAtOnce = 4;
constexpr int kRun = 4;  // consecutive clusters: of one page, a thread's share
constexpr int kBins = 2048;
// Bins of 2^17 in weights' bits, a 64th of a power of 2, for all above 2^-32 of the
// largest; the last bin has the rest.
constexpr int kFirstShift = 17;
constexpr int kAllShift = 20;        // bins of 2^20: for every weight
constexpr int kNextBits = 10;        // at most, to tell the clusters of a bin apart
constexpr int kMaxCandidates = 256;  // clusters of one bin to rank by comparison

struct SelectShared {
  alignas(16) int bins[kBins];     // tokens, of the heaviest clusters first
  float2 sums[kManyThreads / 32];  // max and sum of count * exp(score - max), a part of a head's
  int warp_tokens[kManyThreads / 32];
  uint64_t candidate[kMaxCandidates];  // key, then cluster
  int candidate_tokens[kMaxCandidates];
  int num_candidates;
};

// One row and KV head.
struct SelectRow {
  const float* scores;  // [group, max_clusters]
  // Unsigned: group * max_clusters is below 2^32, since a row has fewer than 2^30 tokens, and no
  // more than a cluster for 4.
  uint32_t max_clusters;
  const float2* tile_stats;  // [group, max_tiles]
  int max_tiles;
  int group;
  int num_clusters;
  const uint8_t* cluster_ends;  // of this KV head, of the page at place 0
  int64_t index_block_stride;
  const int32_t* index_table;
  int log_clusters;
  int num_sink_tokens;
  int budget;
  int always_attended;
};

// Finds the bin in which `above` plus the tokens of the bins so far reach the budget,
// and sets `above` to what is before it. The bins hold enough. Every warp finds it anew:
// that costs less than to wait for one that tells the others.
template <int kThreads, int kNumBins>
__device__ __forceinline__ int find_bin(SelectShared& s, int budget, int& above) {
  constexpr int kEach = kNumBins / kThreads;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const auto load = [&](int warp, int (&bins)[kEach]) {
    int sum = 0;
#pragma unroll
    for (int i = 0; i < kEach; ++i) sum += bins[i] = s.bins[(warp * 32 + lane) * kEach + i];
    return sum;
  };
  int bins[kEach];
  const int of_warp = __reduce_add_sync(~0u, load(warp, bins));
  if (lane == 0) s.warp_tokens[warp] = of_warp;
  __syncthreads();
  int inclusive = warp_inclusive_sum(lane < kThreads / 32 ? s.warp_tokens[lane] : 0);
  const int found_warp = __ffs(__ballot_sync(~0u, above + inclusive >= budget)) - 1;
  const int warps_before = __shfl_sync(~0u, inclusive, max(found_warp - 1, 0));
  if (found_warp > 0) above += warps_before;
  const int own = load(found_warp, bins);
  inclusive = warp_inclusive_sum(own);
  const int found_lane = __ffs(__ballot_sync(~0u, above + inclusive >= budget)) - 1;
  int before = above + inclusive - own, bin = (found_warp * 32 + lane) * kEach;
#pragma unroll
  for (int i = 0; i < kEach - 1; ++i) {
    if (before + bins[i] >= budget) break;
    before += bins[i];
    ++bin;
  }
  above = __shfl_sync(~0u, before, found_lane);
  return __shfl_sync(~0u, bin, found_lane);
}

// Tokens of a run's clusters.
struct Tokens {
  uint32_t x, y;  // 16 bits each

  __device__ int operator[](int i) const {
    const uint32_t pair = i < 2 ? x : y;
    return static_cast<int>(i % 2 == 0 ? pair & 0xffff : pair >> 16);
  }
};

// The selection of one row and KV head by a block. Thread t has runs of kRun clusters:
// runs t, t + kThreads, ... of each chunk of kGroups * kThreads.
template <int kThreads, int kGroups, bool kOneChunk>
struct Selection {
  const SelectRow& row;
  SelectShared& s;
  static constexpr int kGroupClusters = kThreads * kRun;
  static constexpr int kChunk = kGroups * kGroupClusters;
  int places[kGroups];           // of the runs' pages
  Tokens tokens[kGroups];        // 0 beyond the row, too
  uint32_t keys[kGroups][kRun];  // bits of the weight a token, from the largest down
  // Of head h, in lane h * parts: max and 1 / sum of its softmax.
  int parts;
  float head_max, head_inverse;
  int largest_bits;  // of a weight: that of a cluster with every head's maximum

  __device__ Selection(const SelectRow& row, SelectShared& s) : row(row), s(s) {}

  __device__ int cluster(int chunk, int k) const {
    return chunk + k * kGroupClusters + static_cast<int>(threadIdx.x) * kRun;
  }

  __device__ void load_places(int chunk) {
#pragma unroll
    for (int k = 0; k < kGroups; ++k) {
      const int c = cluster(chunk, k);
      places[k] = c < row.num_clusters ? load_now(row.index_table + (c >> row.log_clusters)) : 0;
    }
  }

  // After load_places(). All threads: a run's first token is its neighbour's to tell.
  __device__ void load_tokens(int chunk) {
    uint2 ends[kGroups];
#pragma unroll
    for (int k = 0; k < kGroups; ++k) {
      const int c = cluster(chunk, k);
      ends[k] = uint2{0, 0};
      if (c < row.num_clusters) {
        const uint8_t* of_page = row.cluster_ends + int64_t{places[k]} * row.index_block_stride;
        ends[k] =
            *reinterpret_cast<const uint2*>(of_page + (c & ((1 << row.log_clusters) - 1)) * 2);
      }
    }
#pragma unroll
    for (int k = 0; k < kGroups; ++k) {
      const int c = cluster(chunk, k);
      const uint32_t neighbour = __shfl_up_sync(~0u, ends[k].y, 1) >> 16;
      const bool first_of_page = (c & ((1 << row.log_clusters) - 1)) == 0;
      const uint32_t start = !first_of_page ? neighbour : c == 0 ? row.num_sink_tokens : 0;
      const bool valid = c < row.num_clusters;
      // Ends ascend: the halves' differences do not borrow from each other.
      tokens[k].x = valid ? ends[k].x - (ends[k].x << 16 | start) : 0;
      tokens[k].y = valid ? ends[k].y - (ends[k].y << 16 | ends[k].x >> 16) : 0;
    }
  }

  // Max and sum of each head's softmax: a warp takes the tiles of one head, or a part
  // of them; then every warp merges the parts.
  __device__ void load_sums() {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int log_heads = row.group > 1 ? 32 - __clz(row.group - 1) : 0;
    parts = kThreads / 32 >> log_heads;
    const int head = warp & ((1 << log_heads) - 1), part = warp >> log_heads;
    const int tiles = static_cast<int>(num_tiles(row.num_clusters));
    float max = -INFINITY, sum = 0.0f;
    if (head < row.group) {
      const float2* stats = row.tile_stats + head * row.max_tiles;
      constexpr int kAtOnce = 2;
      for (int first = part * 32 + lane; first < tiles; first += parts * 32 * kAtOnce) {
        float2 own[kAtOnce];
        float higher = max;
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
          const int tile = first + i * parts * 32;
          own[i] = float2{-INFINITY, 0.0f};
          if (tile < tiles) own[i] = load_now(stats + tile);
        }
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) higher = fmaxf(higher, own[i].x);
        const float origin = higher == -INFINITY ? 0.0f : higher;
        sum *= fast_exp2((max - origin) * kLog2e);
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
          sum += own[i].y * fast_exp2((own[i].x - origin) * kLog2e);
        }
        max = higher;
      }
    }
    merge_sums(max, sum, 32);
    if (lane == 0) s.sums[head * parts + part] = float2{max, sum};
  }

  // After load_sums() and a barrier.
  __device__ void find_sums() {
    const int lane = threadIdx.x % 32;
    const float2 own = lane < kThreads / 32 ? s.sums[lane] : float2{-INFINITY, 0.0f};
    head_max = own.x;
    float sum = own.y;
    merge_sums(head_max, sum, parts);
    head_inverse = 1.0f / sum;
    float largest = 0.0f;
    for (int h = 0; h < row.group; ++h) largest += __shfl_sync(~0u, head_inverse, h * parts);
    largest_bits = __float_as_int(largest);
  }

  // Over `width` neighbouring lanes.
  __device__ static void merge_sums(float& max, float& sum, int width) {
    float all = max;
    for (int i = 1; i < width; i *= 2) all = fmaxf(all, __shfl_xor_sync(~0u, all, i));
    sum *= fast_exp2((max - (all == -INFINITY ? 0.0f : all)) * kLog2e);
    for (int i = 1; i < width; i *= 2) sum += __shfl_xor_sync(~0u, sum, i);
    max = all;
  }

  // Of heads beyond the group, the last one's.
  __device__ void load_scores(int chunk, int first_head, int k, float4 (&scores)[kHeadsAtOnce]) {
    const int c = cluster(chunk, k);
#pragma unroll
    for (int h = 0; h < kHeadsAtOnce; ++h) {
      scores[h] = float4{0.0f, 0.0f, 0.0f, 0.0f};
      if (c < row.num_clusters) {
        const uint32_t head = min(first_head + h, row.group - 1);
        scores[h] =
            load_now(reinterpret_cast<const float4*>(row.scores + (head * row.max_clusters + c)));
      }
    }
  }

  __device__ void add_weights(int first_head, const float4 (&scores)[kHeadsAtOnce],
                              float (&weights)[kRun]) const {
#pragma unroll
    for (int h = 0; h < kHeadsAtOnce; ++h) {
      const int head = first_head + h;
      const float max = __shfl_sync(~0u, head_max, head * parts);
      float inverse = __shfl_sync(~0u, head_inverse, head * parts);
      if (head >= row.group) inverse = 0.0f;
      const float of_head[kRun] = {scores[h].x, scores[h].y, scores[h].z, scores[h].w};
#pragma unroll
      for (int i = 0; i < kRun; ++i) {
        if (head < row.group) weights[i] += fast_exp2((of_head[i] - max) * kLog2e) * inverse;
      }
    }
  }

  __device__ void set_keys(int k, const float (&weights)[kRun]) {
#pragma unroll
    for (int i = 0; i < kRun; ++i) {
      // Not below 0: NaN, too, has a bin.
      const int bits = __float_as_int(weights[i]) & 0x7fffffff;
      keys[k][i] = static_cast<uint32_t>(max(largest_bits - bits, 0));
    }
  }

  // Keys and tokens of a chunk's clusters, one chunk of several.
  __device__ void find_keys(int chunk) {
    load_places(chunk);
    load_tokens(chunk);
#pragma unroll
    for (int k = 0; k < kGroups; ++k) {
      float weights[kRun] = {};
      for (int first = 0; first < row.group; first += kHeadsAtOnce) {
        float4 scores[kHeadsAtOnce];
        load_scores(chunk, first, k, scores);
        add_weights(first, scores, weights);
      }
      set_keys(k, weights);
    }
  }

  // Calls visit(k, chunk) with all threads, for each run of clusters of the row.
  template <typename Visit>
  __device__ void for_each(const Visit& visit) {
    for (int chunk = 0; chunk < (kOneChunk ? 1 : row.num_clusters); chunk += kChunk) {
      if (!kOneChunk) find_keys(chunk);
#pragma unroll
      for (int k = 0; k < kGroups; ++k) visit(cluster(chunk, k), keys[k], tokens[k]);
    }
  }

  // Writes the flags, and the number of tokens attended to. All threads.
  __device__ void run(uint8_t* selected, int32_t* num_attended) {
    const int thread = threadIdx.x, budget = row.budget;
    if (kOneChunk) {
      load_places(0);
      load_tokens(0);
    }
    for (int i = thread; i < kBins / 4; i += kThreads) {
      reinterpret_cast<int4*>(s.bins)[i] = int4{0, 0, 0, 0};
    }
    if (thread == 0) s.num_candidates = 0;

    wait_for_previous_kernel();  // for the scores
    if constexpr (kOneChunk) {
      // A set of heads' scores of two runs are all on their way before the first use, and before
      // the next kernel keeps the memory busy.
      constexpr int kAtOnce = kGroups < 2 ? kGroups : 2;
      float weights[kGroups][kRun] = {};
#pragma unroll
      for (int begin = 0; begin < kGroups; begin += kAtOnce) {
        for (int first = 0; first < row.group; first += kHeadsAtOnce) {
          float4 scores[kAtOnce][kHeadsAtOnce];
#pragma unroll
          for (int k = 0; k < kAtOnce; ++k) load_scores(0, first, begin + k, scores[k]);
          if (begin == 0 && first == 0) {
            start_next_kernel();
            load_sums();
            __syncthreads();
            find_sums();
          }
#pragma unroll
          for (int k = 0; k < kAtOnce; ++k) add_weights(first, scores[k], weights[begin + k]);
        }
      }
#pragma unroll
      for (int k = 0; k < kGroups; ++k) set_keys(k, weights[k]);
    } else {
      start_next_kernel();
      load_sums();
      __syncthreads();
      find_sums();
    }

    int shift = kFirstShift, above = 0;
    add_tokens(shift);
    // key >> shift of the bin in which the budget ends
    uint32_t prefix = find_bin<kThreads, kBins>(s, budget, above);
    if (prefix == kBins - 1) {
      clear_bins();
      shift = kAllShift;
      above = 0;
      add_tokens(shift);
      prefix = find_bin<kThreads, kBins>(s, budget, above);
    }
    while (true) {
      gather(shift, prefix, selected);
      __syncthreads();
      if (s.num_candidates <= kMaxCandidates || shift == 0) break;
      clear_bins();
      const int bits = min(kNextBits, shift);
      shift -= bits;
      for_each([&](int, const uint32_t (&key)[kRun], Tokens tokens) {
#pragma unroll
        for (int i = 0; i < kRun; ++i) {
          if (tokens[i] > 0 && key[i] >> (shift + bits) == prefix) {
            atomicAdd(&s.bins[key[i] >> shift & ((1 << bits) - 1)], tokens[i]);
          }
        }
      });
      __syncthreads();
      prefix = prefix << bits | find_bin<kThreads, 1 << kNextBits>(s, budget, above);
    }
    if (s.num_candidates > kMaxCandidates) {
      take_in_order(prefix, above, selected, num_attended);
    } else {
      rank_candidates(above, selected, num_attended);
    }
  }

  // Makes bins and candidates ready to be filled anew, once all have read them.
  __device__ void clear_bins() {
    __syncthreads();
    for (int i = threadIdx.x; i < kBins; i += kThreads) s.bins[i] = 0;
    if (threadIdx.x == 0) s.num_candidates = 0;
    __syncthreads();
  }

  // Fills the bins by key >> shift.
  __device__ void add_tokens(int shift) {
    for_each([&](int, const uint32_t (&key)[kRun], Tokens tokens) {
#pragma unroll
      for (int i = 0; i < kRun; ++i) {
        const uint32_t bin = min(key[i] >> shift, static_cast<uint32_t>(kBins - 1));
        if (tokens[i] > 0) atomicAdd(&s.bins[bin], tokens[i]);
      }
    });
    __syncthreads();
  }

  // Collects the clusters of a bin, and writes the flags of all others.
  __device__ void gather(int shift, uint32_t prefix, uint8_t* selected) {
    for_each([&](int c, const uint32_t (&key)[kRun], Tokens tokens) {
      uint32_t flags = 0;
#pragma unroll
      for (int i = 0; i < kRun; ++i) {
        if (tokens[i] > 0 && key[i] >> shift < prefix) flags |= 1u << (8 * i);
        if (tokens[i] > 0 && key[i] >> shift == prefix) {
          const int slot = atomicAdd(&s.num_candidates, 1);
          if (slot < kMaxCandidates) {
            s.candidate[slot] = uint64_t{key[i]} << 32 | static_cast<uint32_t>(c + i);
            s.candidate_tokens[slot] = tokens[i];
          }
        }
      }
      if (c < row.num_clusters) *reinterpret_cast<uint32_t*>(selected + c) = flags;
    });
  }

  // Eight lanes rank a candidate against the others.
  __device__ void rank_candidates(int above, uint8_t* selected, int32_t* num_attended) {
    const int num_candidates = s.num_candidates, thread = threadIdx.x;
    for (int i = thread / 8; i < (num_candidates + 3) / 4 * 4; i += kThreads / 8) {
      const bool valid = i < num_candidates;  // all of a warp's lanes take part
      const uint64_t own = valid ? s.candidate[i] : 0;
      int before = 0;
      for (int k = thread % 8; k < num_candidates; k += 8) {
        if (s.candidate[k] < own) before += s.candidate_tokens[k];
      }
#pragma unroll
      for (int d = 4; d > 0; d /= 2) before += __shfl_xor_sync(~0u, before, d);
      if (valid && thread % 8 == 0) {
        take(static_cast<uint32_t>(own), above + before, s.candidate_tokens[i], selected,
             num_attended);
      }
    }
  }

  // Flags a cluster with `before` tokens taken before it. One cluster ends the budget.
  __device__ void take(uint32_t cluster, int before, int tokens, uint8_t* selected,
                       int32_t* num_attended) {
    selected[cluster] = before < row.budget;
    if (before < row.budget && before + tokens >= row.budget) {
      *num_attended = row.always_attended + before + tokens;
    }
  }

  // Takes clusters of equal weight in their order. Many equal weights are rare.
  __device__ void take_in_order(uint32_t equal_key, int above, uint8_t* selected,
                                int32_t* num_attended) {
    for_each([&](int c, const uint32_t (&key)[kRun], Tokens tokens) {
      int tied = 0;
#pragma unroll
      for (int i = 0; i < kRun; ++i) tied += key[i] == equal_key ? tokens[i] : 0;
      int total;
      int before = above + block_exclusive_sum<kThreads>(tied, s.warp_tokens, total);
      above += total;
#pragma unroll
      for (int i = 0; i < kRun; ++i) {
        if (key[i] != equal_key || tokens[i] == 0) continue;
        take(c + i, before, tokens[i], selected, num_attended);
        before += tokens[i];
      }
    });
  }
};

// Grid: [num_kv_heads, num_reqs].
template <int kThreads>
__device__ __forceinline__ void select_clusters_of_row(const SelectClustersParams& p,
                                                       SelectShared& shared) {
  const SemanticPages& pages = p.pages;
  const int req = blockIdx.y, kv_head = blockIdx.x;
  const int64_t seq_len = __ldcg(p.rows.seq_lens + req);
  const bool dense = is_dense(seq_len, __ldcg(p.rows.min_sparse_lens + req));
  const int num_pages = dense ? 0 : static_cast<int>(num_indexed_pages(seq_len, pages.block_size));
  const int sinks = num_pages > 0 ? static_cast<int>(p.num_sink_tokens) : 0;
  const int clustered = num_pages * static_cast<int>(pages.block_size) - sinks;
  SelectRow row;
  row.group = static_cast<int>(p.rows.num_heads / pages.num_kv_heads);
  const int64_t first_head = req * p.rows.num_heads + kv_head * row.group;
  row.max_clusters = static_cast<uint32_t>(p.max_clusters);
  row.scores = p.scores + first_head * p.max_clusters;
  row.max_tiles = static_cast<int>(num_tiles(p.max_clusters));
  row.tile_stats = reinterpret_cast<const float2*>(p.tile_stats) + first_head * row.max_tiles;
  row.num_clusters = num_pages * static_cast<int>(pages.num_clusters);
  row.cluster_ends = pages.index + kv_head * pages.index_head_stride + pages.fields.cluster_ends;
  row.index_block_stride = pages.index_block_stride;
  row.index_table = p.rows.index_table + req * p.rows.index_table_stride;
  row.log_clusters = 31 - __clz(static_cast<int>(pages.num_clusters));
  row.num_sink_tokens = sinks;
  row.budget = static_cast<int>(p.token_budget);
  row.always_attended = static_cast<int>(seq_len) - clustered;
  uint8_t* selected = p.selected + (req * pages.num_kv_heads + kv_head) * p.max_clusters;
  int32_t* num_attended = p.num_attended + req * pages.num_kv_heads + kv_head;

  if (clustered <= row.budget) {
    wait_for_previous_kernel();
    start_next_kernel();
    for (int c = threadIdx.x; c < row.num_clusters; c += kThreads) selected[c] = 1;
    if (threadIdx.x == 0) *num_attended = static_cast<int>(seq_len);
  } else if (row.num_clusters <= Selection<kThreads, 1, true>::kChunk) {
    Selection<kThreads, 1, true>(row, shared).run(selected, num_attended);
  } else if (row.num_clusters <= Selection<kThreads, 2, true>::kChunk) {
    Selection<kThreads, 2, true>(row, shared).run(selected, num_attended);
  } else if (kThreads < kManyThreads && row.num_clusters <= Selection<kThreads, 4, true>::kChunk) {
    Selection<kThreads, 4, true>(row, shared).run(selected, num_attended);
  } else {
    Selection<kThreads, 1, false>(row, shared).run(selected, num_attended);
  }
}

}  // namespace clusterkv::cuda
