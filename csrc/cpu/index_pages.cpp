// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the vllm_clusterkv project
//
// One task clusters, sorts and summarises one page of one KV head. Keys are
// widened to fp32 once (64 KB at head size 64) and stay in L2 for all rounds.
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "../checks.h"
#include "dispatch.h"

namespace clusterkv::cpu {
namespace {

struct Scratch {
  std::vector<float> keys;        // [rows, head_size]
  std::vector<float> centroids;   // [num_clusters, head_size]
  std::vector<float> directions;  // [head_size, num_clusters], centroids / their norms
  std::vector<float> mean;        // [2 * head_size]
  std::vector<float> row;         // [2 * head_size]
  std::vector<int> labels;        // [rows]
  std::vector<int> counts;        // [num_clusters]
};

// argmax over clusters of cos(key, centroid); the key's own norm does not matter.
// Ties go to the lowest cluster.
template <int kNumClusters>
void assign(const Scratch& s, int64_t num_rows, int64_t head_size, int* labels) {
  constexpr int kRows = 4;  // independent accumulators hide the FMA latency
  for (int64_t row = 0; row < num_rows; row += kRows) {
    float similarity[kRows][kNumClusters] = {};
    const float* key[kRows];
    for (int i = 0; i < kRows; ++i) {
      key[i] = s.keys.data() + std::min(row + i, num_rows - 1) * head_size;
    }
    for (int64_t d = 0; d < head_size; ++d) {
      const float* direction = s.directions.data() + d * kNumClusters;
      for (int i = 0; i < kRows; ++i) {
        const float k = key[i][d];
#pragma omp simd
        for (int c = 0; c < kNumClusters; ++c) similarity[i][c] += k * direction[c];
      }
    }
    for (int i = 0; i < kRows && row + i < num_rows; ++i) {
      int best = 0;
      for (int c = 1; c < kNumClusters; ++c) {
        if (similarity[i][c] > similarity[i][best]) best = c;
      }
      labels[row + i] = best;
    }
  }
}

// Means of the unnormalised keys; an empty cluster keeps its centroid.
void update(Scratch& s, int64_t num_rows, int64_t head_size, int64_t num_clusters) {
  std::fill(s.counts.begin(), s.counts.end(), 0);
  for (int64_t row = 0; row < num_rows; ++row) ++s.counts[s.labels[row]];
  for (int64_t c = 0; c < num_clusters; ++c) {
    if (s.counts[c] > 0) std::fill_n(s.centroids.data() + c * head_size, head_size, 0.0f);
  }
  for (int64_t row = 0; row < num_rows; ++row) {
    float* sum = s.centroids.data() + s.labels[row] * head_size;
    const float* key = s.keys.data() + row * head_size;
    for (int64_t d = 0; d < head_size; ++d) sum[d] += key[d];
  }
  for (int64_t c = 0; c < num_clusters; ++c) {
    if (s.counts[c] == 0) continue;
    float* centroid = s.centroids.data() + c * head_size;
    const float inverse = 1.0f / static_cast<float>(s.counts[c]);
    for (int64_t d = 0; d < head_size; ++d) centroid[d] *= inverse;
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

template <typename T, int kNumClusters>
void index_page(const SemanticPages& pages, int64_t block, int64_t head, int64_t num_sinks,
                int64_t num_iters, Scratch& s, std::vector<T>& sorted) {
  const int64_t head_size = pages.head_size, row_size = 2 * head_size;
  T* rows = static_cast<T*>(pages.kv_cache) + block * pages.kv_block_stride +
            head * pages.kv_head_stride + num_sinks * pages.kv_row_stride;
  const int64_t num_rows = pages.block_size - num_sinks;
  s.keys.resize(num_rows * head_size);
  s.centroids.resize(kNumClusters * head_size);
  s.directions.resize(head_size * kNumClusters);
  s.labels.resize(num_rows);
  s.counts.resize(kNumClusters);
  for (int64_t row = 0; row < num_rows; ++row) {
    load_row(rows + row * pages.kv_row_stride, s.keys.data() + row * head_size, head_size);
  }
  // Evenly spaced keys start the clusters: deterministic, and neighbours are alike.
  for (int64_t c = 0; c < kNumClusters; ++c) {
    const int64_t row = (2 * c + 1) * num_rows / (2 * kNumClusters);
    std::copy_n(s.keys.data() + row * head_size, head_size, s.centroids.data() + c * head_size);
  }
  for (int64_t iter = 0; iter < num_iters; ++iter) {
    normalise(s, head_size, kNumClusters);
    assign<kNumClusters>(s, num_rows, head_size, s.labels.data());
    update(s, num_rows, head_size, kNumClusters);
  }

  // Stable counting sort of the rows by cluster, then one mean of K and V each.
  int16_t* ends =
      pages.cluster_ends + block * pages.ends_block_stride + head * pages.ends_head_stride;
  T* centroids = static_cast<T*>(pages.centroids) + block * pages.centroid_block_stride +
                 head * pages.centroid_head_stride;
  sorted.resize(num_rows * row_size);
  s.row.resize(row_size);
  int64_t next = 0;
  for (int c = 0; c < kNumClusters; ++c) {
    s.mean.assign(row_size, 0.0f);
    for (int64_t row = 0; row < num_rows; ++row) {
      if (s.labels[row] != c) continue;
      const T* source = rows + row * pages.kv_row_stride;
      std::copy_n(source, row_size, sorted.data() + next * row_size);
      load_row(source, s.row.data(), row_size);
      for (int64_t d = 0; d < row_size; ++d) s.mean[d] += s.row[d];
      ++next;
    }
    if (s.counts[c] > 0) {
      const float inverse = 1.0f / static_cast<float>(s.counts[c]);
      for (int64_t d = 0; d < row_size; ++d) s.mean[d] *= inverse;
    }
    store_row(s.mean.data(), centroids + c * pages.centroid_row_stride, row_size);
    ends[c] = static_cast<int16_t>(num_sinks + next);
  }
  for (int64_t row = 0; row < num_rows; ++row) {
    std::copy_n(sorted.data() + row * row_size, row_size, rows + row * pages.kv_row_stride);
  }
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
        case 8:
          index_page<T, 8>(p.pages, block, head, sinks, p.num_iters, scratch, sorted);
          break;
        case 16:
          index_page<T, 16>(p.pages, block, head, sinks, p.num_iters, scratch, sorted);
          break;
        case 32:
          index_page<T, 32>(p.pages, block, head, sinks, p.num_iters, scratch, sorted);
          break;
      }
    }
  });
}

void index_pages(Tensor kv_cache, Tensor centroids, Tensor cluster_ends, Tensor block_ids,
                 Tensor num_sink_tokens, int64_t num_iters) {
  const IndexPagesParams params =
      check_index_pages(kv_cache, centroids, cluster_ends, block_ids, num_sink_tokens, num_iters);
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
