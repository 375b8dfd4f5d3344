// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the vllm_clusterkv project
//
// Attention of one warp to tiles of 16 rows of K | V, with a running softmax of its own.
//
// Keys are the rows and query heads the columns of a fragment (S^T = K Q^T,
// O^T = V^T P^T), so up to eight query heads fill a tensor core's tile. Tiles come to
// shared memory by asynchronous copies, kStages deep and for each warp apart: no warp
// waits for another.
#pragma once

#include <type_traits>

#include "ptx.cuh"

namespace clusterkv::cuda {

constexpr int kTileRows = 16;

template <int kHeadSize>
struct DecodeTraits {
  static constexpr int kWarps = kHeadSize > 128 ? 2 : 4;
  static constexpr int kThreads = kWarps * 32;
  static constexpr int kStages = 2;
  static constexpr int kRowBytes = kHeadSize * 4;  // K | V
  // 16 bytes of padding: ldmatrix then reads eight rows from different banks.
  static constexpr int kPitchBytes = kRowBytes + 16;
  static constexpr int kStageBytes = kTileRows * kPitchBytes;
  static constexpr int kTileBytes = kWarps * kStages * kStageBytes;
  // Tiles of values alone, in the same memory.
  static constexpr int kValuePitchBytes = kHeadSize * 2 + 16;
  static constexpr int kValueStageBytes = kTileRows * kValuePitchBytes;
  static constexpr int kValueStages = kStages * kStageBytes / kValueStageBytes;
};

// Attention of one warp to the rows it has seen, for 8 * kHeadTiles query heads. In
// fragments, query heads are columns: this thread's are t * 8 + 2 j and + 1.
template <int kHeadSize, int kHeadTiles>
struct WarpState {
  // Rounded up to an integer: logits - max then has the fraction of a logit's bits
  // whatever the max, and weights of a logit differ by a power of 2, which rounding them
  // to 16 bits keeps.
  float max[kHeadTiles][2];
  float sum[kHeadTiles][2];                  // of this thread's rows only
  float out[kHeadTiles][kHeadSize / 16][4];  // elements g and g + 8 of 16, not normalised

  __device__ WarpState() {
#pragma unroll
    for (int t = 0; t < kHeadTiles; ++t) {
      max[t][0] = max[t][1] = -INFINITY;
      sum[t][0] = sum[t][1] = 0.0f;
#pragma unroll
      for (int d = 0; d < kHeadSize / 16; ++d) {
        out[t][d][0] = out[t][d][1] = out[t][d][2] = out[t][d][3] = 0.0f;
      }
    }
  }
};

template <typename T, int kHeadSize, int kHeadTiles>
struct DecodeWarp {
  using Traits = DecodeTraits<kHeadSize>;
  static constexpr int kSteps = kHeadSize / 16;
  // fp16 knows no weights below 2^-24. All are raised by 2^12, and so is their sum.
  static constexpr float kRaise = std::is_same_v<T, __half> ? 12.0f : 0.0f;

  WarpState<kHeadSize, kHeadTiles> state;
  uint32_t query[kHeadTiles][kSteps][2];
  uint32_t stages;  // this warp's, in shared memory
  int lane, g, j;

  // Past the L1 cache: the block may run before its kernel's wait.
  __device__ void load_query(const T* heads, int64_t head_stride, int group) {
#pragma unroll
    for (int t = 0; t < kHeadTiles; ++t) {
      const int head = t * 8 + g;
      const T* row = heads + head * head_stride + j * 2;
#pragma unroll
      for (int k = 0; k < kSteps; ++k) {
        const bool valid = head < group;
        query[t][k][0] = valid ? __ldcg(reinterpret_cast<const uint32_t*>(row + k * 16)) : 0;
        query[t][k][1] = valid ? __ldcg(reinterpret_cast<const uint32_t*>(row + k * 16 + 8)) : 0;
      }
    }
  }

  // Starts to copy a tile's keys and values. Lanes 0 to 15 give its rows, null for none
  // (zeros).
  __device__ void load_tile(const T* row_of_lane, int stage) {
    copy_rows<Traits::kRowBytes, Traits::kPitchBytes>(row_of_lane,
                                                      stages + stage * Traits::kStageBytes);
  }

  // Likewise a tile of values alone, to `offset` in the warp's memory.
  __device__ void load_values(const T* row_of_lane, int offset) {
    copy_rows<kHeadSize * 2, Traits::kValuePitchBytes>(row_of_lane, stages + offset);
  }

