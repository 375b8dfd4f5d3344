// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the vllm_clusterkv project
//
// Means of 4 bits an element, as vllm_clusterkv/short_means.py defines them: writing a page's,
// and products of their codes. A vector of words has eight vectors of codes, one a nibble, and
// no code is moved from its lane: the other factor, or the sum, is in the order of the codes.
#pragma once

#include <cmath>
#include <vector>

#include "../params.h"
#include "vec.h"

namespace clusterkv::cpu {

constexpr int kNibbles = 8;      // of a word
constexpr int kPairNibbles = 4;  // of a word of values, of each of its two clusters
constexpr int64_t kWordBytes = sizeof(uint32_t);

inline int64_t num_segments(int64_t head_size) { return padded_dims(head_size) / 32; }

// Vectors that hold so many words. The last one may reach beyond them, never beyond the index.
inline int64_t num_vecs(int64_t num_words) { return (num_words + kLanes - 1) / kLanes; }

inline int64_t key_words(int64_t head_size) { return 4 * num_segments(head_size); }  // of a cluster
inline int64_t value_words(int64_t head_size) { return 8 * num_segments(head_size); }  // of two

// Word and nibble of a dimension: of a cluster's keys, and of two clusters' values, whose
// second one has its nibbles kPairNibbles higher.
inline int64_t key_word(int64_t head_size, int64_t d) {
  return d % 32 / 8 * num_segments(head_size) + d / 32;
}
inline int64_t key_nibble(int64_t d) { return d % 8 / 2 + 4 * (d % 2); }
inline int64_t value_word(int64_t head_size, int64_t d) {
  return d % 8 * num_segments(head_size) + d / 32;
}
inline int64_t value_nibble(int64_t d) { return d % 32 / 8; }

// Where factors of mean keys, and sums of mean values, have a dimension, and their size.
inline int64_t key_place(int64_t head_size, int64_t d) {
  const int64_t word = key_word(head_size, d);
  return (word / kLanes * kNibbles + key_nibble(d)) * kLanes + word % kLanes;
}
inline int64_t num_key_places(int64_t head_size) {
  return num_vecs(key_words(head_size)) * kNibbles * kLanes;
}
inline int64_t value_place(int64_t head_size, int64_t d) {
  const int64_t word = value_word(head_size, d);
  return (word / kLanes * kPairNibbles + value_nibble(d)) * kLanes + word % kLanes;
}
inline int64_t num_value_places(int64_t head_size) {
  return num_vecs(value_words(head_size)) * kPairNibbles * kLanes;
}

// The codes in a nibble of each word, less the middle one. As bits of the mantissa of
// 2^(23 - bit), with `bit` at least 1 so that halves have one too, they are off by that alone.
[[gnu::always_inline]] inline Vec codes_of(VecBits words, int nibble) {
  const int bit = 4 * (nibble % 4 + 1);
  const VecBits moved = nibble < 4 ? words << 4 : words >> 12;
  const VecBits raised = (moved & (15u << bit)) | (127u + 23 - bit) << 23;
  return __builtin_bit_cast(Vec, raised) - (static_cast<float>(1 << (23 - bit)) + kMiddleCode);
}

// dots[h * dot_stride + c] = factors[h] . codes of mean key c
//   factors: [kHeads, num_key_places]
//   codes: of a page's mean keys
// While it works, it asks for as much at `next`. One sum_lanes has the sums of as many clusters
// as give it four; more would not stay in registers.
template <int kHeads>
[[gnu::noinline]] void dot_key_codes(const float* __restrict factors, const uint8_t* codes,
                                     const uint8_t* next, int64_t num_clusters, int64_t head_size,
                                     float* __restrict dots, int64_t dot_stride) {
  constexpr int kAtOnce = 4 / kHeads;
  const int64_t words = key_words(head_size), places = num_key_places(head_size);
  for (int64_t c = 0; c < num_clusters; c += kAtOnce) {
    Vec sums[4] = {};
    for (int64_t word = 0; word < words; word += kLanes) {
      VecBits loaded[kAtOnce];
#pragma GCC unroll 4
      for (int i = 0; i < kAtOnce; ++i) {
        const int64_t offset = ((c + i) * words + word) * kWordBytes;
        __builtin_prefetch(next + offset);
        loaded[i] = load<VecBits>(codes + offset);
      }
#pragma GCC unroll 8
      for (int nibble = 0; nibble < kNibbles; ++nibble) {
        Vec numbers[kAtOnce];
#pragma GCC unroll 4
        for (int i = 0; i < kAtOnce; ++i) numbers[i] = codes_of(loaded[i], nibble);
#pragma GCC unroll 4
        for (int h = 0; h < kHeads; ++h) {
          const Vec factor = load<Vec>(factors + h * places + word * kNibbles + nibble * kLanes);
#pragma GCC unroll 4
          for (int i = 0; i < kAtOnce; ++i) sums[i * kHeads + h] += factor * numbers[i];
        }
      }
    }
    const Vec4 total = sum_lanes(sums);
#pragma GCC unroll 4
    for (int i = 0; i < kAtOnce; ++i) {
#pragma GCC unroll 4
      for (int h = 0; h < kHeads; ++h) dots[h * dot_stride + c + i] = total[i * kHeads + h];
    }
  }
}

// sums[h] += sum over clusters of weights[h * weight_stride + c] * codes of mean value c
//   codes: of a page's mean values
//   sums: [kHeads, num_value_places]
// While it works, it asks for as much at `next`.
template <int kHeads>
[[gnu::noinline]] void add_weighted_codes(const float* __restrict weights, int64_t weight_stride,
                                          const uint8_t* codes, const uint8_t* next,
                                          int64_t num_clusters, int64_t head_size,
                                          float* __restrict sums) {
  const int64_t words = value_words(head_size), places = num_value_places(head_size);
  for (int64_t word = 0; word < words; word += kLanes) {
    Vec total[kHeads][kPairNibbles];
    for (int h = 0; h < kHeads; ++h) {
      std::memcpy(total[h], sums + h * places + word * kPairNibbles, sizeof(total[h]));
    }
    for (int64_t c = 0; c < num_clusters; c += 2) {
      const int64_t offset = (c / 2 * words + word) * kWordBytes;
      __builtin_prefetch(next + offset);
      const VecBits loaded = load<VecBits>(codes + offset);
#pragma GCC unroll 2
      for (int of_pair = 0; of_pair < 2; ++of_pair) {
#pragma GCC unroll 4
        for (int nibble = 0; nibble < kPairNibbles; ++nibble) {
          const Vec numbers = codes_of(loaded, of_pair * kPairNibbles + nibble);
          for (int h = 0; h < kHeads; ++h) {
            total[h][nibble] += weights[h * weight_stride + c + of_pair] * numbers;
          }
        }
      }
    }
    for (int h = 0; h < kHeads; ++h) {
      std::memcpy(sums + h * places + word * kPairNibbles, total[h], sizeof(total[h]));
    }
  }
}

// Writes means to a page's index.
template <typename T>
class MeanWriter {
 public:
  MeanWriter(const IndexFields& fields, int64_t head_size, int64_t num_clusters, uint8_t* index)
      : fields_(fields), head_size_(head_size), num_clusters_(num_clusters), index_(index) {}

