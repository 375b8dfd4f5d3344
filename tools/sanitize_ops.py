# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_clusterkv project
"""Every op once on small inputs of every kind, to run under compute-sanitizer.

    compute-sanitizer --tool memcheck python3 tools/sanitize_ops.py
    compute-sanitizer --tool racecheck python3 tools/sanitize_ops.py

The inputs are those of the op tests, which hold the results against the reference.
``make sanitize-gpu`` runs both.
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.ops.test_sparse_decode import WINDOWS
from tests.support import cases
from tests.support.inputs import make_decode_inputs
from vllm_clusterkv import ops

KINDS = [
    case
    for case in cases.ALL + cases.DENSE + WINDOWS
    if case.dtype != torch.float32 and case.head_size in (64, 96, 128, 256)
]


def run_decode(case: cases.DecodeCase) -> None:
    inputs = make_decode_inputs(case).to("cuda")
    scores, sums = inputs.score_all(ops)
    selected, _ = inputs.select(ops, scores, case.token_budget, sums)
    for tail_estimate in (True, False):
        inputs.decode(
            ops,
            scores,
            selected,
            tail_estimate=tail_estimate,
            num_splits=case.num_splits,
        )


def run_index(dtype: torch.dtype, head_size: int, tokens_per_cluster: int) -> None:
    case = cases.DecodeCase(
        (600,), dtype, head_size, tokens_per_cluster=tokens_per_cluster
    )
    inputs = make_decode_inputs(case).to("cuda")
    ops.index_pages(
        **inputs.pages.args(),
        block_ids=torch.tensor(
            [int(inputs.block_table[0, 0]), -1], dtype=torch.int32
        ).cuda(),
        num_sink_tokens=torch.tensor([16, 0], dtype=torch.int32).cuda(),
        num_iters=3,
    )


def main() -> None:
    for case in KINDS:
        run_decode(case)
    for dtype in (torch.bfloat16, torch.float16):
        for head_size in (64, 96, 128, 256):
            for tokens_per_cluster in (4, 8, 16):
                run_index(dtype, head_size, tokens_per_cluster)
    torch.cuda.synchronize()
    print(f"{len(KINDS)} decode batches and 24 pages")


if __name__ == "__main__":
    main()
