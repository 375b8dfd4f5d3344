// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the vllm_clusterkv project
#include <torch/csrc/stable/library.h>

#include "decode_launch.h"
#include "select_clusters.cuh"

namespace clusterkv::cuda {
namespace {

void select_clusters(Tensor scores, Tensor kv_cache, Tensor centroids, Tensor cluster_ends,
                     Tensor block_table, Tensor seq_lens, Tensor min_sparse_lens,
                     int64_t num_sink_tokens, int64_t token_budget, Tensor selected,
                     Tensor num_attended) {
  const SelectClustersParams params =
      check_select_clusters(scores, kv_cache, centroids, cluster_ends, block_table, seq_lens,
                            min_sparse_lens, num_sink_tokens, token_budget, selected, num_attended);
  check_decode_shapes("select_clusters", params.pages, params.rows);
  STD_TORCH_CHECK(params.max_clusters * params.pages.block_size < int64_t{1} << 31,
                  "select_clusters: a row may have fewer than 2^31 tokens on CUDA");
  if (params.rows.num_reqs == 0) return;
  const LaunchContext context("select_clusters", kv_cache);
  const int64_t cached = clamp(kMaxSelectSmemBytes / kBytesPerCluster, 0,
                               params.max_clusters + params.max_clusters % 2);
  // A small batch leaves multiprocessors idle: finish each row sooner.
  const int64_t pairs = params.rows.num_reqs * params.pages.num_kv_heads;
  const int threads = pairs <= context.num_multiprocessors() ? 1024 : 512;
  context.launch_pdl(select_clusters_kernel, dim3(params.pages.num_kv_heads, params.rows.num_reqs),
                     dim3(threads), cached * kBytesPerCluster, params, static_cast<int>(cached));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(clusterkv, CUDA, m) {
  m.impl("select_clusters", TORCH_BOX(&select_clusters));
}

}  // namespace clusterkv::cuda
