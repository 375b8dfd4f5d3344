// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the vllm_clusterkv project
//
// Row primitives of the CPU kernels. Element-wise work is plain loops that the
// compiler vectorizes; what has to stay in registers is written with Vec, the
// vector extension of GCC and Clang, which compiles for every architecture.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#pragma GCC diagnostic ignored "-Wpsabi"  // every Vec function is inlined: it has no ABI

namespace clusterkv::cpu {

using BFloat16 = c10::BFloat16;
using Half = c10::Half;

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float Vec __attribute__((vector_size(kLanes * sizeof(float))));
typedef uint32_t VecBits __attribute__((vector_size(kLanes * sizeof(float))));
typedef int32_t VecInts __attribute__((vector_size(kLanes * sizeof(float))));
typedef float Vec4 __attribute__((vector_size(4 * sizeof(float))));

// Rows are widened to fp32 in packed order: in every whole block of kBlock elements
// of a 16-bit type the even ones come first, then the odd ones, so that widening is
// a shift or a mask. Dot products and weighted sums do not mind the order, as long
// as both sides have it; store_packed undoes it.
constexpr int kBlock = 2 * kLanes;
static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "the low half is the even element");

inline float widen(float x) { return x; }

inline float widen(BFloat16 x) {
  return __builtin_bit_cast(float, static_cast<uint32_t>(x.x) << 16);
}

// fp16 by integer arithmetic, on a scalar or on a vector: without _Float16 in every
// compiler, this is what vectorizes. Exponent and mantissa move to fp32 place; a
// multiplication by 2^112 rebiases the exponent and normalises subnormals; infinity
// and NaN keep an all-ones exponent.
template <typename Float, typename Bits>
inline Float widen_half_bits(Bits bits) {
  const Bits sign = (bits & 0x8000u) << 16, magnitude = (bits & 0x7fffu) << 13;
  const Float scaled = __builtin_bit_cast(Float, magnitude) * 0x1p112f;
  const Bits special = magnitude >= 0x0f800000u ? Bits{} + 0x7f800000u : Bits{};
  return __builtin_bit_cast(Float, __builtin_bit_cast(Bits, scaled) | special | sign);
}

inline float widen(Half x) { return widen_half_bits<float>(static_cast<uint32_t>(x.x)); }

template <typename Float>
using BitsOf = std::conditional_t<std::is_same_v<Float, float>, uint32_t, VecBits>;

// Rounds away so many bits of the mantissa: to nearest, ties to even.
template <typename Float>
inline Float round_bits(Float x, int num_bits) {
  const auto bits = __builtin_bit_cast(BitsOf<Float>, x);
  const uint32_t unit = 1u << num_bits;
  const BitsOf<Float> up = bits + (unit / 2 - 1) + (bits >> num_bits & 1);
  return x == x ? __builtin_bit_cast(Float, up & ~(unit - 1)) : x;
}

// Numbers as a type has them, in fp32, on a scalar or on a vector. The last argument says which.
template <typename Float>
inline Float rounded(Float x, float) {
  return x;
}

template <typename Float>
inline Float rounded(Float x, BFloat16) {
  return round_bits(x, 16);
}

// For magnitudes up to 65504. Adding 0.5 leaves of a subnormal what fp16 has of it.
template <typename Float>
inline Float rounded(Float x, Half) {
  using Bits = BitsOf<Float>;
  const auto bits = __builtin_bit_cast(Bits, x);
  const auto magnitude = __builtin_bit_cast(Float, bits & 0x7fffffffu);
  const Float subnormal = (magnitude + 0.5f) - 0.5f;
  const Bits with_sign = __builtin_bit_cast(Bits, subnormal) | (bits & 0x80000000u);
  return magnitude < 0x1p-14f ? __builtin_bit_cast(Float, with_sign) : round_bits(x, 13);
}

template <typename V, typename T>
inline V load(const T* src) {
  V v;
  std::memcpy(&v, src, sizeof(v));
  return v;
}

// One block in packed order, its two halves.
inline void load_block(const float* src, Vec& first, Vec& second) {
  first = load<Vec>(src);
  second = load<Vec>(src + kLanes);
}

inline void load_block(const BFloat16* src, Vec& even, Vec& odd) {
  const VecBits bits = load<VecBits>(src);
  even = __builtin_bit_cast(Vec, bits << 16);
  odd = __builtin_bit_cast(Vec, bits & 0xffff0000u);
}

inline void load_block(const Half* src, Vec& even, Vec& odd) {
  const VecBits bits = load<VecBits>(src);
  even = widen_half_bits<Vec>(bits & 0xffffu);
  odd = widen_half_bits<Vec>(bits >> 16);
}

