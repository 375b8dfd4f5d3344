// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the vllm_clusterkv project
//
// Spherical k-means of a page's keys, of one KV head, by a thread block of 256. The keys
// are in shared memory (64 KB at head size 128). The heavy steps are tensor core products:
//
//   seed:   similarity [256] = keys [256 x D] * the key chosen last, M - 1 times;
//           32 rows a warp, then one a lane, and the least of all by one barrier
//   assign: similarity [256 x M] = keys [256 x D] * means^T [D x M]; 32 rows a warp
//   update: sums [M x D] = membership [M x 256] * keys [256 x D]; D / 8 columns a warp
//
// Keys are exact in 16 bits. Means are the sum of two 16-bit numbers, which leaves
// 16 of fp32's 24 bits (22 with fp16), and are divided by their norms afterwards.
// Rounds have two barriers: labels are written before the first and read after it,
// means the other way round.
#pragma once

#include <cstdint>
#include <type_traits>

#include "page_shape.h"
#include "ptx.cuh"

namespace clusterkv::cuda {

// A block has a thread for each of a page's rows.
constexpr int kPageWarps = kPageRows / 32;
constexpr unsigned kAllLanes = 0xffffffffu;

// Rows of the lanes whose label is `target`, as a bit mask.
template <int kNumClusters>
__device__ __forceinline__ uint32_t lanes_with(int label, bool has_label, int target) {
  uint32_t lanes = __ballot_sync(kAllLanes, has_label);
#pragma unroll
  for (int bit = 1; bit < kNumClusters; bit *= 2) {
    const uint32_t set = __ballot_sync(kAllLanes, label & bit);
    lanes &= target & bit ? set : ~set;
  }
  return lanes;
}

struct Candidate {
  float similarity;
  int cluster;
};

__device__ __forceinline__ Candidate better(Candidate a, Candidate b) {
  const bool is_b =
      b.similarity > a.similarity || (b.similarity == a.similarity && b.cluster < a.cluster);
  return is_b ? b : a;
}

// Gives `mine` the better of it and what the lane `distance` away sends.
__device__ __forceinline__ Candidate exchange(Candidate mine, Candidate sent, int distance) {
  const Candidate received = {__shfl_xor_sync(kAllLanes, sent.similarity, distance),
                              __shfl_xor_sync(kAllLanes, sent.cluster, distance)};
  return better(mine, received);
}

// One thread block's work. `half` is 0 for keys and 1 for values; a slab is as many
// columns of them as shared memory holds at once.
template <typename T, int kHeadSize, int kNumClusters>
class PageKMeans {
 protected:
  static_assert(kHeadSize % 16 == 0 && kHeadSize <= 256);
  static_assert(kNumClusters == 16 || kNumClusters == 32 || kNumClusters == 64);
  static constexpr int kNumSlabs = kHeadSize > 128 ? 2 : 1;
  static constexpr int kCols = kHeadSize / kNumSlabs;
  static constexpr int kChunks = kCols / 8;  // of 16 bytes, in a row
  static_assert(kCols % 16 == 0);

  static constexpr int kMeanTiles = kNumClusters / 8;
  static constexpr int kClusterTiles = kNumClusters / 16;
  static constexpr int kColTiles = (kChunks + kPageWarps - 1) / kPageWarps;  // of 8, a warp
  static_assert(kChunks % kColTiles == 0, "a warp has all its columns or none");

  // The fp16 comparison that makes the membership matrix yields 0x3c00 for true: one
  // in fp16, and 1 / 128 in bf16.
  static constexpr float kInverseOfTrue = std::is_same_v<T, __half> ? 1.0f : 128.0f;

 public:
  struct SortedPage {
    // Squared distances of keys from their means: of cluster c, those that have their places
    // in the 32 of warp w, at c + w, which no other such pair with keys has.
    float squares[kNumClusters + kPageWarps];
    uint16_t ends[kNumClusters];  // place behind a cluster's last
    uint8_t order[kPageRows];     // row that goes to each place
  };

