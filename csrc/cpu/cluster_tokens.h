// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the vllm_clusterkv project
#pragma once

#include <array>
#include <cmath>
#include <limits>

#include "../params.h"

namespace clusterkv::cpu {

// The ends of a page's clusters: [num_clusters].
inline const int16_t* ends_of_page(const SemanticPages& pages, const DecodeRows& rows, int64_t req,
                                   int64_t head, int64_t page) {
  const int64_t place = rows.index_table[req * rows.index_table_stride + page];
  return pages.cluster_ends + place * pages.ends_block_stride + head * pages.ends_head_stride;
}

// Tokens of each cluster of a row's page. Sinks are in no cluster; they are on page 0.
template <typename T>
inline void count_page_tokens(const int16_t* ends, int64_t num_clusters, int64_t page,
                              int64_t num_sink_tokens, T* counts) {
  counts[0] = static_cast<T>(ends[0] - (page == 0 ? num_sink_tokens : 0));
  for (int64_t c = 1; c < num_clusters; ++c) counts[c] = static_cast<T>(ends[c] - ends[c - 1]);
}

// log(count) of the tokens of a cluster. NaN for a cluster without any, and where there
// cannot be so many: an index that is not valid is not read by.
inline float log_count(int64_t count) {
  static const std::array<float, 257> table = [] {
    std::array<float, 257> logs{};
    logs[0] = std::numeric_limits<float>::quiet_NaN();
    for (int i = 1; i < 257; ++i) logs[i] = std::log(static_cast<float>(i));
    return logs;
  }();
  return table[count > 0 && count < 257 ? count : 0];
}

}  // namespace clusterkv::cpu
