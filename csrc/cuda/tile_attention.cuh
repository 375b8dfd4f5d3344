// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the vllm_clusterkv project
//
// Attention of one warp to tiles of 16 rows of K | V, with a running softmax of its own.
//
// Keys are the rows and query heads the columns of a fragment (S^T = K Q^T,
// O^T = V^T P^T), so up to eight query heads fill a tensor core's tile. Tiles come to
// shared memory by asynchronous copies, kStages deep and for each warp apart: no warp
// waits for another. Tiles of means come to registers, as short_means.py's words.
#pragma once

#include <type_traits>

#include "ptx.cuh"
#include "short_means.cuh"

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
  // Of some rows, rounded up to an integer: logits - max then has the fraction of a logit's bits
  // whatever the max, and weights of a logit differ by a power of 2, which rounding them
  // to 16 bits keeps.
  float max[kHeadTiles][2];
  float sum[kHeadTiles][2];                  // of this thread's rows only
  float raised[kHeadTiles][2];               // likewise of weights that have their steps
  float out[kHeadTiles][kHeadSize / 16][4];  // elements g and g + 8 of 16, not normalised

  __device__ WarpState() {
#pragma unroll
    for (int t = 0; t < kHeadTiles; ++t) {
      max[t][0] = max[t][1] = -INFINITY;
      sum[t][0] = sum[t][1] = raised[t][0] = raised[t][1] = 0.0f;
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
  static constexpr int kSegments = kHeadSize / 32;  // words of two means that a lane has
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
    constexpr int kChunks = Traits::kRowBytes / 16;
    const uint32_t to = stages + stage * Traits::kStageBytes;
    const uint64_t address = reinterpret_cast<uint64_t>(row_of_lane);
#pragma unroll
    for (int i = 0; i < kTileRows * kChunks / 32; ++i) {
      const int row = (i * 32 + lane) / kChunks, chunk = (i * 32 + lane) % kChunks;
      const T* source = reinterpret_cast<const T*>(__shfl_sync(~0u, address, row));
      cp_async_16(to + row * Traits::kPitchBytes + chunk * 16, source + chunk * 8,
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

  // Takes a tile's values into the state, with weights 2^logit.
  __device__ void attend_tile(int stage, const float (&logits)[kHeadTiles][4]) {
    uint32_t weights[kHeadTiles][2];
    weigh(logits, 1.0f, weights);
    const uint32_t base = stages + stage * Traits::kStageBytes + kHeadSize * 2;
    const int row = lane % 8 + lane / 16 * 8, half = lane / 8 % 2;
#pragma unroll
    for (int d = 0; d < kSteps; ++d) {
      uint32_t values[4];
      ldmatrix_x4_trans(values, base + row * Traits::kPitchBytes + (d * 2 + half) * 16);
#pragma unroll
      for (int t = 0; t < kHeadTiles; ++t) {
        mma_m16n8k16<T>(state.out[t][d], values, weights[t][0], weights[t][1]);
      }
    }
  }

  // Likewise the mean values of 16 clusters, with weights sign * 2^logit. This thread has the
  // words of clusters 2 j and 2 j + 1, and of 8 + those, and the steps of clusters g and g + 8.
  //
  // In bf16 a step is in its cluster's weight, and what raises codes is taken out of the output in
  // the end (`finish`): two instructions a pair of codes. fp16 has no room for such weights.
  __device__ void attend_means(const uint32_t (&words)[2][kSegments], const float (&steps)[2],
                               const float (&logits)[kHeadTiles][4], float sign) {
    uint32_t weights[kHeadTiles][2], pairs[2];
    weigh(logits, sign, steps, weights);
    if constexpr (!kStepsInWeights) {
      const uint32_t half_steps = pack<T>(0.5f * steps[0], 0.5f * steps[1]);
#pragma unroll
      for (int i = 0; i < 2; ++i) {  // of clusters 8 i + 2 j and 8 i + 2 j + 1
        const uint32_t low = __shfl_sync(~0u, half_steps, 8 * j);
        const uint32_t high = __shfl_sync(~0u, half_steps, 8 * j + 4);
        pairs[i] = __byte_perm(low, high, i == 0 ? 0x5410 : 0x7632);
      }
    }
#pragma unroll
    for (int d = 0; d < kSteps; ++d) {
      uint32_t values[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const uint32_t word = words[i / 2][d / 2];
        if constexpr (kStepsInWeights) {
          values[i] = raised_pair<T>(word, d % 2 * 2 + i % 2);
        } else {
          values[i] = multiply_pairs<T>(code_pair<T>(word, d % 2 * 2 + i % 2), pairs[i / 2]);
        }
      }
#pragma unroll
      for (int t = 0; t < kHeadTiles; ++t) {
        mma_m16n8k16<T>(state.out[t][d], values, weights[t][0], weights[t][1]);
      }
    }
  }

  // After the last means.
  __device__ void finish() {
    if constexpr (kStepsInWeights) {
#pragma unroll
      for (int t = 0; t < kHeadTiles; ++t) {
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          float raised = state.raised[t][c];
#pragma unroll
          for (int i = 4; i < 32; i *= 2) raised += __shfl_xor_sync(~0u, raised, i);
          raised *= kRaised<T> + 2 * kMiddleCode;
#pragma unroll
          for (int d = 0; d < kSteps; ++d) {
            state.out[t][d][c] -= raised;
            state.out[t][d][c + 2] -= raised;
          }
        }
      }
    }
  }

 private:
  static constexpr bool kStepsInWeights = std::is_same_v<T, __nv_bfloat16>;
  // Weights may be up to 2^kSlack: a maximum is looked for only when one would be more.
  static constexpr float kSlack = std::is_same_v<T, __half> ? 3.0f : 16.0f;

  // Weights of a tile's rows, sign * 2^logit, as columns of a product, and in the sums.
  __device__ void weigh(const float (&logits)[kHeadTiles][4], float sign,
                        uint32_t (&weights)[kHeadTiles][2]) {
    weigh_rows<false>(logits, sign, {1.0f, 1.0f}, weights);
  }

  // Likewise of means, times half their steps in bf16.
  __device__ void weigh(const float (&logits)[kHeadTiles][4], float sign, const float (&steps)[2],
                        uint32_t (&weights)[kHeadTiles][2]) {
    weigh_rows<kStepsInWeights>(logits, sign, steps, weights);
  }

  template <bool kWithSteps>
  __device__ void weigh_rows(const float (&logits)[kHeadTiles][4], float sign,
                             const float (&steps)[2], uint32_t (&weights)[kHeadTiles][2]) {
#pragma unroll
    for (int t = 0; t < kHeadTiles; ++t) {
      const float highest[2] = {fmaxf(logits[t][0], logits[t][2]),
                                fmaxf(logits[t][1], logits[t][3])};
      if (__any_sync(~0u, highest[0] > state.max[t][0] + kSlack ||
                              highest[1] > state.max[t][1] + kSlack)) {
        raise_max(t, highest);
      }
      float p[4];
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const float origin = state.max[t][c] == -INFINITY ? 0.0f : state.max[t][c];
        // In this order: origin - kRaise would round where logits are beyond 2^24.
        p[c] = sign * fast_exp2(logits[t][c] - origin + kRaise);
        p[c + 2] = sign * fast_exp2(logits[t][c + 2] - origin + kRaise);
      }
      // Weights are summed as they are applied, in 16 bits: their rounding is then one of
      // the weights, not of the output.
      uint32_t first = pack<T>(p[0], p[1]), last = pack<T>(p[2], p[3]);
      float2 a = unpack<T>(first), b = unpack<T>(last);
      state.sum[t][0] += a.x + b.x;
      state.sum[t][1] += a.y + b.y;
      if constexpr (kWithSteps) {
        first = pack<T>(p[0] * (0.5f * steps[0]), p[1] * (0.5f * steps[0]));
        last = pack<T>(p[2] * (0.5f * steps[1]), p[3] * (0.5f * steps[1]));
        a = unpack<T>(first);
        b = unpack<T>(last);
        state.raised[t][0] += a.x + b.x;
        state.raised[t][1] += a.y + b.y;
      }
      weights[t][0] = movmatrix_trans(first);
      weights[t][1] = movmatrix_trans(last);
    }
  }

  __device__ void raise_max(int t, const float (&highest)[2]) {
    float decay[2];
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      float max = highest[c];
#pragma unroll
      for (int i = 4; i < 32; i *= 2) max = fmaxf(max, __shfl_xor_sync(~0u, max, i));
      max = fmaxf(ceilf(max), state.max[t][c]);
      decay[c] = fast_exp2(state.max[t][c] - (max == -INFINITY ? 0.0f : max));
      state.max[t][c] = max;
      state.sum[t][c] *= decay[c];
      state.raised[t][c] *= decay[c];
    }
#pragma unroll
    for (int d = 0; d < kSteps; ++d) {
      state.out[t][d][0] *= decay[0];
      state.out[t][d][1] *= decay[1];
      state.out[t][d][2] *= decay[0];
      state.out[t][d][3] *= decay[1];
    }
  }
};

}  // namespace clusterkv::cuda
