// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the vllm_clusterkv project
//
// Running sums over the threads of a block.
#pragma once

namespace clusterkv::cuda {

__device__ __forceinline__ int warp_inclusive_sum(int value) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int i = 1; i < 32; i *= 2) {
    const int other = __shfl_up_sync(~0u, value, i);
    if (lane >= i) value += other;
  }
  return value;
}

// Sum over the threads before this one, and over all of them in `total`.
template <int kThreads>
__device__ __forceinline__ int block_exclusive_sum(int value, int* warp_totals, int& total) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int inclusive = warp_inclusive_sum(value);
  if (lane == 31) warp_totals[warp] = inclusive;
  __syncthreads();
  const int warps = warp_inclusive_sum(lane < kThreads / 32 ? warp_totals[lane] : 0);
  total = __shfl_sync(~0u, warps, 31);
  const int before = __shfl_sync(~0u, warps, warp > 0 ? warp - 1 : 0);
  __syncthreads();  // warp_totals may be written again
  return (warp > 0 ? before : 0) + inclusive - value;
}

}  // namespace clusterkv::cuda
