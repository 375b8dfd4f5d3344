// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the vllm_clusterkv project
//
// Codes of keys, as vllm_clusterkv/key_codes.py defines them: writing a page's, and their
// products with queries. Dimensions come as four quarters of `num_fours` fours, since that
// is how a word has them: lane 4 g + quarter of a warp has columns g and g + 8.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <vector>

#include "../params.h"
#include "vec.h"

namespace clusterkv::cpu {

constexpr int64_t kColumns = 16;    // of a step
constexpr int64_t kQuarters = 4;    // of the coded dimensions
constexpr int64_t kFour = 4;        // dimensions that share half of a word's bytes
constexpr int64_t kGroupLanes = 8;  // lanes of a quarter, and columns apart in a word
constexpr int64_t kRunWords = 4;    // neighbouring words of a lane
constexpr int64_t kWordBytes = sizeof(uint32_t);
constexpr int64_t kMostCodedDims = num_coded_dims(256);

// Fours of a quarter, of a step.
inline int64_t num_fours(int64_t num_dims) { return num_dims / (kQuarters * kFour); }

// Words of a lane. Two fours share one.
inline int64_t num_code_words(int64_t num_dims) { return kCodeSteps * num_fours(num_dims) / 2; }

// Byte of a lane's word, from the first step's first.
inline int64_t word_offset(int64_t word, int64_t lane) {
  return ((word / kRunWords * kGroupLanes * kQuarters + lane) * kRunWords + word % kRunWords) *
         kWordBytes;
}

// Where a dimension's code is in its word, for columns below 8; the others' is a byte on.
inline int shift_of(int64_t four, int64_t i) {
  return static_cast<int>(four % 2 * 4 + i / 2 * 2 + i % 2 * 16);
}

// The dimensions of the largest profile, ties to the lowest; ascending.
//   profile: [head_size] T; a NaN is larger than any number
template <typename T>
void choose_dims(const T* profile, int64_t head_size, int64_t num_dims,
                 std::vector<uint16_t>& all) {
  const auto is_larger = [](float a, float b) { return a > b || (a != a && b == b); };
  all.resize(head_size);
  std::iota(all.begin(), all.end(), 0);
  std::partial_sort(all.begin(), all.begin() + num_dims, all.end(), [&](uint16_t a, uint16_t b) {
    const float x = widen(profile[a]), y = widen(profile[b]);
    if (is_larger(x, y)) return true;
    return !is_larger(y, x) && a < b;
  });
  std::sort(all.begin(), all.begin() + num_dims);
}

// A page and KV head's codes, and scratch to write them.
class CodeWriter {
 public:
  // keys:   [num_rows, head_size] fp32
  // labels: [num_rows]
  // means:  [num_clusters, head_size] T, mean_stride apart, as stored
  // spread: [head_size + num_clusters] T, as stored
  // codes:  [code_bytes(head_size, sizeof(T))]. Written
  template <typename T>
  void write(const float* keys, const int32_t* labels, int64_t num_rows, const T* means,
             int64_t mean_stride, const T* spread, int64_t head_size, int64_t num_clusters,
             uint8_t* codes) {
    const int64_t num_dims = num_coded_dims(head_size);
    choose_dims(spread, head_size, num_dims, dims_);
    T deviations[kMostCodedDims];
    for (int64_t i = 0; i < num_dims; ++i) {
      deviations[i] = static_cast<T>(std::sqrt(widen(spread[dims_[i]])));
    }
    std::memcpy(codes, deviations, num_dims * sizeof(T));
    codes += num_dims * sizeof(T);
    std::memcpy(codes, dims_.data(), num_dims * sizeof(uint16_t));
    codes += num_dims * sizeof(uint16_t);
    means_.resize(num_clusters * num_dims);
    steps_.resize(num_clusters * num_dims);
    for (int64_t c = 0; c < num_clusters; ++c) {
      const float radius = widen(spread[head_size + c]);
      for (int64_t i = 0; i < num_dims; ++i) {
        means_[c * num_dims + i] = widen(means[c * mean_stride + dims_[i]]);
        steps_[c * num_dims + i] = 2 * kCodeStep * widen(deviations[i]) * radius;
      }
    }
    rows_.resize(num_rows * num_dims);
    outer_.resize(num_rows);
    members_.assign(num_clusters, {});
    for (int64_t row = 0; row < num_rows; ++row) {
      encode(keys + row * head_size, labels[row], num_dims, row);
      members_[labels[row]].push_back(static_cast<int>(row));
    }
    std::fill_n(codes, kQuarters * kCodeSteps * num_dims, uint8_t{0});
    const int64_t num_keys = num_coded_keys(num_clusters);
    // Columns behind the clusters' have further keys of them, steps behind further clusters.
    const int64_t steps = std::min(num_keys, kCodeSteps);
    for (int64_t c = 0; c < num_clusters; ++c) {
      std::vector<int>& rows = members_[c];
      if (rows.empty()) continue;
      std::stable_sort(rows.begin(), rows.end(),
                       [&](int a, int b) { return outer_[a] > outer_[b]; });
      const int64_t num_kept = std::min<int64_t>(rows.size(), num_keys);
      for (int64_t key = 0; key < num_keys; ++key) {
        put(rows_.data() + rows[key % num_kept] * num_dims, c / kColumns * steps + key % steps,
            c % kColumns + key / steps * kGroupLanes, num_dims, codes);
      }
    }
    make_finite(codes, kQuarters * kCodeSteps * num_dims);
  }

