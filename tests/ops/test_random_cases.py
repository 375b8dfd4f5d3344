# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_clusterkv project
"""All ops on batches drawn at random, one after the other as a decode step runs them.

``CLUSTERKV_RANDOM_CASES`` is how many (100 by default), or which: ``4711:4712`` runs
seed 4711. A failure names its seed and its case.
"""

import os

import pytest
import torch
import torch.nn.functional as F

from tests.support.batched_reference import BatchedReference, cluster_keys
from tests.support.compare import assert_same_bits
from tests.support.inputs import UNTOUCHED
from tests.support.means import check_means
from tests.support.random_cases import draw_case, make_random_inputs
from vllm_clusterkv import ops
from vllm_clusterkv.page_layout import BLOCK_SIZE
from vllm_clusterkv.reference import spread_rows

CHUNK = 50
NEAR_TIE = 1e-5  # relative, between weights
NEGLIGIBLE = 1e-30  # weights that fp32 may hold as zero
FP32_EPS = torch.finfo(torch.float32).eps

_first, _, _last = os.environ.get("CLUSTERKV_RANDOM_CASES", "100").rpartition(":")
SEEDS = range(int(_first or 0), int(_last))
CHUNKS = [SEEDS[i : i + CHUNK] for i in range(0, len(SEEDS), CHUNK)]


@pytest.mark.parametrize("seeds", CHUNKS, ids=lambda s: f"{s.start}-{s.stop - 1}")
def test_random_cases(seeds, device):
    looser_by = []
    for seed in seeds:
        case = draw_case(seed, device)
        try:
            looser_by += check_case(case, seed, device)
        except Exception as error:
            error.add_note(f"seed {seed} on {device}: {case!r}")
            raise
    # Near ties may go either way in one page; in the mean, neither way is better.
    if len(looser_by) >= CHUNK:
        assert sum(looser_by) / len(looser_by) <= 2e-3


def check_case(case, seed, device) -> list[float]:
    """Runs the ops on a case; returns how much looser than the reference's each page's
    clusters are."""
    inputs, block_ids, sinks = make_random_inputs(case, seed, device)
    looser_by = check_index(case, inputs.pages, block_ids, sinks)
    before = inputs.pages.buffer.clone()
    batch = BatchedReference(inputs)
    scores, softmax_sums = check_scores(inputs, batch)
    selected = check_selection(case, inputs, batch, scores, softmax_sums)
    check_decode(case, inputs, batch, scores, selected)
    assert torch.equal(inputs.pages.buffer, before)
    return looser_by


def check_index(case, pages, block_ids, sinks) -> list[float]:
    """Indexes the pages, and holds result against input."""
    before = pages.to(str(block_ids.device))
    ops.index_pages(
        **pages.args(),
        block_ids=block_ids,
        num_sink_tokens=sinks,
        num_iters=case.num_iters,
    )
    is_listed = block_ids >= 0
    blocks, sinks = block_ids[is_listed].long(), sinks[is_listed].long()
    assert_only_listed_pages_are_written(before, pages, blocks)
    if len(blocks) == 0:
        return []
    old, new = before.kv_cache[blocks], pages.kv_cache[blocks]  # [P, H, 256, 2 * D]
    origin = new[..., case.head_size].long()  # [P, H, 256]
    row = torch.arange(BLOCK_SIZE, device=blocks.device)
    assert (origin.sort(2).values == row).all()
    moved = old.gather(2, origin[..., None].expand_as(old))
    assert_same_bits(new, moved)
    is_sink = row < sinks[:, None, None]  # [P, 1, 256]
    assert (~is_sink | (origin == row)).all()

    ends = pages.cluster_ends[blocks].int()  # [P, H, C]
    assert (ends[..., -1] == BLOCK_SIZE).all()
    assert (ends.diff(dim=2) >= 0).all() and (ends[..., 0] >= sinks[:, None]).all()
    shape = (*ends.shape[:2], BLOCK_SIZE)
    labels = torch.searchsorted(ends, row.int().expand(shape).contiguous(), right=True)
    same_cluster = (labels[..., 1:] == labels[..., :-1]) & ~is_sink[..., :-1]
    assert (~same_cluster | (origin.diff(dim=2) > 0)).all()

    members = F.one_hot(labels, ends.shape[2]).mT.float()  # [P, H, C, 256]
    members *= ~is_sink[:, :, None]
    fields = pages.fields[blocks]
    check_means(fields, members, new.float())
    check_spreads(fields, members, new[..., : case.head_size].float())
    keys = old[..., : case.head_size].float()
    by_origin = torch.empty_like(labels).scatter(2, origin, labels)  # [P, H, 256]
    looser_by = []
    for num_sinks in sinks.unique().tolist():
        of_these = sinks == num_sinks
        looser_by += check_clusters(
            keys[of_these, :, num_sinks:].flatten(0, 1),
            by_origin[of_these, :, num_sinks:].flatten(0, 1),
            ends.shape[2],
            case.num_iters,
        )
    return looser_by


