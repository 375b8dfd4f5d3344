// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the vllm_clusterkv project
//
// One task clusters, sorts and summarises one page of one KV head. Keys are widened
// to fp32 once, by row for the means and by dimension for the similarities, and stay
// in L2 for all rounds (2 x 64 KB at head size 64).
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "../checks.h"
#include "dispatch.h"
#include "short_means.h"

namespace clusterkv::cpu {
namespace {

constexpr int kStrip = 2;  // vectors of rows that assign takes at once
constexpr int64_t kStripRows = kStrip * kLanes;

struct Scratch {
  int64_t num_rows, padded_rows;   // the latter a multiple of kStripRows
  std::vector<float> keys;         // [num_rows, head_size]
  std::vector<float> keys_by_dim;  // [head_size, padded_rows]
  std::vector<float> centroids;    // [num_clusters, head_size]
  std::vector<float> directions;   // [head_size, num_clusters], centroids / their norms
  std::vector<float> variances;    // [head_size]
  std::vector<float> squares;      // [num_clusters]
  std::vector<float> values;       // [num_clusters, head_size], means of V
  std::vector<float> value;        // [head_size]
  std::vector<float> inverses;     // [padded_rows], 1 / norms of the keys
  std::vector<float> cosines;      // [padded_rows], of one key to all
  std::vector<float> nearest;      // [padded_rows], largest cosine to a chosen key
  std::vector<int32_t> labels;     // [padded_rows]
  std::vector<int32_t> counts;     // [num_clusters]
};

inline void add_row(const float* __restrict row, float* __restrict sum, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) sum[i] += row[i];
}

inline void scale_row(float factor, float* row, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) row[i] *= factor;
}

// labels[row] = argmax over clusters of cos(key, centroid); the key's own norm does
// not matter. Ties go to the lowest cluster. Returns whether a label changed.
template <int kNumClusters>
bool assign(Scratch& s, int64_t head_size) {
  constexpr int kClusters = 8;  // whose similarities stay in registers
  VecInts changed = {};
  for (int64_t row = 0; row < s.padded_rows; row += kStripRows) {
    Vec best[kStrip];
    VecInts labels[kStrip];
    for (int first = 0; first < kNumClusters; first += kClusters) {
      Vec similarity[kClusters][kStrip];
      for (int c = 0; c < kClusters; ++c) std::fill_n(similarity[c], kStrip, Vec{});
      for (int64_t d = 0; d < head_size; ++d) {
        const float* keys = s.keys_by_dim.data() + d * s.padded_rows + row;
        const float* directions = s.directions.data() + d * kNumClusters + first;
        for (int i = 0; i < kStrip; ++i) {
          const Vec key = load<Vec>(keys + i * kLanes);
          for (int c = 0; c < kClusters; ++c) similarity[c][i] += directions[c] * key;
        }
      }
      for (int i = 0; i < kStrip; ++i) {
        if (first == 0) {
          best[i] = Vec{} - std::numeric_limits<float>::infinity();
          labels[i] = VecInts{};
        }
        for (int c = 0; c < kClusters; ++c) {
          const VecInts better = similarity[c][i] > best[i];
          best[i] = better ? similarity[c][i] : best[i];
          labels[i] = better ? VecInts{} + (first + c) : labels[i];
        }
      }
    }
    for (int i = 0; i < kStrip; ++i) {
      int32_t* stored = s.labels.data() + row + i * kLanes;
      changed |= labels[i] ^ load<VecInts>(stored);
      std::memcpy(stored, &labels[i], sizeof(labels[i]));
    }
  }
  bool any = false;
  for (int i = 0; i < kLanes; ++i) any |= changed[i] != 0;
  return any;
}

// Means of the unnormalised keys; an empty cluster keeps its centroid.
void update(Scratch& s, int64_t head_size, int64_t num_clusters) {
  std::fill(s.counts.begin(), s.counts.end(), 0);
  for (int64_t row = 0; row < s.num_rows; ++row) ++s.counts[s.labels[row]];
  for (int64_t c = 0; c < num_clusters; ++c) {
    if (s.counts[c] > 0) std::fill_n(s.centroids.data() + c * head_size, head_size, 0.0f);
  }
  for (int64_t row = 0; row < s.num_rows; ++row) {
    add_row(s.keys.data() + row * head_size, s.centroids.data() + s.labels[row] * head_size,
            head_size);
  }
  for (int64_t c = 0; c < num_clusters; ++c) {
    if (s.counts[c] == 0) continue;
    scale_row(1.0f / static_cast<float>(s.counts[c]), s.centroids.data() + c * head_size,
              head_size);
  }
}

void normalise(Scratch& s, int64_t head_size, int64_t num_clusters) {
  for (int64_t c = 0; c < num_clusters; ++c) {
    const float* centroid = s.centroids.data() + c * head_size;
    const float norm = std::sqrt(dot(centroid, centroid, head_size));
    const float inverse = norm > 0.0f ? 1.0f / norm : 0.0f;
    for (int64_t d = 0; d < head_size; ++d) {
      s.directions[d * num_clusters + c] = centroid[d] * inverse;
    }
  }
}