 private:
  void encode(const float* key, int64_t cluster, int64_t num_dims, int64_t row) {
    const float* mean = means_.data() + cluster * num_dims;
    const float* step = steps_.data() + cluster * num_dims;
    uint8_t* levels = rows_.data() + row * num_dims;
    float coded[kMostCodedDims];
    int found[kMostCodedDims], num_outer = 0;
    for (int64_t i = 0; i < num_dims; ++i) coded[i] = key[dims_[i]];
#pragma omp simd reduction(+ : num_outer)
    for (int64_t i = 0; i < num_dims; ++i) {
      const float off = coded[i] - mean[i];
      found[i] = (off >= -step[i]) + (off >= 0.0f) + (off >= step[i]);
      num_outer += (found[i] == 0) + (found[i] == 3);
    }
    for (int64_t i = 0; i < num_dims; ++i) levels[i] = static_cast<uint8_t>(found[i]);
    outer_[row] = num_outer;
  }

  // One bit less where 16 are a number that is not finite in fp16; in bf16 and fp32 that
  // takes more. See key_codes.py.
  static void make_finite(uint8_t* codes, int64_t num_bytes) {
    constexpr uint16_t kExponent = 0x7c00, kBit = 0x4000;
    for (int64_t i = 0; i < num_bytes; i += sizeof(uint16_t)) {
      uint16_t half;
      std::memcpy(&half, codes + i, sizeof(half));
      if ((half & kExponent) == kExponent) half &= static_cast<uint16_t>(~kBit);
      std::memcpy(codes + i, &half, sizeof(half));
    }
  }

  static void put(const uint8_t* levels, int64_t step, int64_t column, int64_t num_dims,
                  uint8_t* codes) {
    const int64_t fours = num_fours(num_dims);
    for (int64_t quarter = 0; quarter < kQuarters; ++quarter) {
      const int64_t lane = column % kGroupLanes * kQuarters + quarter;
      for (int64_t four = step * fours; four < (step + 1) * fours; ++four) {
        uint8_t* word = codes + word_offset(four / 2, lane) + column / kGroupLanes;
        for (int64_t i = 0; i < kFour; ++i) {
          const int shift = shift_of(four, i);
          word[shift / 8] |= static_cast<uint8_t>(*levels++ << shift % 8);
        }
      }
    }
  }

