# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_clusterkv project
"""``index_pages`` only permutes, and what it stores describes the permuted rows.

On random keys two cosines may nearly tie, and rounds of k-means amplify whichever
way they fall. So labels are held against the reference where no ties can be (well
separated keys), against the cosines themselves (one round), and by their quality.
"""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from tests.support import cases
from tests.support.bad_arguments import (
    PAGES,
    doubled,
    longer,
    rejected,
)
from tests.support.cases import IndexCase
from tests.support.compare import assert_same_bits
from tests.support.inputs import Pages
from tests.support.means import check_means
from vllm_clusterkv import ops, reference
from vllm_clusterkv.page_layout import BLOCK_SIZE, PageLayout


def random_rows(case, seed=0):
    """[num_pages, num_kv_heads, BLOCK_SIZE, 2 * head_size]; values begin with their
    row's number, so that a permutation can be read off."""
    generator = torch.Generator().manual_seed(seed)
    shape = (len(case.num_sink_tokens), case.num_kv_heads, BLOCK_SIZE)
    rows = torch.randn(*shape, 2 * case.head_size, generator=generator)
    rows[..., case.head_size] = torch.arange(BLOCK_SIZE)  # exact in 16 bits, too
    return rows.to(case.dtype)


def separable_rows(case, seed=0):
    """Keys in tight bunches, as many as clusters."""
    rows = random_rows(case, seed)
    generator = torch.Generator().manual_seed(seed + 1)
    num_clusters = 256 // case.tokens_per_cluster
    centres = torch.linalg.qr(
        torch.randn(case.head_size, case.head_size, generator=generator)
    ).Q[:num_clusters]
    for page, num_sinks in enumerate(case.num_sink_tokens):
        for head in range(case.num_kv_heads):
            bunch = torch.randint(num_clusters, (BLOCK_SIZE,), generator=generator)
            one_each = torch.randperm(num_clusters, generator=generator)
            bunch[num_sinks:][:num_clusters] = one_each[: BLOCK_SIZE - num_sinks]
            lengths = torch.rand(BLOCK_SIZE, 1, generator=generator) * 10 + 1
            keys = rows[page, head, :, : case.head_size].float() * 0.01
            rows[page, head, :, : case.head_size] = lengths * (keys + centres[bunch])
    return rows


def place(case, rows):
    """The rows in shuffled blocks of a poisoned cache: (pages, block_ids, sinks)."""
    num_clusters = 256 // case.tokens_per_cluster
    layout = PageLayout(case.num_kv_heads, case.head_size, num_clusters, case.dtype)
    pages = Pages.poisoned(layout, len(rows) + 2)
    generator = torch.Generator().manual_seed(2)
    blocks = torch.randperm(len(rows) + 2, generator=generator)[: len(rows)].int()
    pages.kv_cache[blocks] = rows
    return pages, blocks, torch.tensor(case.num_sink_tokens, dtype=torch.int32)


def run(case, rows, device, num_iters=8, module=ops):
    """Indexes the rows; returns the pages on the CPU and their block ids."""
    pages, blocks, sinks = place(case, rows)
    pages = pages.to(device)
    module.index_pages(
        **pages.args(),
        block_ids=blocks.to(device),
        num_sink_tokens=sinks.to(device),
        num_iters=num_iters,
    )
    return pages.to("cpu"), blocks


def indexed_heads(case, pages, blocks):
    """Yields (page, head, sinks, sorted rows, their labels, row each came from)."""
    for page, (block, sinks) in enumerate(
        zip(blocks.tolist(), case.num_sink_tokens, strict=True)
    ):
        for head in range(case.num_kv_heads):
            rows = pages.kv_cache[block, head]
            ends = pages.cluster_ends[block, head].long()
            counts = torch.diff(ends, prepend=torch.tensor([sinks]))
            assert (counts >= 0).all() and ends[-1] == BLOCK_SIZE
            labels = torch.arange(len(ends)).repeat_interleave(counts)
            yield page, head, sinks, rows, labels, rows[:, case.head_size].long()


