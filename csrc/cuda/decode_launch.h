// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the vllm_clusterkv project
//
// What the launchers of the decode kernels share: the shapes that kernels exist for.
// Host code only.
#pragma once

#include "../checks.h"
#include "launch.h"

namespace clusterkv::cuda {

constexpr int64_t kMaxGroup = 16;        // query heads a KV head
constexpr int64_t kMaxGridSize = 65535;  // of a grid's second and third dimension

template <typename Element, int kSize, int kTiles>
struct DecodeShape {
  using T = Element;
  static constexpr int kHeadSize = kSize;
  static constexpr int kHeadTiles = kTiles;  // of 8 query heads
};

inline int64_t clamp(int64_t value, int64_t low, int64_t high) {
  return value < low ? low : value > high ? high : value;
}

inline int64_t divide_up(int64_t value, int64_t by) { return (value + by - 1) / by; }

inline void check_decode_shapes(const char* op, const SemanticPages& pages,
                                const DecodeRows& rows) {
  const int64_t size = pages.head_size, group = rows.num_heads / pages.num_kv_heads;
  STD_TORCH_CHECK(size == 64 || size == 96 || size == 128 || size == 256, op,
                  ": head_size must be 64, 96, 128 or 256 on CUDA, got ", size);
  STD_TORCH_CHECK(group <= kMaxGroup, op, ": num_heads / num_kv_heads must be at most ", kMaxGroup,
                  " on CUDA, got ", group);
  STD_TORCH_CHECK(pages.block_size == 256, op, ": pages must be of 256 tokens on CUDA, got ",
                  pages.block_size);
  STD_TORCH_CHECK(pages.num_kv_heads <= kMaxGridSize && rows.num_reqs <= kMaxGridSize, op,
                  ": num_kv_heads and num_reqs must be at most ", kMaxGridSize, ", got ",
                  pages.num_kv_heads, " and ", rows.num_reqs);
  check_aligned(op, "kv_cache", pages.kv_cache,
                {pages.kv_block_stride, pages.kv_head_stride, pages.kv_row_stride});
  check_index_aligned(op, pages);
  check_aligned(op, "host_cache", pages.host_cache,
                {pages.host_page_stride, pages.host_head_stride});
}

// Calls launch(DecodeShape<...>{}) for the shape that the arguments have.
template <typename Launch>
void dispatch_decode(ScalarType dtype, const char* op, const SemanticPages& pages,
                     const DecodeRows& rows, const Launch& launch) {
  const bool two_tiles = rows.num_heads / pages.num_kv_heads > 8;
  CLUSTERKV_DISPATCH_CUDA_DTYPE(dtype, op, {
    const auto with_head_size = [&](auto one, auto two) { two_tiles ? launch(two) : launch(one); };
    switch (pages.head_size) {
      case 64:
        with_head_size(DecodeShape<scalar_t, 64, 1>{}, DecodeShape<scalar_t, 64, 2>{});
        break;
      case 96:
        with_head_size(DecodeShape<scalar_t, 96, 1>{}, DecodeShape<scalar_t, 96, 2>{});
        break;
      case 128:
        with_head_size(DecodeShape<scalar_t, 128, 1>{}, DecodeShape<scalar_t, 128, 2>{});
        break;
      default:
        with_head_size(DecodeShape<scalar_t, 256, 1>{}, DecodeShape<scalar_t, 256, 2>{});
    }
  });
}

}  // namespace clusterkv::cuda