  struct Shared {
    uint4 rows[kPageRows * kChunks];
    uint4 means[kNumSlabs][2 * kNumClusters * kChunks];  // rounded, then what rounding left
    __half labels[kPageRows];                            // at label_slot(row); -1 for sinks
    uint8_t counts[kNumClusters][kPageWarps];            // rows, a warp's each
    union {
      float squares[kNumClusters][kPageWarps];  // of the means, a part of columns each
      SortedPage sorted;                        // when clusters are final
    };
  };

  __device__ PageKMeans(Shared& shared, T* rows, int64_t row_stride, int num_sinks)
      : s_(shared),
        rows_(rows),
        row_stride_(row_stride),
        num_sinks_(num_sinks),
        warp_(threadIdx.x / 32),
        lane_(threadIdx.x % 32),
        group_(lane_ / 4),
        quad_(lane_ % 4) {}

  __device__ void cluster(int64_t num_iters) {
    seed();
    __syncthreads();
    // A round that changes no label would repeat itself.
    while (__syncthreads_or(assign()) && --num_iters > 0) {
      update();
      __syncthreads();
    }
  }

 protected:
  // Rows begin in different banks: the 8 rows of a matrix have their chunk in 8
  // different sixteenths of the 128 bytes that shared memory reads at once.
  static __device__ __forceinline__ int chunk_at(int row, int chunk) {
    constexpr int kBits = kChunks % 8 == 0 ? 3 : kChunks % 4 == 0 ? 2 : kChunks % 2 == 0 ? 1 : 0;
    return row * kChunks + (chunk ^ ((row >> (3 - kBits)) & ((1 << kBits) - 1)));
  }

  // Labels lie so that the 8 of 32 rows that a lane needs for `update` are adjacent.
  static __device__ __forceinline__ int label_slot(int row) {
    return (row & ~31) | ((row & 6) << 2) | ((row & 24) >> 2) | (row & 1);
  }

  static __device__ __forceinline__ uint32_t address(const uint4& chunk) {
    return smem_address(&chunk);
  }

  // Keeps the compiler from computing addresses once for all rounds: they are cheap,
  // and so many that they would take the registers of a third thread block.
  static __device__ __forceinline__ int recomputed(int lane) {
    asm volatile("" : "+r"(lane));
    return lane;
  }

  // Brings a slab of keys or values into shared memory, if it is not there.
  __device__ __forceinline__ void hold(int half, int slab) {
    const int wanted = half * kNumSlabs + slab;
    if (held_ == wanted) return;
    __syncthreads();  // all are done with the slab held
    const T* source = rows_ + half * kHeadSize + slab * kCols;
#pragma unroll 4
    for (int i = 0; i < kChunks; ++i) {
      const int index = i * kPageRows + threadIdx.x;
      const int row = index / kChunks, chunk = index % kChunks;
      cp_async_16(address(s_.rows[chunk_at(row, chunk)]), source + row * row_stride_ + chunk * 8,
                  true);
    }
    cp_async_commit();
    cp_async_wait<0>();
    __syncthreads();
    held_ = wanted;
  }

  // Calls body(slab) for all slabs of the keys, first for the one in shared memory.
  template <typename Body>
  __device__ __forceinline__ void for_each_slab(const Body& body) {
    const int first = kNumSlabs > 1 ? held_ : 0;
#pragma unroll 1
    for (int i = 0; i < kNumSlabs; ++i) {
      const int slab = first ^ i;
      if constexpr (kNumSlabs > 1) hold(0, slab);
      body(slab);
    }
  }