@pytest.mark.parametrize("make_rows", [random_rows, separable_rows])
@pytest.mark.parametrize("case", cases.INDEX, ids=str)
def test_rows_are_permuted_and_described(case, make_rows, device):
    before = make_rows(case)
    pages, blocks = run(case, before, device)
    for page, head, sinks, rows, labels, origin in indexed_heads(case, pages, blocks):
        assert torch.equal(origin.sort().values, torch.arange(BLOCK_SIZE))
        assert_same_bits(rows, before[page, head][origin])
        assert torch.equal(origin[:sinks], torch.arange(sinks))
        same_cluster = labels[1:] == labels[:-1]
        assert (origin[sinks:].diff()[same_cluster] > 0).all()
        num_clusters = pages.layout.num_clusters
        members = F.one_hot(labels, num_clusters).T.float()
        block = int(blocks[page])
        fields = pages.fields[block : block + 1, head : head + 1]
        check_means(fields, members[None, None], rows[None, None, sinks:].float())
        keys = rows[sinks:, : case.head_size].float()
        profile, radii = reference.key_spread(keys, labels, num_clusters)
        # Kernels may take a variance as a difference of two squares.
        cancelled = 1e-6 * (keys**2).mean() / radii.square().mean().clamp(min=1e-30)
        for stored, spread in ((fields.profile, profile), (fields.radii, radii)):
            torch.testing.assert_close(
                stored[0, 0].float(),
                spread,
                rtol=0.51 * torch.finfo(case.dtype).eps + 1e-5 + float(cancelled),
                atol=1e-6,
            )


@pytest.mark.parametrize("case", cases.INDEX, ids=str)
def test_nothing_else_is_written(case, device):
    rows = random_rows(case)
    untouched, *_ = place(case, rows)
    pages, blocks = run(case, rows, device)
    after, before = pages.bytes_of_blocks(), untouched.bytes_of_blocks()
    others = torch.ones(len(after), dtype=torch.bool)
    others[blocks] = False
    assert torch.equal(after[others], before[others])
    layout = pages.layout
    used = layout.used_bytes
    assert torch.equal(after[:, used:], before[:, used:])


@pytest.mark.parametrize("case", cases.INDEX[:-1], ids=str)
def test_separable_keys_are_sorted_as_the_reference_does(case, device):
    rows = separable_rows(case)
    actual, blocks = run(case, rows, device)
    in_fp32 = replace(case, dtype=cases.FP32)
    expected, _ = run(in_fp32, rows.float(), "cpu", module=reference)
    assert_same_bits(actual.kv_cache[blocks].float(), expected.kv_cache[blocks])
    assert_same_bits(actual.cluster_ends[blocks], expected.cluster_ends[blocks])


def test_fewer_directions_than_clusters(device):
    """A cluster for each direction, of whichever of the clusters that started there;
    the others are empty."""
    case = IndexCase((16,), cases.finest_dtype(device), num_kv_heads=1)
    rows = random_rows(case)
    direction = torch.arange(BLOCK_SIZE) * 7 % 10
    rows[0, 0, :, : case.head_size] = 3 * torch.eye(case.head_size)[direction]
    pages, blocks = run(case, rows, device)
    ((*_, sinks, _, labels, origin),) = indexed_heads(case, pages, blocks)
    pairs = torch.stack([labels, direction[origin[sinks:]]], 1).unique(dim=0)
    assert len(pairs) == 10
    assert pairs[:, 0].unique().numel() == pairs[:, 1].unique().numel() == 10


@pytest.mark.parametrize("first", [0.0, 3.0])
def test_starts_of_exact_keys(first, device):
    """Of equal keys the lowest row starts a cluster, a zero key only if it is first."""
    case = IndexCase((16,), cases.finest_dtype(device), num_kv_heads=1)
    rows = random_rows(case)
    generator = torch.Generator().manual_seed(5)
    direction = torch.randint(40, (BLOCK_SIZE,), generator=generator)
    keys = 3 * torch.eye(case.head_size)[direction]
    keys[torch.randperm(BLOCK_SIZE, generator=generator)[:60]] = 0
    keys[16] = first * torch.eye(case.head_size)[7]
    rows[0, 0, :, : case.head_size] = keys
    actual, blocks = run(case, rows, device, num_iters=1)
    expected, _ = run(case, rows, "cpu", num_iters=1, module=reference)
    assert_same_bits(actual.kv_cache[blocks], expected.kv_cache[blocks])
    assert_same_bits(actual.cluster_ends[blocks], expected.cluster_ends[blocks])


@pytest.mark.parametrize("case", cases.INDEX, ids=str)
def test_one_round_takes_the_largest_cosine(case, device):
    before = random_rows(case)
    pages, blocks = run(case, before, device, num_iters=1)
    for page, head, sinks, _, labels, origin in indexed_heads(case, pages, blocks):
        keys = before[page, head, :, : case.head_size].double()
        num_clusters = 256 // case.tokens_per_cluster
        first = keys[sinks + reference.spread_rows(keys[sinks:], num_clusters)]
        cosines = F.normalize(keys, dim=1) @ F.normalize(first, dim=1).T
        cosines = cosines[origin[sinks:]]
        best = cosines.amax(1)
        chosen = cosines.gather(1, labels[:, None])[:, 0]
        assert (chosen >= best - 1e-6).all()
        # Two seeds may be one row (few rows): the lowest such cluster wins.
        clear = (cosines > best[:, None] - 1e-6).sum(1) == 1
        assert torch.equal(labels[clear], cosines.argmax(1)[clear])