  template <int kBytes, int kPitch>
  __device__ void copy_rows(const T* row_of_lane, uint32_t to) {
    constexpr int kChunks = kBytes / 16;
    const uint64_t address = reinterpret_cast<uint64_t>(row_of_lane);
#pragma unroll
    for (int i = 0; i < kTileRows * kChunks / 32; ++i) {
      const int row = (i * 32 + lane) / kChunks, chunk = (i * 32 + lane) % kChunks;
      const T* source = reinterpret_cast<const T*>(__shfl_sync(~0u, address, row));
      cp_async_16(to + row * kPitch + chunk * 16, source + chunk * 8, source != nullptr);
    }
  }

  // Waits for the stage's tile, of all but the last commit.
  __device__ void wait_tile() const {
    cp_async_wait<1>();
    __syncwarp();
  }

  // Logits of a tile's keys, in base 2. Rows from num_valid on get minus infinity.
  __device__ void score_tile(int stage, int num_valid, float scale,
                             float (&logits)[kHeadTiles][4]) const {
    const uint32_t base = stages + stage * Traits::kStageBytes;
    const int row = lane % 16, half = lane / 16;
    float acc[kHeadTiles][4] = {};
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
      uint32_t keys[4];
      ldmatrix_x4(keys, base + row * Traits::kPitchBytes + (k * 2 + half) * 16);
#pragma unroll
      for (int t = 0; t < kHeadTiles; ++t) {
        mma_m16n8k16<T>(acc[t], keys, query[t][k][0], query[t][k][1]);
      }
    }
#pragma unroll
    for (int t = 0; t < kHeadTiles; ++t) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        logits[t][i] = g + i / 2 * 8 < num_valid ? acc[t][i] * (scale * kLog2e) : -INFINITY;
      }
    }
  }

  // Takes a tile's values into the state, with weights 2^logit.
  __device__ void attend_tile(int stage, const float (&logits)[kHeadTiles][4]) {
    add_values<Traits::kPitchBytes>(stages + stage * Traits::kStageBytes + kHeadSize * 2, logits,
                                    1.0f);
  }

  // Likewise a tile of values alone, with weights sign * 2^logit.
  __device__ void attend_values(int offset, const float (&logits)[kHeadTiles][4], float sign) {
    add_values<Traits::kValuePitchBytes>(stages + offset, logits, sign);
  }

  template <int kPitch>
  __device__ void add_values(uint32_t base, const float (&logits)[kHeadTiles][4], float sign) {
    uint32_t weights[kHeadTiles][2];
#pragma unroll
    for (int t = 0; t < kHeadTiles; ++t) {
      float p[4], decay[2];
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        float max = fmaxf(logits[t][c], logits[t][c + 2]);
#pragma unroll
        for (int i = 4; i < 32; i *= 2) max = fmaxf(max, __shfl_xor_sync(~0u, max, i));
        max = fmaxf(ceilf(max), state.max[t][c]);
        const float origin = max == -INFINITY ? 0.0f : max;
        decay[c] = fast_exp2(state.max[t][c] - origin);
        // In this order: origin - kRaise would round where logits are beyond 2^24.
        p[c] = sign * fast_exp2(logits[t][c] - origin + kRaise);
        p[c + 2] = sign * fast_exp2(logits[t][c + 2] - origin + kRaise);
        state.max[t][c] = max;
      }
      if (__any_sync(~0u, decay[0] != 1.0f || decay[1] != 1.0f)) {
#pragma unroll
        for (int d = 0; d < kSteps; ++d) {
          state.out[t][d][0] *= decay[0];
          state.out[t][d][1] *= decay[1];
          state.out[t][d][2] *= decay[0];
          state.out[t][d][3] *= decay[1];
        }
      }
      // Weights are summed as they are applied, in 16 bits: their rounding is then one of
      // the weights, not of the output.
      const uint32_t first = pack<T>(p[0], p[1]), last = pack<T>(p[2], p[3]);
      const float2 a = unpack<T>(first), b = unpack<T>(last);
      state.sum[t][0] = state.sum[t][0] * decay[0] + a.x + b.x;
      state.sum[t][1] = state.sum[t][1] * decay[1] + a.y + b.y;
      weights[t][0] = movmatrix_trans(first);
      weights[t][1] = movmatrix_trans(last);
    }
    const int row = lane % 8 + lane / 16 * 8, half = lane / 8 % 2;
#pragma unroll
    for (int d = 0; d < kSteps; ++d) {
      uint32_t values[4];
      ldmatrix_x4_trans(values, base + row * kPitch + (d * 2 + half) * 16);
#pragma unroll
      for (int t = 0; t < kHeadTiles; ++t) {
        mma_m16n8k16<T>(state.out[t][d], values, weights[t][0], weights[t][1]);
      }
    }
  }
};

}  // namespace clusterkv::cuda