  // Keys far from each other start the clusters: the first, then always the one whose
  // largest cosine to those chosen is least, ties to the lowest row. Similarities to the
  // key chosen last are a tensor core product whose 8 columns are all that key.
  __device__ void seed() {
    // A lane's row among those of which it gets products, as assign leaves it with.
    const int own_row = 32 * warp_ + 16 * (quad_ / 2) + 8 * (quad_ % 2) + group_;
    // Until the means are there, their room has the inverse norms of the keys.
    float* const inverses = reinterpret_cast<float*>(s_.means[0]);
    static_assert(sizeof(s_.means[0]) >= kPageRows * sizeof(float));
    uint8_t* const seeds = first_rows();
    // Of each warp the least `nearest`, as an ordered integer, and its row; in turns.
    uint2* const least = reinterpret_cast<uint2*>(s_.squares);
    static_assert(sizeof(s_.squares) >= 2 * kPageWarps * sizeof(uint2));

    float square = 0.0f;
#pragma unroll 1
    for (int slab = 0; slab < kNumSlabs; ++slab) {
      hold(0, slab);
#pragma unroll 4
      for (int chunk = 0; chunk < kChunks; ++chunk) {
        square += square_of(s_.rows[chunk_at(own_row, chunk)]);
      }
    }
    const float inverse = square > 0.0f ? rsqrtf(square) : 0.0f;
    inverses[own_row] = inverse;
    __syncthreads();

    int chosen = num_sinks_;
    float nearest = -INFINITY;
#pragma unroll 1
    for (int c = 1; c < kNumClusters; ++c) {
      if (threadIdx.x == 0) seeds[c - 1] = static_cast<uint8_t>(chosen);
      const float cosine = dot_with(chosen) * inverse * inverses[chosen];
      nearest = fmaxf(nearest, cosine);  // of a number and none, the number
      // Keys without a direction (zero, not finite) are not chosen.
      const bool is_open = own_row >= num_sinks_ && inverse > 0.0f;
      uint32_t least_here = is_open ? ordered(nearest) : UINT32_MAX;
      uint32_t row_here = own_row;
      reduce_least(least_here, row_here);
      if (lane_ == 0) least[c % 2 * kPageWarps + warp_] = make_uint2(least_here, row_here);
      __syncthreads();
      const uint2 of_warp = least[c % 2 * kPageWarps + lane_ % kPageWarps];
      uint32_t least_of_all = of_warp.x, row_of_all = of_warp.y;
      reduce_least(least_of_all, row_of_all);
      if (least_of_all != UINT32_MAX) chosen = row_of_all;
    }
    if (threadIdx.x == 0) seeds[kNumClusters - 1] = static_cast<uint8_t>(chosen);
    __syncthreads();
    start_at_first_rows();
  }

  static __device__ __forceinline__ float square_of(const uint4& chunk) {
    float square = 0.0f;
    for (const uint32_t both : {chunk.x, chunk.y, chunk.z, chunk.w}) {
      const float2 x = unpack<T>(both);
      square += x.x * x.x + x.y * x.y;
    }
    return square;
  }

  // The product of this lane's row (of seed) with row `chosen`.
  __device__ __forceinline__ float dot_with(int chosen) {
    float dots[2][4] = {};
    const int lane = recomputed(lane_);
    for_each_slab([&](int slab) {
#pragma unroll
      for (int k = 0; k < kChunks; k += 2) {
        const uint32_t* low = words(s_.rows[chunk_at(chosen, k)]);
        const uint32_t* high = words(s_.rows[chunk_at(chosen, k + 1)]);
        const uint32_t columns[2] = {low[quad_], high[quad_]};
#pragma unroll
        for (int t = 0; t < 2; ++t) {
          uint32_t keys[4];
          const int row = 32 * warp_ + 16 * t + lane % 16;
          ldmatrix_x4(keys, address(s_.rows[chunk_at(row, k + lane / 16)]));
          mma_m16n8k16<T>(dots[t], keys, columns[0], columns[1]);
        }
      }
    });
    const float upper = quad_ % 2 ? dots[1][2] : dots[1][0];
    const float lower = quad_ % 2 ? dots[0][2] : dots[0][0];
    return quad_ / 2 ? upper : lower;
  }

  static __device__ __forceinline__ const uint32_t* words(const uint4& chunk) {
    return reinterpret_cast<const uint32_t*>(&chunk);
  }

  // An integer in the same order.
  static __device__ __forceinline__ uint32_t ordered(float x) {
    const uint32_t bits = __float_as_uint(x);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
  }

