// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the vllm_clusterkv project
#include <torch/csrc/stable/library.h>

#include "decode_launch.h"
#include "sparse_decode.cuh"

namespace clusterkv::cuda {
namespace {

void sparse_decode(Tensor query, Tensor kv_cache, Tensor index, Tensor block_table, Tensor seq_lens,
                   Tensor min_sparse_lens, Tensor scores, Tensor selected, double scale,
                   int64_t num_sink_tokens, bool tail_estimate, Tensor workspace, Tensor output,
                   OptionalTensor index_table, OptionalTensor host_cache,
                   OptionalTensor line_table) {
  const SparseDecodeParams params = check_sparse_decode(
      query, kv_cache, index, block_table, seq_lens, min_sparse_lens, scores, selected, scale,
      num_sink_tokens, tail_estimate, workspace, output, index_table, host_cache, line_table);
  check_decode_shapes("sparse_decode", params.pages, params.rows);
  check_aligned("sparse_decode", "query", params.query,
                {params.query_row_stride, params.query_head_stride});
  check_aligned("sparse_decode", "selected", params.selected, {}, 4);
  check_aligned("sparse_decode", "workspace", params.workspace, {}, 8);
  if (params.rows.num_reqs == 0) return;
  const LaunchContext context("sparse_decode", kv_cache);
  const auto num_splits = static_cast<unsigned>(params.num_splits);
  const auto num_reqs = static_cast<unsigned>(params.rows.num_reqs);
  dispatch_decode(
      kv_cache.scalar_type(), "sparse_decode", params.pages, params.rows, [&](auto shape) {
        using S = decltype(shape);
        using Traits = DecodeTraits<S::kHeadSize>;
        context.launch_pdl(
            sparse_decode_kernel<typename S::T, S::kHeadSize, S::kHeadTiles>,
            dim3(num_splits, static_cast<unsigned>(params.pages.num_kv_heads), num_reqs),
            dim3(Traits::kThreads), Traits::kTileBytes + sizeof(SparseShared<S::kHeadSize>),
            params);
        context.launch_pdl(merge_splits_kernel<typename S::T, S::kHeadSize>,
                           dim3(static_cast<unsigned>(params.rows.num_heads), num_reqs),
                           dim3(S::kHeadSize), 0, params);
      });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(clusterkv, CUDA, m) {
  m.impl("sparse_decode", TORCH_BOX(&sparse_decode));
}

}  // namespace clusterkv::cuda