  std::vector<uint16_t> dims_;             // [head_size], first those that are coded
  std::vector<float> means_, steps_;       // [num_clusters, num_dims], of keys and between levels
  std::vector<uint8_t> rows_;              // [num_rows, num_dims], codes
  std::vector<int> outer_;                 // [num_rows], codes of 0 or 3
  std::vector<std::vector<int>> members_;  // [num_clusters, a cluster's keys], rows
};

// fp16's nearest to numbers that it has room for, ties to even; a NaN stays one.
inline Vec rounded_to_half(Vec x) {
  const VecBits bits = __builtin_bit_cast(VecBits, x);
  const VecBits up = bits + 0xfffu + (bits >> 13 & 1u);
  const Vec normal = __builtin_bit_cast(Vec, up & 0xffffe000u);
  const Vec subnormal = (x + 0.75f) - 0.75f;  // multiples of 2^-24
  const VecInts is_normal = (x >= 0x1p-14f) | (x <= -0x1p-14f);
  return is_normal ? normal : subnormal;
}

// best[h * kColumns + column] = max over steps of sum over dimensions of weight * code
//   words:   [kQuarters, num_code_words, kColumns]
//   weights: [num_dims, group], from the first of kHeads heads on
// A NaN is passed over. Not inlined: its sums need every register.
template <int kHeads>
[[gnu::noinline]] void best_products(const uint32_t* __restrict words,
                                     const float* __restrict weights, int64_t group,
                                     int64_t num_dims, int64_t first_step, int64_t num_steps,
                                     float* __restrict best) {
  constexpr int kVecs = kColumns / kLanes;
  const int64_t fours = num_fours(num_dims), num_words = num_code_words(num_dims);
  std::fill_n(best, kHeads * kColumns, -std::numeric_limits<float>::infinity());
  for (int64_t step = first_step; step < first_step + num_steps; ++step) {
    Vec sums[kHeads][kVecs];
#pragma GCC unroll 4
    for (int h = 0; h < kHeads; ++h) std::fill_n(sums[h], kVecs, Vec{});
    const float* weight = weights;
    for (int64_t quarter = 0; quarter < kQuarters; ++quarter) {
      for (int64_t four = step * fours; four < (step + 1) * fours; ++four) {
        const uint32_t* of_columns = words + (quarter * num_words + four / 2) * kColumns;
        VecBits bits[kVecs];
        for (int v = 0; v < kVecs; ++v) {
          bits[v] = load<VecBits>(of_columns + v * kLanes) >> shift_of(four, 0);
        }
#pragma GCC unroll 4
        for (int i = 0; i < kFour; ++i) {
          Vec codes[kVecs];
          for (int v = 0; v < kVecs; ++v) {
            const VecBits code = bits[v] >> shift_of(0, i) & 3u;
            codes[v] = __builtin_convertvector(__builtin_bit_cast(VecInts, code), Vec);
          }
#pragma GCC unroll 4
          for (int h = 0; h < kHeads; ++h) {
            for (int v = 0; v < kVecs; ++v) sums[h][v] += weight[h] * codes[v];
          }
          weight += group;
        }
      }
    }
    for (int h = 0; h < kHeads; ++h) {
      for (int v = 0; v < kVecs; ++v) {
        float* so_far = best + h * kColumns + v * kLanes;
        const Vec highest = load<Vec>(so_far);
        const Vec higher = sums[h][v] > highest ? sums[h][v] : highest;
        std::memcpy(so_far, &higher, sizeof(higher));
      }
    }
  }
}

// What a group of query heads finds in the codes of pages.
class CodeReader {
 public:
  CodeReader(int64_t group, int64_t head_size)
      : group_(group),
        head_size_(head_size),
        num_dims_(num_coded_dims(head_size)),
        query_(group * head_size),
        weights_(group * num_dims_),
        totals_(group),
        words_(kQuarters * num_code_words(num_dims_) * kColumns),
        best_(group * kColumns) {}

  // query: [head_size], of head g
  template <typename T>
  void set_query(int64_t g, const T* query) {
    for (int64_t d = 0; d < head_size_; ++d) query_[d * group_ + g] = widen(query[d]);
  }

  // Of each cluster the largest product of its coded keys, less their mean, with the query,
  // over kCodeStep and the cluster's radius. NaN where a weight is.
  //   codes: as stored of a page and KV head
  //   best:  [group, num_clusters]
  template <typename T>
  void best_keys(const uint8_t* codes, int64_t num_clusters, float* best) {
    weigh<T>(codes);
    spread_words(codes + num_dims_ * (sizeof(T) + sizeof(uint16_t)));
    const int64_t num_parts = std::max<int64_t>(1, num_clusters / kColumns);
    const int64_t steps = kCodeSteps / num_parts, columns = std::min(num_clusters, kColumns);
    for (int64_t part = 0; part < num_parts; ++part) {
      for_head_blocks(group_, [&](auto heads, int64_t first) {
        best_products<decltype(heads)::value>(words_.data(), weights_.data() + first, group_,
                                              num_dims_, part * steps, steps,
                                              best_.data() + first * kColumns);
      });
      for (int64_t g = 0; g < group_; ++g) {
        float* of_columns = best_.data() + g * kColumns;
        if (columns < kColumns) {  // those behind have further keys of the same clusters
          for (int64_t c = 0; c < columns; ++c) {
            of_columns[c] = std::max(of_columns[c], of_columns[columns + c]);
          }
        }
        float* of_clusters = best + g * num_clusters + part * kColumns;
        // A level is twice the code, less 3.
        for (int64_t c = 0; c < columns; ++c) of_clusters[c] = 2 * of_columns[c] - 3 * totals_[g];
      }
    }
  }