  // means:  [num_clusters, head_size] fp32, left as distances from the base, in deviations
  // counts: [num_clusters]; the mean of an empty cluster does not matter
  void write_keys(float* means, const int32_t* counts) const {
    T* base = at<T>(fields_.key_base);
    T* deviations = at<T>(fields_.key_deviations);
    std::vector<float> sums(head_size_), squares(head_size_);
    float number = 0.0f;
    for (int64_t c = 0; c < num_clusters_; ++c) {
      if (counts[c] == 0) continue;
      number += 1.0f;
      for (int64_t d = 0; d < head_size_; ++d) sums[d] += means[c * head_size_ + d];
    }
    for (int64_t d = 0; d < head_size_; ++d) base[d] = static_cast<T>(sums[d] / number);
    for (int64_t c = 0; c < num_clusters_; ++c) {
      if (counts[c] == 0) continue;
      float* mean = means + c * head_size_;
      for (int64_t d = 0; d < head_size_; ++d) {
        mean[d] -= widen(base[d]);
        squares[d] += mean[d] * mean[d];
      }
    }
    for (int64_t d = 0; d < head_size_; ++d) {
      deviations[d] = static_cast<T>(std::sqrt(squares[d] / number));
    }
    for (int64_t c = 0; c < num_clusters_; ++c) {
      float* mean = means + c * head_size_;
      for (int64_t d = 0; d < head_size_; ++d) {
        const float deviation = widen(deviations[d]);
        mean[d] = deviation > 0.0f ? mean[d] / deviation : 0.0f;
      }
    }
    write_codes(means, counts, fields_.key_steps, 0, [&](int64_t c, int64_t d) {
      return kNibbles * (c * key_words(head_size_) + key_word(head_size_, d)) + key_nibble(d);
    });
  }

