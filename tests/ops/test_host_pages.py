# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_clusterkv project
"""Pages on the host change no bit of what the decode ops write.

Their rows are in ``host_cache``, their indexes where ``index_table`` says, and their
blocks are full of NaN.
"""

import pytest
import torch

from tests.support import cases
from tests.support.bad_arguments import doubled, flattened, longer, rejected
from tests.support.compare import assert_same_bits
from tests.support.inputs import make_decode_inputs
from vllm_clusterkv import ops, reference

LONG = [
    cases.DecodeCase((2600, 1025, 513, 0, 257), token_budget=300),
    cases.DecodeCase((1537, 2100), cases.FP32, head_size=128, token_budget=10**6),
    cases.DecodeCase((1800, 900), cases.FP16, tokens_per_cluster=4, token_budget=1),
    cases.DecodeCase((1800, 900), group=7, tokens_per_cluster=16, num_sink_tokens=0),
    cases.DecodeCase((1500, 1400), min_sparse_lens=(2000, 0), num_splits=7),
]
CASES = LONG + cases.IRREGULAR


def outputs(inputs, module, case):
    """Scores, softmax_sums, selected, num_attended, and output with and
    without tail."""
    scores, sums = inputs.score_all(module)
    selected, num_attended = inputs.select(module, scores, case.token_budget, sums)
    return [
        scores,
        sums,
        selected,
        num_attended,
        *(
            inputs.decode(
                module,
                scores,
                selected,
                num_splits=case.num_splits,
                tail_estimate=tail_estimate,
            )
            for tail_estimate in (True, False)
        ),
    ]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_outputs_are_those_of_resident_pages(case, device):
    inputs = make_decode_inputs(case)
    spilled = inputs.spilled()
    expected = outputs(inputs.to(device), ops, case)
    actual = outputs(spilled.to(device), ops, case)
    for is_, should_be in zip(actual, expected, strict=True):
        assert_same_bits(is_, should_be)
    if case in LONG:
        assert (spilled.block_table < 0).sum() >= 2


@pytest.mark.parametrize("case", LONG, ids=str)
def test_the_same_of_the_reference(case):
    inputs = make_decode_inputs(case)
    expected = outputs(inputs, reference, case)
    actual = outputs(inputs.spilled(), reference, case)
    for is_, should_be in zip(actual, expected, strict=True):
        assert_same_bits(is_, should_be)


def test_the_copies_are_what_is_read(device):
    """Rows and index of a spilled page, each spoilt, change the output."""
    case = LONG[2]
    inputs = make_decode_inputs(case).spilled()
    expected = outputs(inputs.to(device), ops, case)
    inputs.host_cache[:] = 0
    scores, *_, output, _ = outputs(inputs.to(device), ops, case)
    assert_same_bits(scores, expected[0])
    assert not torch.equal(output, expected[-2])

    inputs = make_decode_inputs(case).spilled()
    req, page = (inputs.block_table < 0).nonzero()[0].tolist()
    inputs.index_table[req, page] = inputs.index_table[req, 0]
    assert not torch.equal(outputs(inputs.to(device), ops, case)[0], expected[0])


def test_places_beyond_two_gigabytes():
    """Units of 512 bytes: an int32 reaches 1 TB, signed because of block 0."""
    layout = make_decode_inputs(LONG[0]).pages.layout
    last_block = 2**20
    place = layout.index_place(layout.page_bytes, last_block, 1)
    assert place * 512 == (
        last_block * layout.page_bytes + layout.entry_bytes - layout.kv_bytes
    )
    assert layout.index_place(layout.page_bytes, 0, 0) == -layout.kv_bytes // 512
    assert layout.index_place(layout.page_bytes, 3, None) * 512 == 3 * layout.page_bytes


INDEX_TABLE = [
    ("index_table", flattened, r"index_table must have 2 dimensions, got 1"),
    ("index_table", doubled, r"index_table must have dtype Int, got Long"),
    ("index_table", longer(0), r"index_table.size\(0\) must equal num_reqs \(2\)"),
    ("index_table", longer(1), r"index_table.size\(1\) must equal max_blocks"),
]
HOST_CACHE = [
    ("host_cache", flattened, r"host_cache must have 4 dimensions, got 1"),
    ("host_cache", doubled, r"host_cache must have dtype BFloat16, got Double"),
    ("host_cache", longer(1), r"host_cache.size\(1\) must equal num_kv_heads \(2\)"),
    ("host_cache", longer(2), r"host_cache.size\(2\) must equal block_size \(256\)"),
    ("host_cache", longer(3), r"host_cache.size\(3\) must equal 2 \* head_size"),
    (
        "host_cache",
        lambda t: torch.cat([t, t], -1)[..., : t.shape[-1]],
        r"host_cache.stride\(2\) must equal kv_cache's \(128\), got 256",
    ),
]


@pytest.mark.parametrize(("name", "spoil", "message"), [*INDEX_TABLE, *HOST_CACHE])
def test_bad_arguments_are_named(name, spoil, message):
    inputs = make_decode_inputs(cases.DecodeCase((900, 700), group=2)).spilled()
    scores, sums = inputs.score_all(ops)
    selected, _ = inputs.select(ops, scores, 100, sums)
    args = inputs.decode_args(scores, selected)
    rejected(ops.sparse_decode, args, name, spoil, message)
    if name == "index_table":
        rejected(ops.score_clusters, inputs.score_args(), name, spoil, message)
        rejected(
            ops.select_clusters, inputs.select_args(scores, 100), name, spoil, message
        )
