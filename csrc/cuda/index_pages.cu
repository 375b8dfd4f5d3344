// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the vllm_clusterkv project
#include <torch/csrc/stable/library.h>

#include "../checks.h"
#include "index_pages.cuh"
#include "launch.h"

namespace clusterkv::cuda {
namespace {

constexpr const char* kOp = "index_pages";

template <typename T, int kHeadSize, int kNumClusters>
void launch_index_pages(const LaunchContext& context, const IndexPagesParams& params) {
  constexpr size_t kSharedBytes = sizeof(typename PageIndexer<T, kHeadSize, kNumClusters>::Shared);
  static_assert(kSharedBytes <= 99 * 1024 || (kHeadSize == 256 && kNumClusters == 64),
                "what compute capability 8.6 gives a thread block");
  const int most_bytes = context.max_smem_bytes();
  STD_TORCH_CHECK(kSharedBytes <= static_cast<size_t>(most_bytes), kOp, ": ", kNumClusters,
                  " clusters a page at head_size ", kHeadSize, " need ", kSharedBytes,
                  " bytes of shared memory, the device has ", most_bytes);
  const int64_t num_blocks = params.num_pages * params.pages.num_kv_heads;
  STD_TORCH_CHECK(num_blocks <= INT32_MAX, kOp, ": block_ids.size(0) times the KV heads (",
                  params.pages.num_kv_heads, ") must be below 2^31, got ", num_blocks);
  context.launch_pdl(index_pages_kernel<T, kHeadSize, kNumClusters>,
                     dim3(static_cast<unsigned>(num_blocks)), dim3(kPageRows), kSharedBytes,
                     params);
}

template <typename T, int kHeadSize>
void with_num_clusters(const LaunchContext& context, const IndexPagesParams& params) {
  switch (params.pages.num_clusters) {
    case 16:
      return launch_index_pages<T, kHeadSize, 16>(context, params);
    case 32:
      return launch_index_pages<T, kHeadSize, 32>(context, params);
    case 64:
      return launch_index_pages<T, kHeadSize, 64>(context, params);
  }
}

template <typename T>
void with_head_size(const LaunchContext& context, const IndexPagesParams& params) {
  switch (params.pages.head_size) {
    case 64:
      return with_num_clusters<T, 64>(context, params);
    case 96:
      return with_num_clusters<T, 96>(context, params);
    case 128:
      return with_num_clusters<T, 128>(context, params);
    case 256:
      return with_num_clusters<T, 256>(context, params);
    default:
      STD_TORCH_CHECK(false, kOp, ": head_size must be 64, 96, 128 or 256 on CUDA, got ",
                      params.pages.head_size);
  }
}

void index_pages(Tensor kv_cache, Tensor index, Tensor block_ids, Tensor num_sink_tokens,
                 int64_t num_iters) {
  const IndexPagesParams params =
      check_index_pages(kv_cache, index, block_ids, num_sink_tokens, num_iters);
  STD_TORCH_CHECK(params.pages.block_size == kPageRows, kOp, ": pages must be of ", kPageRows,
                  " tokens on CUDA, got ", params.pages.block_size);
  const SemanticPages& pages = params.pages;
  check_aligned(kOp, "kv_cache", pages.kv_cache,
                {pages.kv_block_stride, pages.kv_head_stride, pages.kv_row_stride});
  check_index_aligned(kOp, pages);
  if (params.num_pages == 0) return;
  const LaunchContext context(kOp, kv_cache);
  CLUSTERKV_DISPATCH_CUDA_DTYPE(kv_cache.scalar_type(), kOp,
                                with_head_size<scalar_t>(context, params));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(clusterkv, CUDA, m) { m.impl("index_pages", TORCH_BOX(&index_pages)); }

}  // namespace clusterkv::cuda