  // Arguments as of write_keys; the means stay.
  void write_values(const float* means, const int32_t* counts) const {
    const auto place = [&](int64_t c, int64_t d) {
      return kNibbles * (c / 2 * value_words(head_size_) + value_word(head_size_, d)) +
             c % 2 * kPairNibbles + value_nibble(d);
    };
    write_codes(means, counts, fields_.value_steps, fields_.value_codes, place);
  }

 private:
  template <typename Element>
  Element* at(int64_t offset) const {
    return reinterpret_cast<Element*>(index_ + offset);
  }

  // Place: number of the nibble of an element, from the first one's.
  template <typename Place>
  void write_codes(const float* means, const int32_t* counts, int64_t steps_at, int64_t codes_at,
                   const Place& place) const {
    T* steps = at<T>(steps_at);
    uint8_t* codes = index_ + codes_at;
    const int64_t num_bytes = fields_.value_codes;  // those of the keys, and as many of values
    std::fill_n(codes, num_bytes, uint8_t{0});
    for (int64_t c = 0; c < num_clusters_; ++c) {
      const float* mean = means + c * head_size_;
      uint32_t largest = 0;  // bits of a magnitude: not-a-number is above all
      for (int64_t d = 0; d < head_size_ && counts[c] > 0; ++d) {
        largest = std::max(largest, __builtin_bit_cast(uint32_t, mean[d]) & 0x7fffffffu);
      }
      steps[c] = static_cast<T>(__builtin_bit_cast(float, largest) / kMiddleCode);
      const float step = widen(steps[c]);
      for (int64_t d = 0; d < head_size_; ++d) {
        const float code = std::nearbyint((step > 0.0f ? mean[d] / step : 0.0f) + kMiddleCode);
        const auto bounded = static_cast<uint8_t>(code > 0.0f ? std::min(code, 15.0f) : 0.0f);
        const int64_t nibble = place(c, d);
        codes[nibble / 2] |= static_cast<uint8_t>(bounded << nibble % 2 * 4);
      }
    }
    make_finite(codes, num_bytes);
  }

  // One code of four lower by one where their 16 bits are no finite number in fp16; in bf16
  // that takes more.
  static void make_finite(uint8_t* codes, int64_t num_bytes) {
    constexpr uint16_t kExponent = 0x7c00, kOne = 0x1000;
    for (int64_t i = 0; i < num_bytes; i += sizeof(uint16_t)) {
      uint16_t half;
      std::memcpy(&half, codes + i, sizeof(half));
      if ((half & kExponent) == kExponent) half &= static_cast<uint16_t>(~kOne);
      std::memcpy(codes + i, &half, sizeof(half));
    }
  }

  const IndexFields& fields_;
  const int64_t head_size_, num_clusters_;
  uint8_t* const index_;
};

}  // namespace clusterkv::cpu