// Keys far from each other start the clusters: the first, then always the one whose
// largest cosine to those chosen is least. Keys of rare directions, which a few tokens
// have and which a mean among others hides, thus get clusters of their own.
void seed(Scratch& s, int64_t head_size, int64_t num_clusters) {
  s.inverses.assign(s.padded_rows, 0.0f);
  s.nearest.assign(s.padded_rows, -std::numeric_limits<float>::infinity());
  s.cosines.resize(s.padded_rows);
  for (int64_t row = 0; row < s.num_rows; ++row) {
    const float* key = s.keys.data() + row * head_size;
    const float norm = std::sqrt(dot(key, key, head_size));
    s.inverses[row] = norm > 0.0f ? 1.0f / norm : 0.0f;
  }
  int64_t chosen = 0;
  for (int64_t c = 0;; ++c) {
    const float* key = s.keys.data() + chosen * head_size;
    std::copy_n(key, head_size, s.centroids.data() + c * head_size);
    if (c + 1 == num_clusters) return;
    std::fill(s.cosines.begin(), s.cosines.end(), 0.0f);
    for (int64_t d = 0; d < head_size; ++d) {
      const float* by_dim = s.keys_by_dim.data() + d * s.padded_rows;
      float* cosines = s.cosines.data();
      const float x = key[d] * s.inverses[chosen];
#pragma omp simd
      for (int64_t row = 0; row < s.padded_rows; ++row) cosines[row] += x * by_dim[row];
    }
    // Keys without a direction (zero, not finite) are not chosen.
    float least = std::numeric_limits<float>::infinity();
    for (int64_t row = 0; row < s.num_rows; ++row) {
      const float cosine = s.cosines[row] * s.inverses[row];
      float& nearest = s.nearest[row];
      if (cosine > nearest) nearest = cosine;
      if (s.inverses[row] > 0.0f && nearest < least) {
        least = nearest;
        chosen = row;
      }
    }
  }
}

template <typename T>
void load_keys(const T* rows, int64_t row_stride, int64_t head_size, Scratch& s) {
  s.keys.resize(s.num_rows * head_size);
  s.keys_by_dim.assign(head_size * s.padded_rows, 0.0f);
  for (int64_t row = 0; row < s.num_rows; ++row) {
    load_row(rows + row * row_stride, s.keys.data() + row * head_size, head_size);
  }
  for (int64_t begin = 0; begin < s.num_rows; begin += kLanes) {  // lines stay in L1
    const int64_t end = std::min<int64_t>(begin + kLanes, s.num_rows);
    for (int64_t d = 0; d < head_size; ++d) {
      float* by_dim = s.keys_by_dim.data() + d * s.padded_rows;
      for (int64_t row = begin; row < end; ++row) by_dim[row] = s.keys[row * head_size + d];
    }
  }
}

template <int kNumClusters>
void cluster_keys(int64_t head_size, int64_t num_iters, Scratch& s) {
  s.centroids.resize(kNumClusters * head_size);
  s.directions.resize(head_size * kNumClusters);
  s.labels.assign(s.padded_rows, 0);
  s.counts.resize(kNumClusters);
  seed(s, head_size, kNumClusters);
  for (int64_t iter = 0; iter < num_iters; ++iter) {
    normalise(s, head_size, kNumClusters);
    const bool changed = assign<kNumClusters>(s, head_size);
    if (iter > 0 && !changed) break;  // every further round would repeat the last
    update(s, head_size, kNumClusters);
  }
}

// How keys spread around their means: by dimension, over the mean of the dimensions (the
// profile), and of each cluster the root of the mean square (the radius).
template <typename T>
void store_spread(Scratch& s, int64_t head_size, int64_t num_clusters, T* profile, T* radii) {
  s.variances.assign(head_size, 0.0f);
  s.squares.assign(num_clusters, 0.0f);
  float* variances = s.variances.data();
  float* squares = s.squares.data();
  for (int64_t row = 0; row < s.num_rows; ++row) {
    const float* key = s.keys.data() + row * head_size;
    const float* mean = s.centroids.data() + s.labels[row] * head_size;
    float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
    for (int64_t d = 0; d < head_size; ++d) {
      const float square = (key[d] - mean[d]) * (key[d] - mean[d]);
      variances[d] += square;
      sum += square;
    }
    squares[s.labels[row]] += sum;
  }
  float total = 0.0f;
  for (int64_t c = 0; c < num_clusters; ++c) {
    total += squares[c];
    const float elements = static_cast<float>(s.counts[c] * head_size);
    squares[c] = s.counts[c] > 0 ? std::sqrt(squares[c] / elements) : 0.0f;
  }
  const float mean = total / static_cast<float>(head_size);
  for (int64_t d = 0; d < head_size; ++d) variances[d] = mean > 0.0f ? variances[d] / mean : 0.0f;
  store_row(variances, profile, head_size);
  store_row(squares, radii, num_clusters);
}

