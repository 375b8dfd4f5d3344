# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_clusterkv project
"""The references for whole batches at once: fast enough for thousands of cases.

``tests/test_reference.py`` holds them against ``reference.py``. Everything runs on
the device of the inputs. Shapes: R rows, B pages a row (``max_blocks``), H KV heads, G
query heads a KV head, C clusters a page, N = B * C clusters a row, D head size.
"""

import torch

from tests.support.inputs import DecodeInputs
from vllm_clusterkv import key_codes
from vllm_clusterkv.page_layout import BLOCK_SIZE
from vllm_clusterkv.reference import (
    SPREAD_MOST,
    best_score,
    first_argmax,
    query_squares,
    spread_rows,
    spread_score,
)


class BatchedReference:
    """The decode ops of one batch."""

    def __init__(self, inputs: DecodeInputs) -> None:
        layout = inputs.pages.layout
        self.inputs = inputs
        self.num_clusters, device = layout.num_clusters, inputs.query.device
        self.block_table = inputs.block_table.long()  # [R, B]
        num_reqs, max_blocks = self.block_table.shape
        self.query = inputs.query.float().unflatten(1, (layout.num_kv_heads, -1))
        seq_lens = inputs.seq_lens.long()
        self.is_dense = inputs.seq_lens < inputs.min_sparse_lens  # [R]
        num_indexed = (seq_lens - 1).clamp(min=0) // BLOCK_SIZE
        num_indexed = num_indexed.masked_fill(self.is_dense, 0)
        pages = torch.arange(max_blocks, device=device)
        self.is_indexed = pages < num_indexed[:, None]  # [R, B]
        self.live = self.is_indexed.repeat_interleave(self.num_clusters, 1)  # [R, N]
        self.ends = inputs.pages.cluster_ends[self.block_table].int()  # [R, B, H, C]
        starts = torch.zeros_like(self.ends)
        starts[..., 1:] = self.ends[..., :-1]
        starts[:, 0, :, 0] = inputs.num_sink_tokens
        sizes = (self.ends - starts).masked_fill(~self.is_indexed[..., None, None], 0)
        self.sizes = sizes.transpose(1, 2).flatten(2).long()  # [R, H, N]
        self.clustered = self.sizes.sum(2)  # [R, H]

    def scores(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Scores, estimates, and by how much fp32 sums may differ: [R, H * G, N] each.

        Entries of clusters that do not exist are meaningless.
        """
        # [R, B, H, C, D]
        means = self.inputs.pages.centroids[self.block_table][:, :, :, 0].float()
        formula, scale = "rhgd,rbhcd->rhgbc", self.inputs.scale
        of_mean = scale * torch.einsum(formula, self.query, means)
        bound = scale * torch.einsum(formula, self.query.abs(), means.abs())
        # [R, B, H, 1, D + C] to [R, H, G, B, C]
        spreads = self.inputs.pages.spreads[self.block_table].float()[:, :, :, None]
        squares = query_squares(self.inputs.query).view_as(self.query)
        spread = spread_score(squares[:, None], spreads, scale).permute(0, 2, 3, 1, 4)
        best, reach = self._best_keys(scale * spreads[..., means.shape[4] :])
        counts = self.sizes.unflatten(2, (-1, self.num_clusters))[:, :, None]
        scores = best_score(of_mean + spread, of_mean, best, counts)
        estimates = scores.minimum(of_mean + SPREAD_MOST)
        # A logarithm of a count is at most 6. Tensor cores cut their sums instead of
        # rounding them, and codes' are twice the best product less three times another.
        bound = bound + spread + 2 * reach + 6
        bound *= 16 * torch.finfo(torch.float32).eps
        return tuple(t.flatten(3).flatten(1, 2) for t in (scores, estimates, bound))

    def _best_keys(self, radii: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What the best coded keys add to their means' logits, and what a key of the
        same magnitudes would, could it have every sign it wants: [R, H, G, B, C] each.

        Args:
            radii: [R, B, H, 1, C] fp32, times the scale.
        """
        inputs = self.inputs
        codes = inputs.pages.codes[self.block_table]  # [R, B, H, bytes]
        codes = codes.masked_fill(~self.is_indexed[:, :, None, None], 0)[:, :, :, None]
        query = inputs.query.view_as(self.query)[:, None]  # [R, 1, H, G, D]
        layout = inputs.pages.layout
        decoded = key_codes.decode(
            codes, layout.num_clusters, layout.head_size, layout.dtype
        )
        best = key_codes.best_key(query, decoded, radii)  # [R, B, H, G, C]
        dims, deviations, _ = decoded
        asked = query.float().expand(*best.shape[:-1], -1)
        asked = asked.gather(-1, dims.expand(*best.shape[:-1], -1)) * deviations
        reach = 3 * key_codes.STEP * radii * asked.abs().sum(-1, keepdim=True)
        return best.permute(0, 2, 3, 1, 4), reach.permute(0, 2, 3, 1, 4)

    def rank_weights(self, scores: torch.Tensor) -> torch.Tensor:
        """``reference.rank_weights`` of every row and head: [R, H, N] fp64."""
        exists = (self.sizes > 0)[:, :, None]
        logits = scores.double().unflatten(1, self.query.shape[1:3])
        logits = logits.masked_fill(~exists, float("-inf"))
        highest = logits.amax(3, keepdim=True)
        exps = torch.exp(logits - highest.masked_fill(highest.isinf(), 0))
        sums = (exps * self.sizes[:, :, None]).sum(3, keepdim=True)
        weights = (exps / sums).sum(2)
        return weights.masked_fill(~exists[:, :, 0], -1.0)

    def select(self, weights: torch.Tensor, token_budget: int) -> torch.Tensor:
        """The selection by these weights: [R, H, N] bool."""
        order = weights.argsort(dim=2, descending=True, stable=True)
        sizes = self.sizes.gather(2, order)
        is_needed = sizes.cumsum(2) - sizes < token_budget
        chosen = torch.zeros_like(is_needed).scatter(2, order, is_needed)
        covers = (self.clustered <= token_budget)[..., None]
        return torch.where(covers, self.live[:, None], chosen & (self.sizes > 0))

    def decode(
        self, estimates: torch.Tensor, selected: torch.Tensor, tail_estimate: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Attention, and the same weights over absolute values: [R, H * G, D] each.

        The second is what errors of weights are relative to; it grows with the
        logits, whose last bits the weights depend on.
        """
        inputs = self.inputs
        selected = selected.bool() & self.live[:, None]  # [R, H, N]
        rows = inputs.pages.kv_cache[self.block_table].float()  # [R, B, H, 256, 2 * D]
        keys, values = rows.transpose(1, 2).chunk(2, dim=-1)  # [R, H, B, 256, D]
        keep = self._attended_rows(selected)  # [R, H, L], L = B * 256
        logits = torch.einsum("rhgd,rhbid->rhgbi", self.query, keys).flatten(3)
        logits = (inputs.scale * logits).masked_fill(~keep[:, :, None], float("-inf"))
        left_out = ~selected & (self.sizes > 0) & tail_estimate
        estimates = estimates.unflatten(1, self.query.shape[1:3])
        estimates = estimates + self.sizes.log()[:, :, None]
        estimates = estimates.masked_fill(~left_out[:, :, None], float("-inf"))
        logits = torch.cat([logits, estimates], 3)
        weights = logits.softmax(3)  # NaN for padding rows
        # [R, H, B, C, D]
        means = inputs.pages.centroids[self.block_table][:, :, :, 1].transpose(1, 2)
        values = torch.cat([values.flatten(2, 3), means.flatten(2, 3).float()], 2)
        is_read = torch.cat([keep, left_out], 2)[..., None]
        values = values.masked_fill(~is_read, 0)
        is_padding = (inputs.seq_lens == 0)[:, None, None]
        largest = logits.masked_fill(logits.isinf(), 0).abs().amax(3, keepdim=True)
        output = (weights @ values).flatten(1, 2)
        magnitude = ((1 + 0.05 * largest) * (weights @ values.abs())).flatten(1, 2)
        return output.masked_fill(is_padding, 0), magnitude.masked_fill(is_padding, 0)

    def _attended_rows(self, selected: torch.Tensor) -> torch.Tensor:
        """Which rows of its pages each row attends to exactly: [R, H, B * 256]."""
        device, sinks = selected.device, self.inputs.num_sink_tokens
        row = torch.arange(BLOCK_SIZE, dtype=torch.int32, device=device)
        shape = (*self.ends.shape[:3], BLOCK_SIZE)
        labels = torch.searchsorted(
            self.ends.contiguous(), row.expand(shape).contiguous(), right=True
        ).clamp(max=self.num_clusters - 1)
        by_page = selected.unflatten(2, (-1, self.num_clusters)).transpose(1, 2)
        keep = by_page.gather(3, labels)  # [R, B, H, 256]
        keep[:, 0] |= row < sinks
        position = torch.arange(keep.shape[1] * BLOCK_SIZE, device=device)
        position = position.view(1, -1, 1, BLOCK_SIZE)
        in_row = position < self.inputs.seq_lens[:, None, None, None]
        keep = torch.where(self.is_indexed[..., None, None], keep, in_row)
        return keep.transpose(1, 2).flatten(2)


def cluster_keys(keys: torch.Tensor, num_clusters: int, num_iters: int) -> torch.Tensor:
    """``reference.cluster_keys`` of many pages: [P, num_rows, D] to [P, num_rows]."""
    rows = spread_rows(keys, num_clusters)
    means = keys.take_along_dim(rows[..., None], 1)  # [P, C, D]
    labels = torch.zeros(keys.shape[:2], dtype=torch.int64, device=keys.device)
    for _ in range(num_iters):
        norms = means.norm(dim=2, keepdim=True)
        directions = torch.where(norms > 0, means / norms, 0)
        labels = first_argmax(keys @ directions.mT)
        members = torch.nn.functional.one_hot(labels, num_clusters).mT.float()
        counts = members.sum(2, keepdim=True)
        means = torch.where(counts > 0, members @ keys / counts.clamp(min=1), means)
    return labels