  // The warp's least value, and the lowest row that has it.
  static __device__ __forceinline__ void reduce_least(uint32_t& value, uint32_t& row) {
    const uint32_t least = __reduce_min_sync(kAllLanes, value);
    row = __reduce_min_sync(kAllLanes, value == least ? row : UINT32_MAX);
    value = least;
  }

  // The rows that clusters start at; until there are labels, their room has them.
  __device__ __forceinline__ uint8_t* first_rows() {
    static_assert(sizeof(s_.labels) >= kNumClusters);
    return reinterpret_cast<uint8_t*>(s_.labels);
  }

  __device__ __forceinline__ void start_at_first_rows() {
    const int first = kNumSlabs > 1 ? held_ : 0;
#pragma unroll 1
    for (int i = 0; i < kNumSlabs; ++i) {
      const int slab = first ^ i;
      hold(0, slab);
      for (int c = warp_; c < kNumClusters; c += kPageWarps) {
        float square = 0.0f;
        if (lane_ < kChunks) {
          const uint4 chunk = s_.rows[chunk_at(first_rows()[c], lane_)];
          s_.means[slab][chunk_at(c, lane_)] = chunk;
          s_.means[slab][chunk_at(kNumClusters + c, lane_)] = make_uint4(0, 0, 0, 0);
          square = square_of(chunk);
        }
#pragma unroll
        for (int distance = 16; distance > 0; distance /= 2) {
          square += __shfl_xor_sync(kAllLanes, square, distance);
        }
        if (lane_ < kPageWarps && (i == 0 || lane_ == slab)) {
          s_.squares[c][lane_] = lane_ == slab ? square : 0.0f;
        }
      }
    }
  }

  __device__ __forceinline__ float inverse_norm(int cluster) const {
    const float4* parts = reinterpret_cast<const float4*>(s_.squares[cluster]);
    const float4 a = parts[0], b = parts[1];
    const float square = ((a.x + a.y) + (a.z + a.w)) + ((b.x + b.y) + (b.z + b.w));
    return square > 0.0f ? rsqrtf(square) : 0.0f;
  }

  // Gives each row the cluster of the largest cosine (the key's own norm does not
  // matter), and counts. Returns whether this thread's row changed its label. A
  // similarity that is not a number never wins, so that labels are always valid.
  __device__ bool assign() {
    // The products with both parts of a mean have sums of their own, for shorter chains, where
    // registers allow.
    constexpr int kSums = kNumClusters > 32 ? kMeanTiles : 2 * kMeanTiles;
    float dots[2][kSums][4] = {};
    const int lane = recomputed(lane_);
    for_each_slab([&](int slab) {
#pragma unroll(kNumClusters > 32 ? 1 : kNumClusters > 16 ? 2 : kChunks / 2)
      for (int k = 0; k < kChunks; k += 2) {
        uint32_t keys[2][4];
#pragma unroll
        for (int t = 0; t < 2; ++t) {
          const int row = 32 * warp_ + 16 * t + lane % 16;
          ldmatrix_x4(keys[t], address(s_.rows[chunk_at(row, k + lane / 16)]));
        }
#pragma unroll
        for (int pair = 0; pair < kMeanTiles; ++pair) {
          uint32_t means[4];
          const int row = 16 * pair + lane / 16 * 8 + lane % 8;
          ldmatrix_x4(means, address(s_.means[slab][chunk_at(row, k + lane / 8 % 2)]));
#pragma unroll
          for (int t = 0; t < 2; ++t) {
            mma_m16n8k16<T>(dots[t][2 * pair % kSums], keys[t], means[0], means[1]);
            mma_m16n8k16<T>(dots[t][(2 * pair + 1) % kSums], keys[t], means[2], means[3]);
          }
        }
      }
    });
    // A lane has 4 rows (16 t + 8 u + group) and every cluster 8 j + 2 quad + e.
    Candidate best[2][2];
#pragma unroll
    for (int t = 0; t < 2; ++t) {
      best[t][0] = best[t][1] = {-INFINITY, 2 * quad_};
    }
#pragma unroll
    for (int j = 0; j < kMeanTiles; ++j) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int cluster = 8 * j + 2 * quad_ + e;
        const float inverse = inverse_norm(cluster);
#pragma unroll
        for (int t = 0; t < 2; ++t) {
#pragma unroll
          for (int u = 0; u < 2; ++u) {
            float dot = dots[t][j][2 * u + e];
            if constexpr (kSums > kMeanTiles) dot += dots[t][j + kMeanTiles][2 * u + e];
            const float similarity = dot * inverse;
            if (similarity > best[t][u].similarity) best[t][u] = {similarity, cluster};
          }
        }
      }
    }
    // The quad's lanes send each other what they have of the other's row; each is
    // left with one row, of t = quad / 2 and u = quad % 2.
    const bool upper = quad_ & 2, odd = quad_ & 1;
    Candidate kept[2];
#pragma unroll
    for (int u = 0; u < 2; ++u) {
      kept[u] = exchange(upper ? best[1][u] : best[0][u], upper ? best[0][u] : best[1][u], 2);
    }
    const int label = exchange(odd ? kept[1] : kept[0], odd ? kept[0] : kept[1], 1).cluster;

