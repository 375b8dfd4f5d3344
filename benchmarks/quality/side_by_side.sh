#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_clusterkv project
#
# What docs/quality.md says of clusterkv, of a small model, on one GPU of 80 GB: seven
# evaluations at once, some five minutes on an H100. Dense answers to RULER's tasks do not
# change with this package; they are in benchmarks/results/quality.csv.
#
#   usage: benchmarks/quality/side_by_side.sh MODEL OUT
set -euo pipefail
cd "$(dirname "$0")/../.."
[ $# = 2 ] || { echo "usage: benchmarks/quality/side_by_side.sh MODEL OUT" >&2; exit 2; }
model=$1
mkdir -p "$2"
out=$(cd "$2" && pwd)
export OMP_NUM_THREADS=1
engine='{"gpu_memory_utilization": 0.1, "kv_cache_memory_bytes": 5000000000}'

pids=()
evaluate() {
  local name=$1
  shift
  python3 -m benchmarks.quality --model "$model" --suite full --out "$out/$name" \
    --engine-args "$engine" "$@" > "$out/$name.log" 2>&1 &
  pids+=($!)
}

for length in 16384 32768; do
  for budget in 1024 512; do
    evaluate "ruler-$length-$budget" --tasks ruler --samples 12 --batch-size 12 \
      --methods clusterkv --context-lens $length --token-budgets $budget
  done
  evaluate "forced-$length" --tasks teacher_forcing --context-lens $length \
    --forced-samples 4 --forced-tokens 256 --methods dense clusterkv --token-budgets 1024
done
evaluate needles --tasks needle_grid --context-lens 8192 16384 32768 --methods clusterkv \
  --token-budgets 1024

failed=0
for pid in "${pids[@]}"; do wait "$pid" || failed=1; done
grep -hv "it/s\|sample/s" "$out"/*.log
exit $failed
