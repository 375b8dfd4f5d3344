// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the vllm_clusterkv project
//
// One softmax out of many: a block's warps into a split's partial result, the splits of
// a row into its output. A partial result is an output that is not normalised, the
// max of its logits (base 2) and the sum of its weights.
#pragma once

#include "../params.h"
#include "tile_attention.cuh"

namespace clusterkv::cuda {

// Merges the block's warps and writes their output, max and sum to the workspace.
template <typename T, int kHeadSize, int kHeadTiles>
__device__ void write_partial(const SparseDecodeParams& p, int64_t first_head, int group,
                              float* smem, DecodeWarp<T, kHeadSize, kHeadTiles>& warp) {
  using Traits = DecodeTraits<kHeadSize>;
  constexpr int kHeads = kHeadTiles * 8, kWarps = Traits::kWarps;
  constexpr int kPitch = kHeadSize + 4;  // fewer bank conflicts
  static_assert(kWarps * kHeads * (kPitch + 2) * 4 <= Traits::kTileBytes, "fits the stages");
  float* out = smem;                               // [kWarps, kHeads, kPitch]
  float* maxima = out + kWarps * kHeads * kPitch;  // [kWarps, kHeads]
  float* sums = maxima + kWarps * kHeads;
  const int warp_index = threadIdx.x / 32;
  __syncthreads();
#pragma unroll
  for (int t = 0; t < kHeadTiles; ++t) {
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      const int head = t * 8 + warp.j * 2 + c, at = warp_index * kHeads + head;
      float sum = warp.state.sum[t][c];
#pragma unroll
      for (int i = 4; i < 32; i *= 2) sum += __shfl_xor_sync(~0u, sum, i);
      if (head >= group) continue;
      if (warp.g == 0) {
        maxima[at] = warp.state.max[t][c];
        sums[at] = sum;
      }
#pragma unroll
      for (int d = 0; d < kHeadSize / 16; ++d) {
        out[at * kPitch + d * 16 + warp.g] = warp.state.out[t][d][c];
        out[at * kPitch + d * 16 + warp.g + 8] = warp.state.out[t][d][c + 2];
      }
    }
  }
  __syncthreads();
  constexpr int kAtOnce = 4;  // elements a thread
  for (int i = threadIdx.x * kAtOnce; i < group * kHeadSize; i += Traits::kThreads * kAtOnce) {
    const int head = i / kHeadSize, d = i % kHeadSize;
    float max = -INFINITY;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) max = fmaxf(max, maxima[w * kHeads + head]);
    const float origin = max == -INFINITY ? 0.0f : max;
    float4 value{0.0f, 0.0f, 0.0f, 0.0f};
    float sum = 0.0f;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      const float weight = fast_exp2(maxima[w * kHeads + head] - origin);
      const float4 of_warp =
          *reinterpret_cast<const float4*>(out + (w * kHeads + head) * kPitch + d);
      value.x += weight * of_warp.x;
      value.y += weight * of_warp.y;
      value.z += weight * of_warp.z;
      value.w += weight * of_warp.w;
      sum += weight * sums[w * kHeads + head];
    }
    float* partial =
        p.workspace + ((first_head + head) * p.num_splits + blockIdx.x) * (kHeadSize + 2);
    *reinterpret_cast<float2*>(partial + d) = make_float2(value.x, value.y);
    *reinterpret_cast<float2*>(partial + d + 2) = make_float2(value.z, value.w);
    if (d == 0) *reinterpret_cast<float2*>(partial + kHeadSize) = make_float2(max, sum);
  }
}

// Merges the splits of one row and query head, 32 at a time. Grid: [num_heads, num_reqs].
template <typename T, int kHeadSize>
__global__ void __launch_bounds__(kHeadSize) merge_splits_kernel(const SparseDecodeParams p) {
  const int req = blockIdx.y, head = blockIdx.x, lane = threadIdx.x % 32;
  const int num_splits = static_cast<int>(p.num_splits);
  const float* partials =
      p.workspace + (req * p.rows.num_heads + head) * p.num_splits * (kHeadSize + 2);
  wait_for_previous_kernel();
  start_next_kernel();
  float max = -INFINITY, value = 0.0f, sum = 0.0f;
  for (int first = 0; first < num_splits; first += 32) {
    const float* own = partials + (first + lane) * (kHeadSize + 2);
    const bool valid = first + lane < num_splits;
    const float own_max = valid ? own[kHeadSize] : -INFINITY;
    const float own_sum = valid ? own[kHeadSize + 1] : 0.0f;
    float values[32];
#pragma unroll
    for (int s = 0; s < 32; ++s) {
      values[s] = 0.0f;
      if (first + s < num_splits) {
        values[s] = load_now(partials + (first + s) * (kHeadSize + 2) + threadIdx.x);
      }
    }
    float higher = own_max;
#pragma unroll
    for (int i = 16; i > 0; i /= 2) higher = fmaxf(higher, __shfl_xor_sync(~0u, higher, i));
    higher = fmaxf(higher, max);
    const float origin = higher == -INFINITY ? 0.0f : higher;
    const float decay = fast_exp2(max - origin), weight = fast_exp2(own_max - origin);
    value *= decay;
    sum *= decay;
    max = higher;
    float weighted = weight * own_sum;
#pragma unroll
    for (int i = 16; i > 0; i /= 2) weighted += __shfl_xor_sync(~0u, weighted, i);
    sum += weighted;
#pragma unroll
    for (int s = 0; s < 32; ++s) value += __shfl_sync(~0u, weight, s) * values[s];
  }
  T* output = static_cast<T*>(p.output) + req * p.output_row_stride + head * p.output_head_stride;
  output[threadIdx.x] = from_float<T>(sum == 0.0f ? 0.0f : value / sum);
}

}  // namespace clusterkv::cuda
