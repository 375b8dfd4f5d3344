// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the vllm_clusterkv project
#include <torch/csrc/stable/library.h>

#include "decode_launch.h"
#include "select_clusters.cuh"

namespace clusterkv::cuda {
namespace {

template <int kThreads>
__global__ void __launch_bounds__(kThreads, kManyThreads / kThreads)
    select_clusters_kernel(const SelectClustersParams p) {
  __shared__ SelectShared shared;
  select_clusters_of_row<kThreads>(p, shared);
}

void select_clusters(Tensor scores, Tensor tile_stats, Tensor kv_cache, Tensor index,
                     Tensor block_table, Tensor seq_lens, Tensor min_sparse_lens,
                     int64_t num_sink_tokens, int64_t token_budget, Tensor selected,
                     Tensor num_attended, OptionalTensor index_table) {
  const SelectClustersParams params = check_select_clusters(
      scores, tile_stats, kv_cache, index, block_table, seq_lens, min_sparse_lens, num_sink_tokens,
      token_budget, selected, num_attended, index_table);
  check_decode_shapes("select_clusters", params.pages, params.rows);
  STD_TORCH_CHECK(params.rows.max_blocks * params.pages.block_size < int64_t{1} << 30,
                  "select_clusters: a row must have fewer than 2^30 tokens on CUDA, got a block "
                  "table of ",
                  params.rows.max_blocks, " pages");
  STD_TORCH_CHECK(token_budget < int64_t{1} << 31,
                  "select_clusters: token_budget must be below 2^31 on CUDA, got ", token_budget);
  check_aligned("select_clusters", "scores", params.scores, {});
  check_aligned("select_clusters", "tile_stats", params.tile_stats, {}, 8);
  check_aligned("select_clusters", "selected", params.selected, {}, 4);
  if (params.rows.num_reqs == 0) return;
  const LaunchContext context("select_clusters", kv_cache);
  const dim3 grid(static_cast<unsigned>(params.pages.num_kv_heads),
                  static_cast<unsigned>(params.rows.num_reqs));
  if (4 * grid.x * grid.y <= static_cast<unsigned>(context.num_multiprocessors())) {
    context.launch_pdl(select_clusters_kernel<kManyThreads>, grid, dim3(kManyThreads), 0, params);
  } else {
    context.launch_pdl(select_clusters_kernel<kFewThreads>, grid, dim3(kFewThreads), 0, params);
  }
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(clusterkv, CUDA, m) {
  m.impl("select_clusters", TORCH_BOX(&select_clusters));
}

}  // namespace clusterkv::cuda
