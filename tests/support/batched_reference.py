# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_clusterkv project
"""The references for whole batches at once: fast enough for thousands of cases.

``tests/test_reference.py`` holds them against ``reference.py``. Everything runs on
the device of the inputs. Shapes: R rows, B pages a row (``max_blocks``), H KV heads, G
query heads a KV head, C clusters a page, N = B * C clusters a row, D head size.
"""

import torch

from tests.support.inputs import DecodeInputs
from vllm_clusterkv import short_means
from vllm_clusterkv.page_layout import BLOCK_SIZE
from vllm_clusterkv.reference import (
    deviating_query,
    first_argmax,
    mean_logits,
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

    def scores(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Scores, and by how much fp32 sums may differ: [R, H * G, N] each.

        Entries of clusters that do not exist are meaningless.
        """
        inputs, scale = self.inputs, self.inputs.scale
        fields = inputs.pages.fields[self.block_table]  # [R, B, H, ...]
        query = inputs.query.view_as(self.query)[:, None]  # [R, 1, H, G, D]
        of_mean = mean_logits(query, fields, scale)  # [R, B, H, G, C]
        spread = spread_score(query_squares(query), fields[:, :, :, None], scale)
        scores = of_mean + spread
        # The same with every sign as it is worst.
        codes = short_means.unpack(
            fields.key_codes, fields.num_clusters, fields.head_size, of_keys=True
        )
        deviating = deviating_query(query, fields.key_deviations[..., None, :])
        of_codes = deviating.abs() @ (codes - short_means.MIDDLE).abs().mT
        base = fields.key_base.float().abs()[..., None, :]
        of_base = (query.float().abs() * base).sum(-1, keepdim=True)
        bound = scale * (of_base + fields.key_steps.float()[..., None, :] * of_codes)
        # Tensor cores cut their sums instead of rounding them.
        bound = (bound + spread + 1) * 16 * torch.finfo(torch.float32).eps
        scores, bound = (t.permute(0, 2, 3, 1, 4) for t in (scores, bound))
        return scores.flatten(3).flatten(1, 2), bound.flatten(3).flatten(1, 2)

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
        self, scores: torch.Tensor, selected: torch.Tensor, tail_estimate: bool
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
        scores = scores.unflatten(1, self.query.shape[1:3])
        estimates = scores + self.sizes.log()[:, :, None]
        estimates = estimates.masked_fill(~left_out[:, :, None], float("-inf"))
        logits = torch.cat([logits, estimates], 3)
        weights = logits.softmax(3)  # NaN for padding rows
        # [R, H, B, C, D]
        means = inputs.pages.fields[self.block_table].mean_values().transpose(1, 2)
        values = torch.cat([values.flatten(2, 3), means.flatten(2, 3)], 2)
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