    const int row = 32 * warp_ + 16 * (quad_ / 2) + 8 * (quad_ % 2) + group_;
    const bool has_label = row >= num_sinks_;
    s_.labels[label_slot(row)] = __int2half_rn(has_label ? label : -1);
#pragma unroll
    for (int cluster = lane_; cluster < lane_ + kNumClusters; cluster += 32) {
      const uint32_t members = lanes_with<kNumClusters>(label, has_label, cluster);
      if (cluster < kNumClusters) s_.counts[cluster][warp_] = __popc(members);
    }
    const bool changed = has_label && label != label_;
    label_ = label;
    return changed;
  }

  __device__ __forceinline__ int count(int cluster) const {
    const uint2 parts = *reinterpret_cast<const uint2*>(s_.counts[cluster]);
    return __dp4a(parts.x, 0x01010101u, __dp4a(parts.y, 0x01010101u, 0u));
  }

  // Whether this warp has columns.
  __device__ __forceinline__ bool has_columns() const { return warp_ * kColTiles < kChunks; }

  // Sums of the slab's rows by cluster, times 1 / kInverseOfTrue: of cluster
  // 16 ct + 8 h + group, column 8 tile + 2 quad + e, at [ct][tile][2 h + e].
  __device__ __forceinline__ void sum_clusters(float (&sums)[kClusterTiles][kColTiles][4]) const {
    const int lane = recomputed(lane_);
    // Two sums of half the rows make shorter chains of products, where registers allow.
    constexpr int kParts = kClusterTiles > 2 ? 1 : 2;
    float parts[kParts][kClusterTiles][kColTiles][4] = {};
#pragma unroll 2
    for (int begin = 0; begin < kPageRows; begin += 32) {
      // Labels of rows 2 quad, 2 quad + 1 of each 8 of these 32.
      const uint4 labels = *reinterpret_cast<const uint4*>(&s_.labels[begin + 8 * quad_]);
      uint32_t rows[kColTiles][4];
#pragma unroll
      for (int tile = 0; tile < kColTiles; ++tile) {
        const int chunk = warp_ * kColTiles + tile;
        ldmatrix_x4_trans(rows[tile], address(s_.rows[chunk_at(begin + lane, chunk)]));
      }
#pragma unroll
      for (int ct = 0; ct < kClusterTiles; ++ct) {
        uint32_t members[2][4];
        membership(members[0], labels.x, labels.y, 16 * ct);
        membership(members[1], labels.z, labels.w, 16 * ct);
#pragma unroll
        for (int tile = 0; tile < kColTiles; ++tile) {
          mma_m16n8k16<T>(parts[0][ct][tile], members[0], rows[tile][0], rows[tile][1]);
          mma_m16n8k16<T>(parts[kParts - 1][ct][tile], members[1], rows[tile][2], rows[tile][3]);
        }
      }
    }
#pragma unroll
    for (int ct = 0; ct < kClusterTiles; ++ct) {
#pragma unroll
      for (int tile = 0; tile < kColTiles; ++tile) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          sums[ct][tile][i] = parts[0][ct][tile][i];
          if constexpr (kParts > 1) sums[ct][tile][i] += parts[1][ct][tile][i];
        }
      }
    }
  }

  // The 16 x 16 matrix of whether rows belong to clusters `first` and on.
  __device__ __forceinline__ void membership(uint32_t (&members)[4], uint32_t low, uint32_t high,
                                             int first) const {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const __half2 cluster = __half2half2(__int2half_rn(first + 8 * h + group_));
      members[h] = equal(low, cluster);
      members[h + 2] = equal(high, cluster);
    }
  }

  static __device__ __forceinline__ uint32_t equal(uint32_t labels, __half2 cluster) {
    const __half2 is_equal = __heq2(reinterpret_cast<const __half2&>(labels), cluster);
    return reinterpret_cast<const uint32_t&>(is_equal);
  }

  // Moves each mean to its keys; that of an empty cluster stays.
  __device__ void update() {
    float square[kClusterTiles][2] = {};
    for_each_slab([&](int slab) { average(slab, square); });
    if (!has_columns()) return;
    for_each_cluster([&](int cluster, int ct, int h) {
      float sum = square[ct][h];
      sum += __shfl_xor_sync(kAllLanes, sum, 1);
      sum += __shfl_xor_sync(kAllLanes, sum, 2);
      if (quad_ == 0 && count(cluster) > 0) s_.squares[cluster][warp_] = sum;
    });
  }

  // Means of the slab in shared memory, of clusters with rows. Adds this lane's part of their
  // squares.
  __device__ __forceinline__ void average(int slab, float (&square)[kClusterTiles][2]) {
    if (!has_columns()) return;
    float sums[kClusterTiles][kColTiles][4];
    sum_clusters(sums);
    for_each_cluster([&](int cluster, int ct, int h) {
      const int rows = count(cluster);
      if (rows == 0) return;
      const float number = static_cast<float>(rows), inverse = __fdividef(1.0f, number);
      // Exact where a quotient is: keys that are all the same have no deviation.
      const auto divide = [&](float sum) {
        const float quotient = sum * inverse;
        return kInverseOfTrue * fmaf(fmaf(-quotient, number, sum), inverse, quotient);
      };
#pragma unroll
      for (int tile = 0; tile < kColTiles; ++tile) {
        const float x = divide(sums[ct][tile][2 * h]), y = divide(sums[ct][tile][2 * h + 1]);
        const uint32_t rounded = pack<T>(x, y);
        const float2 left = unpack<T>(rounded);
        const int chunk = warp_ * kColTiles + tile;
        word(slab, cluster, chunk) = rounded;
        word(slab, kNumClusters + cluster, chunk) = pack<T>(x - left.x, y - left.y);
        square[ct][h] += x * x + y * y;
      }
    });
  }

  // The clusters whose sums this lane has.
  template <typename Body>
  __device__ __forceinline__ void for_each_cluster(Body body) const {
#pragma unroll
    for (int ct = 0; ct < kClusterTiles; ++ct) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        body(16 * ct + 8 * h + group_, ct, h);
      }
    }
  }

  __device__ __forceinline__ uint32_t& word(int slab, int row, int chunk) {
    return reinterpret_cast<uint32_t*>(&s_.means[slab][chunk_at(row, chunk)])[quad_];
  }

  Shared& s_;
  T* const rows_;  // [256, 2 * kHeadSize]; this head's keys and values
  const int64_t row_stride_;
  const int num_sinks_;
  const int warp_, lane_, group_, quad_;
  int held_ = -1;   // slab in shared memory
  int label_ = -1;  // of the row that assign leaves this thread with
};

}  // namespace clusterkv::cuda
