#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_clusterkv project
#
# Device code takes plain structs: no PyTorch header in csrc/kernels or in params.h.
set -euo pipefail
cd "$(dirname "$0")/.."
includes=$(grep -rnsE '#include *[<"](torch|ATen|c10)/' csrc/kernels csrc/params.h || true)
if [[ -n $includes ]]; then
  printf '%s\ncsrc/kernels and csrc/params.h may not include PyTorch headers\n' "$includes" >&2
  exit 1
fi
