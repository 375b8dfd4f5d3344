// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the vllm_clusterkv project
#pragma once

#include <torch/headeronly/core/Dispatch_v2.h>

#include "vec.h"

// Runs the statements with `scalar_t` bound to the KV cache's element type.
#define CLUSTERKV_DISPATCH_KV_DTYPE(DTYPE, NAME, ...)                                        \
  THO_DISPATCH_V2(DTYPE, NAME, AT_WRAP([&] { __VA_ARGS__; }),                                \
                  torch::headeronly::ScalarType::Float, torch::headeronly::ScalarType::Half, \
                  torch::headeronly::ScalarType::BFloat16)
