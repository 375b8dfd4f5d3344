// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the vllm_clusterkv project
#include <torch/csrc/stable/library.h>

#include "decode_launch.h"
#include "recall.cuh"

namespace clusterkv::cuda {
namespace {

void recall(Tensor selected, Tensor scores, Tensor kv_cache, Tensor index, Tensor block_table,
            Tensor seq_lens, Tensor min_sparse_lens, int64_t num_sink_tokens, Tensor index_table,
            Tensor host_cache, Tensor row_slots, Tensor hot_blocks, Tensor line_table,
            Tensor hot_lines, Tensor hot_order, Tensor counters) {
  const RecallParams params = check_recall(
      selected, scores, kv_cache, index, block_table, seq_lens, min_sparse_lens, num_sink_tokens,
      index_table, host_cache, row_slots, hot_blocks, line_table, hot_lines, hot_order, counters);
  check_decode_shapes("recall", params.pages, params.rows);
  check_aligned("recall", "selected", params.selected, {}, 8);
  check_aligned("recall", "scores", params.scores, {});
  STD_TORCH_CHECK(params.num_positions < int64_t{1} << 16,
                  "recall: hot_blocks must hold fewer than 2^16 lines a KV head on CUDA, got ",
                  params.num_positions);
  if (params.rows.num_reqs == 0 || params.num_positions == 0) return;
  const LaunchContext context("recall", kv_cache);
  const size_t smem_bytes = RecallShared::bytes(params.rows.max_blocks, params.num_positions);
  STD_TORCH_CHECK(smem_bytes < static_cast<size_t>(context.max_smem_bytes() - 1024),
                  "recall: the lines of a slot's hot blocks (", params.num_positions,
                  ") and a block table of ", params.rows.max_blocks,
                  " pages do not fit the shared memory of a multiprocessor");
  context.launch_pdl(recall_kernel,
                     dim3(static_cast<unsigned>(params.pages.num_kv_heads),
                          static_cast<unsigned>(params.rows.num_reqs)),
                     dim3(kRecallThreads), smem_bytes, params);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(clusterkv, CUDA, m) { m.impl("recall", TORCH_BOX(&recall)); }

}  // namespace clusterkv::cuda
