// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the vllm_clusterkv project
#include <torch/csrc/stable/library.h>

#include "decode_launch.h"
#include "score_clusters.cuh"

namespace clusterkv::cuda {
namespace {

// As many as are resident at head size 128: enough that all mean keys of a small batch
// are under way at once.
constexpr int kBlocksPerMultiprocessor = 3;

void score_clusters(Tensor query, Tensor kv_cache, Tensor index, Tensor block_table,
                    Tensor seq_lens, Tensor min_sparse_lens, double scale, int64_t num_sink_tokens,
                    Tensor scores, Tensor tile_stats, OptionalTensor index_table) {
  const ScoreClustersParams params =
      check_score_clusters(query, kv_cache, index, block_table, seq_lens, min_sparse_lens, scale,
                           num_sink_tokens, scores, tile_stats, index_table);
  check_decode_shapes("score_clusters", params.pages, params.rows);
  check_aligned("score_clusters", "query", params.query,
                {params.query_row_stride, params.query_head_stride});
  check_aligned("score_clusters", "tile_stats", params.tile_stats, {}, 8);
  const int64_t max_pages = params.rows.max_blocks;
  if (params.rows.num_reqs == 0 || max_pages == 0) return;
  const LaunchContext context("score_clusters", kv_cache);
  const int64_t pairs = params.rows.num_reqs * params.pages.num_kv_heads;
  const int64_t most = context.num_multiprocessors() * kBlocksPerMultiprocessor / pairs;
  // Equal shares: a page more on some of the warps would cost as much as on all.
  const int64_t pages_a_warp = divide_up(max_pages, clamp(most, 1, max_pages) * kScoreWarps);
  const dim3 grid(static_cast<unsigned>(divide_up(max_pages, pages_a_warp * kScoreWarps)),
                  static_cast<unsigned>(params.pages.num_kv_heads),
                  static_cast<unsigned>(params.rows.num_reqs));
  dispatch_decode(
      kv_cache.scalar_type(), "score_clusters", params.pages, params.rows, [&](auto shape) {
        using S = decltype(shape);
        const auto launch = [&](auto kernel) {
          context.launch_pdl(kernel, grid, dim3(kScoreThreads), 0, params);
        };
        switch (params.pages.num_clusters) {
          case 16:
            launch(score_clusters_kernel<typename S::T, S::kHeadSize, S::kHeadTiles, 1>);
            break;
          case 32:
            launch(score_clusters_kernel<typename S::T, S::kHeadSize, S::kHeadTiles, 2>);
            break;
          default:
            launch(score_clusters_kernel<typename S::T, S::kHeadSize, S::kHeadTiles, 4>);
        }
      });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(clusterkv, CUDA, m) {
  m.impl("score_clusters", TORCH_BOX(&score_clusters));
}

}  // namespace clusterkv::cuda