// Asks for n elements to be brought to the nearest cache. The rows of a page are too
// far from those of the next for the processor to foresee them.
template <typename T>
inline void prefetch(const T* src, int64_t n) {
  constexpr int64_t kLineBytes = 64;
  const char* bytes = reinterpret_cast<const char*>(src);
  const int64_t num_bytes = n * static_cast<int64_t>(sizeof(T));
  for (int64_t i = 0; i < num_bytes; i += kLineBytes) __builtin_prefetch(bytes + i);
}

template <typename T>
inline void prefetch_block(const T* src) {
  prefetch(src, kBlock);
}

// Widens a row, in its own order.
template <typename T>
inline void load_row(const T* __restrict src, float* __restrict dst, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) dst[i] = widen(src[i]);
}

template <typename T>
inline void load_packed(const T* __restrict src, float* __restrict dst, int64_t n) {
  int64_t i = 0;
  for (; i + kBlock <= n; i += kBlock) {
    Vec halves[2];
    load_block(src + i, halves[0], halves[1]);
    std::memcpy(dst + i, halves, sizeof(halves));
  }
  for (; i < n; ++i) dst[i] = widen(src[i]);
}

template <typename T>
inline void store_row(const float* __restrict src, T* __restrict dst, int64_t n) {
  for (int64_t i = 0; i < n; ++i) dst[i] = static_cast<T>(src[i]);
}

template <typename T>
inline void store_packed(const float* __restrict src, T* __restrict dst, int64_t n) {
  if (sizeof(T) == sizeof(float)) return store_row(src, dst, n);
  int64_t i = 0;
  for (; i + kBlock <= n; i += kBlock) {
    for (int j = 0; j < kLanes; ++j) {
      dst[i + 2 * j] = static_cast<T>(src[i + j]);
      dst[i + 2 * j + 1] = static_cast<T>(src[i + kLanes + j]);
    }
  }
  store_row(src + i, dst + i, n - i);
}

// Where a packed row of n elements has element d.
template <typename T>
inline int64_t packed_place(int64_t d, int64_t n) {
  if (sizeof(T) == sizeof(float) || d >= n / kBlock * kBlock) return d;
  return d / kBlock * kBlock + d % 2 * kLanes + d % kBlock / 2;
}

inline float dot(const float* __restrict a, const float* __restrict b, int64_t n) {
  float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) sum += a[i] * b[i];
  return sum;
}

// Folds neighbouring runs of kRun lanes into one; results of a and b alternate by run.
template <int kRun, typename Fold, size_t... lane>
inline Vec fold_runs(Vec a, Vec b, Fold fold, std::index_sequence<lane...>) {
  return fold(__builtin_shufflevector(a, b, (lane / kRun % 2 ? kLanes + lane - kRun : lane)...),
              __builtin_shufflevector(a, b, (lane / kRun % 2 ? kLanes + lane : lane + kRun)...));
}

// Folds the lanes of each vector into one: all four for little more than the price
// of one, and in the same order whatever the compiler.
template <typename Fold>
inline Vec4 fold_lanes(const Vec (&v)[4], Fold fold) {
  constexpr auto lanes = std::make_index_sequence<kLanes>();
  const Vec folded = fold_runs<2>(fold_runs<1>(v[0], v[1], fold, lanes),
                                  fold_runs<1>(v[2], v[3], fold, lanes), fold, lanes);
  Vec4 parts[kLanes / 4];
  std::memcpy(parts, &folded, sizeof(folded));
  for (int i = 1; i < kLanes / 4; ++i) parts[0] = fold(parts[0], parts[i]);
  return parts[0];
}

inline Vec4 sum_lanes(const Vec (&v)[4]) {
  return fold_lanes(v, [](auto a, auto b) { return a + b; });
}

// For vectors without NaN.
inline Vec4 max_lanes(const Vec (&v)[4]) {
  return fold_lanes(v, [](auto a, auto b) { return b > a ? b : a; });
}

constexpr int kDotRows = 4;  // rows that dot_rows takes at once

// dots[h * dot_stride + i] = queries[h] . rows[i]
//   queries: [kHeads, n] in packed order
// While it works, it asks for rows[ahead + i]. Not inlined: its sums need every register.
template <int kHeads, typename T>
[[gnu::noinline]] void dot_rows(const float* __restrict queries, const T* const* rows,
                                int64_t ahead, int64_t n, float* __restrict dots,
                                int64_t dot_stride) {
  Vec sums[4][kDotRows];
#pragma GCC unroll 4
  for (int h = 0; h < kHeads; ++h) std::fill_n(sums[h], kDotRows, Vec{});
  int64_t d = 0;
  for (; d + kBlock <= n; d += kBlock) {
    Vec keys[kDotRows][2];
    for (int i = 0; i < kDotRows; ++i) {
      prefetch_block(rows[ahead + i] + d);
      load_block(rows[i] + d, keys[i][0], keys[i][1]);
    }
    for (int h = 0; h < kHeads; ++h) {
      for (int half = 0; half < 2; ++half) {
        const Vec query = load<Vec>(queries + h * n + d + half * kLanes);
        for (int i = 0; i < kDotRows; ++i) sums[h][i] += query * keys[i][half];
      }
    }
  }
#pragma GCC unroll 4
  for (int h = 0; h < kHeads; ++h) {
    const Vec4 total = sum_lanes(sums[h]);
    std::memcpy(dots + h * dot_stride, &total, sizeof(total));
  }
  for (; d < n; ++d) {
    for (int h = 0; h < kHeads; ++h) {
      for (int i = 0; i < kDotRows; ++i) {
        dots[h * dot_stride + i] += queries[h * n + d] * widen(rows[i][d]);
      }
    }
  }
}

