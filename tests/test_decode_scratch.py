# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_clusterkv project
"""The scratch of a decode call: its size, and rows that run in parts."""

import torch

from tests.support.cases import DecodeCase
from tests.support.inputs import make_decode_inputs
from vllm_clusterkv import observe
from vllm_clusterkv.backend import DecodeMetadata, DecodeScratch, SemanticPages, decode
from vllm_clusterkv.config import ClusterKVConfig


def test_rows_that_do_not_fit_at_once_run_in_parts():
    inputs = make_decode_inputs(
        DecodeCase((1000, 0, 700, 257, 300), group=2, min_sparse_lens=(0, 0, 701, 0, 0))
    )
    config = ClusterKVConfig(
        token_budget=64, num_sink_tokens=inputs.num_sink_tokens, min_sparse_len=0
    )
    layout = inputs.pages.layout
    max_clusters = inputs.block_table.shape[1] * layout.num_clusters

    def run(max_bytes):
        scratch = DecodeScratch(
            len(inputs.query),
            inputs.query.shape[1],
            layout.num_kv_heads,
            layout.head_size,
            max_clusters,
            lambda num_rows: 3,
            lambda num_rows: 4,
            torch.device("cpu"),
            max_bytes,
        )
        output = torch.full_like(inputs.query, float("nan"))
        decode(
            "layer",
            inputs.query,
            SemanticPages(**inputs.pages.args()),
            DecodeMetadata(inputs.block_table, inputs.seq_lens, inputs.min_sparse_lens),
            inputs.scale,
            config,
            scratch,
            output,
        )
        return output, scratch

    whole, scratch = run(None)
    assert scratch.max_rows == 5
    for max_rows in (1, 2, 3):
        parts, part = run(scratch.num_bytes * max_rows // 5)
        assert part.max_rows == max_rows
        assert part.num_bytes <= scratch.num_bytes * max_rows // 5
        assert torch.equal(parts, whole)
    # One row must fit, whatever the limit.
    assert run(1)[1].max_rows == 1
    assert not observe.observers


def test_parts_and_splits_depend_on_the_rows_of_the_call():
    # More splits for fewer rows: 1 x 32, 2 x 16, 3 x 10, ..., 8 x 4. Most parts in all
    # at 3 rows.
    num_parts = [0, 7, 5, 6, 3, 3, 2, 2, 2]

    def make(max_bytes=None):
        return DecodeScratch(
            8,
            4,
            2,
            64,
            160,
            num_parts.__getitem__,
            lambda num_rows: 32 // num_rows,
            torch.device("cpu"),
            max_bytes,
        )

    scratch = make()
    for num_rows in range(1, 9):
        scores, softmax_sums, selected, num_attended, workspace = scratch.shape(
            num_rows, 88
        )
        assert scores.shape == (num_rows, 4, 88) and scores.is_contiguous()
        assert softmax_sums.shape == (num_rows, 4, num_parts[num_rows], 2)
        assert softmax_sums.is_contiguous()
        assert selected.shape == (num_rows, 2, 88)
        assert num_attended.shape == (num_rows, 2)
        assert workspace.shape == (num_rows, 4, 32 // num_rows, 66)
    row_bytes = 160 * (4 * 4 + 2) + 2 * 4
    of_all_rows = 4 * 4 * (18 * 2 + 32 * 66)
    assert scratch.num_bytes == 8 * row_bytes + of_all_rows
    assert make(scratch.num_bytes).max_rows == 8
    assert make(scratch.num_bytes - 1).max_rows == 7