template <typename T, int kNumClusters>
void index_page(const SemanticPages& pages, int64_t block, int64_t head, int64_t num_sinks,
                int64_t num_iters, Scratch& s, std::vector<T>& sorted) {
  const int64_t head_size = pages.head_size, row_size = 2 * head_size;
  T* rows = static_cast<T*>(pages.kv_cache) + block * pages.kv_block_stride +
            head * pages.kv_head_stride + num_sinks * pages.kv_row_stride;
  s.num_rows = pages.block_size - num_sinks;
  s.padded_rows = (s.num_rows + kStripRows - 1) / kStripRows * kStripRows;
  load_keys(rows, pages.kv_row_stride, head_size, s);
  cluster_keys<kNumClusters>(head_size, num_iters, s);

  const IndexFields& fields = pages.fields;
  uint8_t* index = pages.index + block * pages.index_block_stride + head * pages.index_head_stride;
  int16_t* ends = reinterpret_cast<int16_t*>(index + fields.cluster_ends);
  int64_t next[kNumClusters];  // where a cluster's next row goes
  int64_t end = 0;
  for (int c = 0; c < kNumClusters; ++c) {
    next[c] = end;
    end += s.counts[c];
    ends[c] = static_cast<int16_t>(num_sinks + end);
  }
  // Stable counting sort, and the means of V on the way.
  sorted.resize(s.num_rows * row_size);
  s.value.resize(head_size);
  s.values.assign(kNumClusters * head_size, 0.0f);
  for (int64_t row = 0; row < s.num_rows; ++row) {
    const T* source = rows + row * pages.kv_row_stride;
    const int32_t label = s.labels[row];
    std::copy_n(source, row_size, sorted.data() + next[label]++ * row_size);
    load_row(source + head_size, s.value.data(), head_size);
    add_row(s.value.data(), s.values.data() + label * head_size, head_size);
  }
  for (int64_t row = 0; row < s.num_rows; ++row) {
    std::copy_n(sorted.data() + row * row_size, row_size, rows + row * pages.kv_row_stride);
  }
  store_spread(s, head_size, kNumClusters, reinterpret_cast<T*>(index + fields.profile),
               reinterpret_cast<T*>(index + fields.radii));
  for (int c = 0; c < kNumClusters; ++c) {
    if (s.counts[c] == 0) continue;
    scale_row(1.0f / static_cast<float>(s.counts[c]), s.values.data() + c * head_size, head_size);
  }
  // The centroids of the last round are the means of K, but for empty clusters.
  const MeanWriter<T> writer(fields, head_size, kNumClusters, index);
  writer.write_keys(s.centroids.data(), s.counts.data());
  writer.write_values(s.values.data(), s.counts.data());
}

template <typename T>
void index_pages_kernel(const IndexPagesParams& p) {
  const int64_t num_tasks = p.num_pages * p.pages.num_kv_heads;
  torch::stable::parallel_for(0, num_tasks, 1, [&](int64_t begin, int64_t end) {
    Scratch scratch;
    std::vector<T> sorted;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t page = task / p.pages.num_kv_heads, head = task % p.pages.num_kv_heads;
      const int64_t block = p.block_ids[page];
      if (block < 0) continue;
      const int64_t sinks = p.num_sink_tokens[page];
      switch (p.pages.num_clusters) {
        case 16:
          index_page<T, 16>(p.pages, block, head, sinks, p.num_iters, scratch, sorted);
          break;
        case 32:
          index_page<T, 32>(p.pages, block, head, sinks, p.num_iters, scratch, sorted);
          break;
        case 64:
          index_page<T, 64>(p.pages, block, head, sinks, p.num_iters, scratch, sorted);
          break;
      }
    }
  });
}

void index_pages(Tensor kv_cache, Tensor index, Tensor block_ids, Tensor num_sink_tokens,
                 int64_t num_iters) {
  const IndexPagesParams params =
      check_index_pages(kv_cache, index, block_ids, num_sink_tokens, num_iters);
  for (int64_t i = 0; i < params.num_pages; ++i) {
    const int64_t block = params.block_ids[i], sinks = params.num_sink_tokens[i];
    STD_TORCH_CHECK(block >= -1 && block < params.pages.num_blocks, "block_ids[", i,
                    "] must be -1 to num_blocks - 1 (", params.pages.num_blocks - 1, "), got ",
                    block);
    check_num_sink_tokens(params.pages, sinks);
  }
  CLUSTERKV_DISPATCH_KV_DTYPE(kv_cache.scalar_type(), "index_pages",
                              index_pages_kernel<scalar_t>(params));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(clusterkv, CPU, m) { m.impl("index_pages", TORCH_BOX(&index_pages)); }

}  // namespace clusterkv::cpu
