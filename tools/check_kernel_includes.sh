#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_clusterkv project
#
# Device code takes plain structs: no PyTorch header in csrc/cuda/*.cuh or in
# params.h, nor a header there that brings one. Launchers (*.cu) include both sides.
set -euo pipefail
cd "$(dirname "$0")/.."
includes=$(grep -nsE '#include *[<"]((torch|ATen|c10)/|launch\.h|\.\./checks\.h)' \
  csrc/cuda/*.cuh csrc/params.h || true)
if [[ -n $includes ]]; then
  printf '%s\ncsrc/cuda/*.cuh and csrc/params.h may not include PyTorch headers\n' "$includes" >&2
  exit 1
fi