def assert_only_listed_pages_are_written(before, after, blocks):
    layout = before.layout
    old = before.buffer.view(-1, layout.page_bytes)
    new = after.buffer.view(-1, layout.page_bytes)
    others = torch.ones(len(old), dtype=torch.bool, device=old.device)
    others[blocks] = False
    assert torch.equal(old[others], new[others])
    used = layout.used_bytes
    assert torch.equal(old[:, used:], new[:, used:])


def check_spreads(fields, members, keys):
    """Profile and radii within half a unit in the last place, and fp32 sums.

    Args:
        fields: [P, H, ...].
        members: As ``check_means``.
        keys: [P, H, 256, D] fp32.
    """
    info = torch.finfo(fields.profile.dtype)
    counts = members.sum(3, keepdim=True).clamp(min=1)  # [P, H, C, 1]
    means = members @ keys / counts
    is_member = members.sum(2)[..., None]  # [P, H, 256, 1]
    squares = ((keys - members.mT @ means) ** 2).double() * is_member
    # A variance may be the difference of two mean squares.
    lost = 32 * FP32_EPS * (keys**2).double() * is_member
    variances, slack = squares.sum(2), lost.sum(2)  # [P, H, D]
    mean = variances.mean(2, keepdim=True).clamp(min=1e-300)
    profile = variances / mean
    bound = (0.51 * info.eps + 32 * FP32_EPS) * profile
    bound += (slack + profile * slack.mean(2, keepdim=True)) / mean
    bound += info.smallest_normal
    assert_within(fields.profile.double(), profile, bound)
    of_cluster = (members.double() @ squares / counts).mean(3)  # [P, H, C]
    slack = (members.double() @ lost / counts).mean(3)
    radii = of_cluster.sqrt()
    bound = (of_cluster + slack).sqrt() - radii
    bound += radii - (of_cluster - slack).clamp(min=0).sqrt()
    bound += (0.51 * info.eps + 8 * FP32_EPS) * (radii + bound) + info.smallest_normal
    assert_within(fields.radii.double(), radii, bound)


def check_clusters(keys, labels, num_clusters, num_iters) -> list[float]:
    """Labels as good as the reference's; after one round, of the largest cosine.

    Args:
        keys: [P, num_rows, D] fp32.
        labels: [P, num_rows].
    """
    if num_iters == 1:
        cosines, is_clear = first_cosines(keys.double(), num_clusters)
        chosen = cosines.gather(2, labels[..., None])[..., 0]
        assert ((chosen >= cosines.amax(2) - 2e-6) | ~is_clear[:, None]).all()
    expected = cluster_keys(keys, num_clusters, num_iters)
    looser_by = tightness(keys, expected, num_clusters)
    looser_by -= tightness(keys, labels, num_clusters)
    assert looser_by.max() <= 0.05
    return looser_by.tolist()


