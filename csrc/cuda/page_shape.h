// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the vllm_clusterkv project
//
// The pages that CUDA kernels exist for.
#pragma once

#include "../params.h"

namespace clusterkv::cuda {

constexpr int kPageRows = 256;
constexpr int kRowsALine = static_cast<int>(kLineRows);  // of those recalled together
constexpr int kLinesAPage = kPageRows / kRowsALine;

}  // namespace clusterkv::cuda