 private:
  // Query times deviation, as tensor cores take it: rounded to fp16.
  template <typename T>
  void weigh(const uint8_t* codes) {
    T deviations[kMostCodedDims];
    std::memcpy(deviations, codes, num_dims_ * sizeof(T));
    uint16_t dims[kMostCodedDims];
    std::memcpy(dims, codes + num_dims_ * sizeof(T), num_dims_ * sizeof(uint16_t));
    for_head_blocks(group_, [&](auto heads, int64_t first) {
      constexpr int kHeads = decltype(heads)::value;
      for (int64_t i = 0; i < num_dims_; ++i) {
        const int64_t dim = std::min<int64_t>(dims[i], head_size_ - 1);
        const float deviation = widen(deviations[i]);
        float* weights = weights_.data() + i * group_ + first;
        const float* query = query_.data() + dim * group_ + first;
        for (int h = 0; h < kHeads; ++h) weights[h] = query[h] * deviation;
      }
    });
    for (int64_t i = 0; i < num_dims_ * group_; i += kLanes) {  // num_dims_ is a multiple
      Vec x = load<Vec>(weights_.data() + i);
      x = x > kLargestWeight ? Vec{} + kLargestWeight : x;
      x = x < -kLargestWeight ? Vec{} - kLargestWeight : x;
      x = rounded_to_half(x);
      std::memcpy(weights_.data() + i, &x, sizeof(x));
    }
    for_head_blocks(group_, [&](auto heads, int64_t first) {
      constexpr int kHeads = decltype(heads)::value;
      float totals[kHeads] = {};
      for (int64_t i = 0; i < num_dims_; ++i) {
        for (int h = 0; h < kHeads; ++h) totals[h] += weights_[i * group_ + first + h];
      }
      std::copy_n(totals, kHeads, totals_.begin() + first);
    });
  }

  // From the order of lanes to that of columns, with the code of every column in the same
  // bits: 4 x 4 words at a time.
  void spread_words(const uint8_t* steps) {
    typedef uint32_t Words __attribute__((vector_size(kRunWords * kWordBytes)));
    const int64_t num_words = num_code_words(num_dims_);
    for (int64_t quarter = 0; quarter < kQuarters; ++quarter) {
      for (int64_t word = 0; word < num_words; word += kRunWords) {
        for (int64_t column = 0; column < kGroupLanes; column += kRunWords) {
          Words in[kRunWords];
          for (int i = 0; i < kRunWords; ++i) {
            in[i] = load<Words>(steps + word_offset(word, (column + i) * kQuarters + quarter));
          }
          const Words a = __builtin_shufflevector(in[0], in[1], 0, 4, 1, 5);
          const Words b = __builtin_shufflevector(in[2], in[3], 0, 4, 1, 5);
          const Words c = __builtin_shufflevector(in[0], in[1], 2, 6, 3, 7);
          const Words d = __builtin_shufflevector(in[2], in[3], 2, 6, 3, 7);
          const Words out[kRunWords] = {
              __builtin_shufflevector(a, b, 0, 1, 4, 5), __builtin_shufflevector(a, b, 2, 3, 6, 7),
              __builtin_shufflevector(c, d, 0, 1, 4, 5), __builtin_shufflevector(c, d, 2, 3, 6, 7)};
          for (int i = 0; i < kRunWords; ++i) {
            uint32_t* to = words_.data() + (quarter * num_words + word + i) * kColumns + column;
            const Words of_others = out[i] >> 8;
            std::memcpy(to, &out[i], sizeof(out[i]));
            std::memcpy(to + kGroupLanes, &of_others, sizeof(of_others));
          }
        }
      }
    }
  }

  int64_t group_, head_size_, num_dims_;
  std::vector<float> query_;     // [head_size, group]
  std::vector<float> weights_;   // [num_dims, group]
  std::vector<float> totals_;    // [group], of weights
  std::vector<uint32_t> words_;  // [kQuarters, num_code_words, kColumns]
  std::vector<float> best_;      // [group, kColumns]
};

}  // namespace clusterkv::cpu