def first_cosines(keys, num_clusters) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines to the keys that start the clusters: [P, num_rows, C]; and whether there
    was no near tie in choosing them: [P]."""
    directions = F.normalize(keys, dim=2)
    rows = spread_rows(keys, num_clusters)
    cosines = directions @ directions.take_along_dim(rows[..., None], 1).mT
    nearest = cosines.cummax(2).values[..., :-1]
    least = nearest.topk(2, dim=1, largest=False).values  # [P, 2, C - 1]
    return cosines, (least[:, 1] - least[:, 0] > 2e-6).all(1)


def tightness(keys, labels, num_clusters) -> torch.Tensor:
    """Mean cosine of the keys to the means of their clusters: [P]."""
    sums = F.one_hot(labels, num_clusters).mT.float() @ keys
    own = sums.gather(1, labels[..., None].expand_as(keys))
    return torch.cosine_similarity(keys, own, dim=2).mean(1)


def check_scores(inputs, batch) -> tuple[torch.Tensor, torch.Tensor]:
    scores, softmax_sums = inputs.score_all(ops)
    expected, bound = batch.scores()
    live = batch.live[:, None].expand_as(scores)
    assert_within(scores[live], expected[live], bound[live])
    assert (scores[~live] == float("inf")).all()
    by_reference = inputs.softmax_sums(scores)
    assert_same_bits(softmax_sums[..., 0], by_reference[..., 0])
    torch.testing.assert_close(
        softmax_sums[..., 1], by_reference[..., 1], rtol=5e-6, atol=0, equal_nan=True
    )
    return scores, softmax_sums


def assert_within(actual, expected, bound) -> None:
    """Every element within its own bound; a NaN is not."""
    error = (actual - expected).abs()
    if (error <= bound).all():
        return
    ratio = (error / bound).nan_to_num(torch.inf)
    worst = tuple(i.item() for i in torch.unravel_index(ratio.argmax(), ratio.shape))
    raise AssertionError(
        f"{(~(error <= bound)).sum()} of {error.numel()} elements are out of bounds; "
        f"worst at {worst}: {actual[worst]:.8g} for {expected[worst]:.8g} "
        f"within {bound[worst]:.3g}"
    )


def check_selection(case, inputs, batch, scores, softmax_sums) -> torch.Tensor:
    budget = case.token_budget
    selected, num_attended = inputs.select(ops, scores, budget, softmax_sums)
    live = batch.live[:, None].expand_as(selected)
    assert (selected[~live] == UNTOUCHED).all() and (selected[live] <= 1).all()
    chosen = (selected == 1) & live
    taken = (chosen * batch.sizes).sum(2)  # [R, H]
    assert torch.equal(
        num_attended.long(), inputs.seq_lens[:, None] - batch.clustered + taken
    )
    weights = batch.rank_weights(scores)
    differs = (chosen != batch.select(weights, budget)) & live
    heaviest = weights.masked_fill(~differs, 0).amax(2)
    lightest = weights.masked_fill(~differs, torch.inf).amin(2)
    is_near_tie = heaviest - lightest <= NEAR_TIE * heaviest + NEGLIGIBLE
    assert (is_near_tie | ~differs.any(2)).all()

    # The fewest of the heaviest, by the result alone.
    covers = batch.clustered <= budget
    assert (chosen | ~live)[covers].all()
    assert not (chosen & (batch.sizes == 0))[~covers].any()
    last = weights.masked_fill(~chosen, torch.inf).amin(2)
    near_last = chosen & (weights <= (last * (1 + NEAR_TIE) + NEGLIGIBLE)[..., None])
    surplus = taken - batch.sizes.masked_fill(~near_last, 0).amax(2)
    assert (covers | ((surplus < budget) & (taken >= budget))).all()
    return selected


def check_decode(case, inputs, batch, scores, selected) -> None:
    options = {"tail_estimate": case.tail_estimate, "num_splits": case.num_splits}
    output = inputs.decode(ops, scores, selected, **options)
    expected, magnitude = batch.decode(scores, selected, case.tail_estimate)
    # Kernels may round weights to the dtype, do round the output to it, and may take
    # subnormal fp32 for zero.
    info = torch.finfo(case.dtype)
    bound = (1.5 * info.eps + 2e-5) * magnitude + info.smallest_normal * info.eps
    bound += torch.finfo(torch.float32).smallest_normal
    assert_within(output.float(), expected, bound)
    assert (output[inputs.seq_lens == 0] == 0).all()
    assert_same_bits(inputs.decode(ops, scores, selected, **options), output)
