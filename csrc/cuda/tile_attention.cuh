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
};

// Attention of one warp to the rows it has seen, for 8 * kHeadTiles query heads. In
// fragments, query heads are columns: this thread's are t * 8 + 2 j and + 1.
template <int kHeadSize, int kHeadTiles>
struct WarpState {
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

  __device__ void load_query(const T* heads, int64_t head_stride, int group) {
#pragma unroll
    for (int t = 0; t < kHeadTiles; ++t) {
      const int head = t * 8 + g;
      const T* row = heads + head * head_stride + j * 2;
#pragma unroll
      for (int k = 0; k < kSteps; ++k) {
        const bool valid = head < group;
        query[t][k][0] = valid ? *reinterpret_cast<const uint32_t*>(row + k * 16) : 0;
        query[t][k][1] = valid ? *reinterpret_cast<const uint32_t*>(row + k * 16 + 8) : 0;
      }
    }
  }

  // Starts to copy a tile. Lanes 0 to 15 give its rows, null for none (zeros). kKeys: K
  // and V of a row, else V alone.
  template <bool kKeys>
  __device__ void load_tile(const T* row_of_lane, int stage) {
    constexpr int kBytes = kKeys ? Traits::kRowBytes : Traits::kRowBytes / 2;
    constexpr int kFirst = Traits::kRowBytes - kBytes, kChunks = kBytes / 16;
    const uint32_t base = stages + stage * Traits::kStageBytes + kFirst;
    const uint64_t address = reinterpret_cast<uint64_t>(row_of_lane);
#pragma unroll
    for (int i = 0; i < kTileRows * kChunks / 32; ++i) {
      const int row = (i * 32 + lane) / kChunks, chunk = (i * 32 + lane) % kChunks;
      const T* source = reinterpret_cast<const T*>(__shfl_sync(~0u, address, row));
      cp_async_16(base + row * Traits::kPitchBytes + chunk * 16, source + chunk * 8,
                  source != nullptr);
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

  // Takes a tile's values into the state.
  __device__ void attend_tile(int stage, const float (&logits)[kHeadTiles][4]) {
    uint32_t weights[kHeadTiles][2];
#pragma unroll
    for (int t = 0; t < kHeadTiles; ++t) {
      float p[4], decay[2];
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        float max = fmaxf(logits[t][c], logits[t][c + 2]);
#pragma unroll
        for (int i = 4; i < 32; i *= 2) max = fmaxf(max, __shfl_xor_sync(~0u, max, i));
        max = fmaxf(max, state.max[t][c]);
        const float origin = max == -INFINITY ? 0.0f : max;
        decay[c] = fast_exp2(state.max[t][c] - origin);
        p[c] = fast_exp2(logits[t][c] - origin + kRaise);
        p[c + 2] = fast_exp2(logits[t][c + 2] - origin + kRaise);
        state.sum[t][c] = state.sum[t][c] * decay[c] + p[c] + p[c + 2];
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
      weights[t][0] = movmatrix_trans(pack<T>(p[0], p[1]));
      weights[t][1] = movmatrix_trans(pack<T>(p[2], p[3]));
    }
    const uint32_t base = stages + stage * Traits::kStageBytes;
    const int row = lane % 8 + lane / 16 * 8, half = lane / 8 % 2;
#pragma unroll
    for (int d = 0; d < kSteps; ++d) {
      uint32_t values[4];
      ldmatrix_x4_trans(values,
                        base + row * Traits::kPitchBytes + kHeadSize * 2 + (d * 2 + half) * 16);
#pragma unroll
      for (int t = 0; t < kHeadTiles; ++t) {
        mma_m16n8k16<T>(state.out[t][d], values, weights[t][0], weights[t][1]);
      }
    }
  }
};

}  // namespace clusterkv::cuda
