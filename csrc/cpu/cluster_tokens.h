// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the vllm_clusterkv project
#pragma once

#include "../params.h"

namespace clusterkv::cpu {

// The index of a row's page: [fields.bytes].
inline const uint8_t* index_of_page(const SemanticPages& pages, const DecodeRows& rows, int64_t req,
                                    int64_t head, int64_t page) {
  const int64_t place = rows.index_table[req * rows.index_table_stride + page];
  return pages.index + place * pages.index_block_stride + head * pages.index_head_stride;
}

// The ends of a page's clusters: [num_clusters].
inline const int16_t* ends_of_page(const SemanticPages& pages, const DecodeRows& rows, int64_t req,
                                   int64_t head, int64_t page) {
  return reinterpret_cast<const int16_t*>(index_of_page(pages, rows, req, head, page) +
                                          pages.fields.cluster_ends);
}

// Tokens of each cluster of a row's page. Sinks are in no cluster; they are on page 0.
template <typename T>
inline void count_page_tokens(const int16_t* ends, int64_t num_clusters, int64_t page,
                              int64_t num_sink_tokens, T* counts) {
  counts[0] = static_cast<T>(ends[0] - (page == 0 ? num_sink_tokens : 0));
  for (int64_t c = 1; c < num_clusters; ++c) counts[c] = static_cast<T>(ends[c] - ends[c - 1]);
}

}  // namespace clusterkv::cpu