template <int kHeads, int kBlocks, typename T>
[[gnu::noinline]] void add_weighted_blocks(const float* __restrict weights, int64_t weight_stride,
                                           const T* const* rows, int64_t num_rows, int64_t ahead,
                                           int64_t offset, float* __restrict sums,
                                           int64_t sum_stride) {
  constexpr int kVecs = 2 * kBlocks;
  Vec total[kHeads][kVecs];
  for (int h = 0; h < kHeads; ++h) std::memcpy(total[h], sums + h * sum_stride, sizeof(total[h]));
  for (int64_t row = 0; row < num_rows; ++row) {
    Vec values[kVecs];
    for (int b = 0; b < kBlocks; ++b) {
      prefetch_block(rows[ahead + row] + offset + b * kBlock);
      load_block(rows[row] + offset + b * kBlock, values[2 * b], values[2 * b + 1]);
    }
    for (int h = 0; h < kHeads; ++h) {
      const float weight = weights[h * weight_stride + row];
      for (int v = 0; v < kVecs; ++v) total[h][v] += weight * values[v];
    }
  }
  for (int h = 0; h < kHeads; ++h) std::memcpy(sums + h * sum_stride, total[h], sizeof(total[h]));
}

// sums[h] += sum over i of weights[h * weight_stride + i] * rows[i][offset:offset + n]
//   sums: [kHeads, n] in packed order
template <int kHeads, typename T>
inline void add_weighted_rows(const float* __restrict weights, int64_t weight_stride,
                              const T* const* rows, int64_t num_rows, int64_t ahead, int64_t offset,
                              int64_t n, float* __restrict sums) {
  int64_t d = 0;
  for (; d + 2 * kBlock <= n; d += 2 * kBlock) {
    add_weighted_blocks<kHeads, 2>(weights, weight_stride, rows, num_rows, ahead, offset + d,
                                   sums + d, n);
  }
  if (d + kBlock <= n) {
    add_weighted_blocks<kHeads, 1>(weights, weight_stride, rows, num_rows, ahead, offset + d,
                                   sums + d, n);
    d += kBlock;
  }
  for (int64_t row = 0; d < n && row < num_rows; ++row) {
    for (int h = 0; h < kHeads; ++h) {
      const float weight = weights[h * weight_stride + row];
      for (int64_t i = d; i < n; ++i) sums[h * n + i] += weight * widen(rows[row][offset + i]);
    }
  }
}

// Calls f(heads, first) for blocks of up to 4 of the heads; decltype(heads)::value is
// how many, known to the compiler, so that a block's sums stay in registers.
template <typename F>
inline void for_head_blocks(int64_t num_heads, const F& f) {
  int64_t first = 0;
  for (; first + 4 <= num_heads; first += 4) f(std::integral_constant<int, 4>(), first);
  switch (num_heads - first) {
    case 3:
      return f(std::integral_constant<int, 3>(), first);
    case 2:
      return f(std::integral_constant<int, 2>(), first);
    case 1:
      return f(std::integral_constant<int, 1>(), first);
  }
}

// e^x to 2.5e-7 relative, for x <= 88; 0 below -87. Range reduction to
// [-ln2/2, ln2/2] and a degree-6 polynomial. Float is float, in loops that
// vectorize, or Vec.
template <typename Float>
inline Float fast_exp(Float x) {
  const Float zero = {};
  const Float clamped = x < -87.0f ? zero - 87.0f : x;
  const Float shifted = clamped * 1.44269504f + 12582912.0f;  // 1.5 * 2^23 rounds to integer
  const Float n = shifted - 12582912.0f;
  const Float r = (clamped - n * 0.693359375f) + n * 2.12194440e-4f;
  Float p = zero + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const auto exponent = __builtin_bit_cast(BitsOf<Float>, shifted) - 0x4b400000u + 127u;
  const Float power = __builtin_bit_cast(Float, exponent << 23);
  return x < -87.0f ? zero : p * power;
}

}  // namespace clusterkv::cpu