@pytest.mark.parametrize("case", cases.INDEX, ids=str)
def test_clusters_are_as_tight_as_the_references(case, device):
    rows = random_rows(case, seed=3)
    tightness = []
    for where, module in ((device, ops), ("cpu", reference)):
        pages, blocks = run(case, rows, where, module=module)
        cosines = []
        for *_, sinks, sorted_rows, labels, _ in indexed_heads(case, pages, blocks):
            keys = sorted_rows[sinks:, : case.head_size].float()
            members = F.one_hot(labels, 256 // case.tokens_per_cluster).float()
            sums = members.T @ keys  # the norm does not matter
            cosines.append(torch.cosine_similarity(keys, sums[labels]).mean())
        tightness.append(torch.stack(cosines).mean())
    assert tightness[0] >= tightness[1] - 3e-3


@pytest.mark.parametrize("fill", [0.0, 1.5, -6e4, 6e-8])
def test_equal_keys_share_one_cluster(fill, device):
    """Zero keys have no direction; 6e-8 is the smallest fp16, a subnormal.

    Which cluster is a matter of rounding: the mean of equal keys may differ from
    them in its last bit, and then another cluster's start is closer.
    """
    case = IndexCase((16, 0), cases.FP16)
    before = random_rows(case)
    before[..., : case.head_size] = fill
    pages, blocks = run(case, before, device)
    assert_same_bits(pages.kv_cache[blocks], before)
    sinks = torch.tensor(case.num_sink_tokens)[:, None, None]
    ends = pages.cluster_ends[blocks].long()
    assert ((ends == sinks) | (ends == BLOCK_SIZE)).all()
    assert (ends[..., -1] == BLOCK_SIZE).all()
    starts = torch.cat([sinks.expand_as(ends[..., :1]), ends[..., :-1]], dim=-1)
    holds_all = ends > starts
    assert (holds_all.sum(-1) == 1).all()
    fields = pages.fields[blocks]
    means = fields.mean_keys()[holds_all]
    # Kernels may multiply a sum by the inverse of its count.
    torch.testing.assert_close(
        means, torch.full_like(means, float(before[0, 0, 0, 0])), rtol=1e-6, atol=0
    )
    for steps in (fields.key_steps, fields.value_steps, fields.radii):
        assert (steps[~holds_all] == 0).all()


@pytest.mark.parametrize("magnitude", [2.0**-60, 2.0**-13, 2.0**13, 2.0**50])
def test_the_length_of_keys_does_not_matter(magnitude, device):
    # bf16 has the range of fp32.
    case = IndexCase((16,), cases.FP32 if device == "cpu" else cases.BF16)
    rows = separable_rows(case)
    expected, blocks = run(case, rows, device)
    rows[..., : case.head_size] *= magnitude
    actual, _ = run(case, rows, device)
    assert_same_bits(actual.cluster_ends[blocks], expected.cluster_ends[blocks])
    values = (..., slice(case.head_size, None))
    assert_same_bits(actual.kv_cache[blocks][values], expected.kv_cache[blocks][values])


def test_the_profile_of_tiny_keys(device):
    """Their variances are fp32's smallest numbers; over their mean they are not."""
    case = IndexCase((16,), cases.FP32 if device == "cpu" else cases.BF16)
    rows = separable_rows(case)
    rows[..., : case.head_size] *= 2.0**-68
    actual, blocks = run(case, rows, device)
    profile = actual.fields.profile[blocks].float()
    torch.testing.assert_close(
        profile.mean(-1), torch.ones_like(profile[..., 0]), atol=0.02, rtol=0
    )


@pytest.mark.parametrize("dtype", [cases.BF16, cases.FP16], ids=str)
def test_the_base_of_equal_keys_is_that_key(dtype, device):
    """Sums of 256 equal 16-bit numbers are exact in fp32, for every finite number."""
    every = torch.arange(-(2**15), 2**15).short().view(dtype)
    finite = every[every.isfinite() & (every.abs() < 2.0**50)]
    if dtype == cases.BF16:
        finite = finite[(finite.abs() >= 2.0**-50) | (finite == 0)]
    head_size = 256
    keys = finite[: len(finite) // head_size * head_size].view(-1, 1, head_size)
    layout = PageLayout(1, head_size, 16, dtype)
    num_pages = 16  # of every 248 there are
    pages = Pages.poisoned(layout, num_pages)
    keys = keys[:: len(keys) // num_pages][:num_pages]
    pages.kv_cache[:, 0] = torch.cat([keys, torch.ones_like(keys)], 2)
    pages = pages.to(device)
    ops.index_pages(
        **pages.args(),
        block_ids=torch.arange(num_pages, device=device).int(),
        num_sink_tokens=torch.zeros(num_pages, device=device).int(),
        num_iters=1,
    )
    fields = pages.fields
    assert torch.equal(fields.key_base[:, 0].cpu(), keys[:, 0])
    assert (fields.key_deviations == 0).all() and (fields.key_steps == 0).all()
    # The largest element of a mean value is 7.5 steps.
    values = fields.mean_values().amax((2, 3)).cpu()
    torch.testing.assert_close(
        values, torch.ones_like(values), rtol=2 * torch.finfo(dtype).eps, atol=0
    )


def test_skipped_and_missing_pages(device):
    case = IndexCase((16, 0, 0))
    rows = random_rows(case)
    expected, blocks = run(case, rows, device)
    pages, _, _ = place(case, rows)
    start = pages.bytes_of_blocks().clone()
    pages = pages.to(device)

    def call(block_ids, sinks):
        ops.index_pages(
            **pages.args(),
            block_ids=torch.tensor(block_ids, dtype=torch.int32, device=device),
            num_sink_tokens=torch.tensor(sinks, dtype=torch.int32, device=device),
            num_iters=8,
        )

    call([], [])
    call([-1, -1, -1], [0, 16, 0])
    assert torch.equal(pages.bytes_of_blocks(), start)
    call([-1, int(blocks[1]), -1], [0, 0, 0])
    wanted = start.clone()
    wanted[blocks[1]] = expected.bytes_of_blocks()[blocks[1]]
    assert torch.equal(pages.bytes_of_blocks(), wanted)
    call([int(blocks[2]), -1, int(blocks[0])], [0, 0, 16])
    assert_same_bits(pages.buffer, expected.buffer)


def test_repeated_runs_and_threads_give_equal_bits(device):
    case = IndexCase((16, 0, 0), num_kv_heads=3)
    rows = random_rows(case)
    expected, _ = run(case, rows, device)
    for num_threads in (1, 2):
        torch.set_num_threads(num_threads)
        assert_same_bits(run(case, rows, device)[0].buffer, expected.buffer)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_keys_that_are_not_finite_lose_no_row(bad, device):
    case = IndexCase()
    before = random_rows(case)
    before[0, 0, 100, 3] = before[1, :, ::7, 0] = bad
    pages, blocks = run(case, before, device)
    for page, head, _, rows, _, origin in indexed_heads(case, pages, blocks):
        assert torch.equal(origin.sort().values, torch.arange(BLOCK_SIZE))
        assert_same_bits(rows, before[page, head][origin])


def small_args():
    case = IndexCase()
    pages, block_ids, num_sink_tokens = place(case, random_rows(case))
    return {
        **pages.args(),
        "block_ids": block_ids,
        "num_sink_tokens": num_sink_tokens,
        "num_iters": 2,
    }


@pytest.mark.parametrize(
    ("name", "spoil", "message"),
    [
        *PAGES,
        ("block_ids", lambda t: t[None], r"block_ids must have 1 dimensions, got 2"),
        ("block_ids", doubled, r"block_ids must have dtype Int, got Long"),
        ("block_ids", lambda t: t.repeat(2)[::2], r"block_ids must be contiguous"),
        ("block_ids", lambda t: t + 4, r"block_ids\[.\] must be -1 to num_blocks - 1"),
        ("block_ids", lambda t: t - 9, r"block_ids\[0\] must be -1 to .*, got -"),
        ("num_sink_tokens", lambda t: t[None], r"num_sink_tokens must have 1 dim"),
        ("num_sink_tokens", doubled, r"num_sink_tokens must have dtype Int, got Long"),
        ("num_sink_tokens", longer(0), r"must equal block_ids.size\(0\) \(2\), got 3"),
        ("num_sink_tokens", lambda t: t.repeat(2)[::2], r"_tokens must be contiguous"),
        ("num_sink_tokens", lambda t: t + 240, r"0 to block_size - 1 \(255\), got 256"),
        ("num_sink_tokens", lambda t: t - 17, r"must be 0 to block_size - 1 .* got -1"),
        ("num_iters", lambda _: 0, r"num_iters must be at least 1, got 0"),
    ],
)
def test_bad_arguments_are_named(name, spoil, message):
    rejected(ops.index_pages, small_args(), name, spoil, message)


def test_opcheck(device):
    """On separate tensors: opcheck copies its arguments one by one."""
    args = {
        name: value.clone().to(device) if isinstance(value, torch.Tensor) else value
        for name, value in small_args().items()
    }
    torch.library.opcheck(torch.ops.clusterkv.index_pages.default, tuple(args.values()))
