# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_clusterkv project
"""Methods that choose whole groups of tokens by a few vectors a group.

A group is a page of 16 neighbours, or a cluster. Methods differ in how they form
groups, in what they keep of each, and in how they score it.
"""

from abc import abstractmethod
from dataclasses import dataclass

import torch

from benchmarks.quality.methods.base import (
    BYTES_PER_ELEMENT,
    Index,
    Method,
    Selection,
)
from benchmarks.quality.methods.votes import VOTES, rank


@dataclass(frozen=True)
class GroupedMethod(Method):
    """Settings of a method that chooses groups.

    Attributes:
        vote: How the query heads of a KV head agree on an order; one of ``VOTES``.
        tail: Whether groups left out are stood in for by their mean value, with
            ``log(count)`` added to their logit, as Chelsea's centroids (arXiv
            2506.11418).
        trim: Whether the last group taken is cut where the budget ends. If not, it
            may exceed the budget.
    """

    vote: str = "softmax"
    tail: bool = False
    trim: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.vote not in VOTES:
            raise ValueError(f"vote must be one of {VOTES}, got {self.vote!r}")


class GroupedIndex(Index):
    """Which group each token is in, and vectors of each group.

    Attributes:
        labels: [num_kv_heads, num_tokens] int64: the group of each token; -1 for
            none, the sinks. Tokens beyond ``num_tokens`` are in no group yet. Tokens
            in no group are always attended to.
        mean_keys: [num_kv_heads, num_groups, head_size], as the keys.
        mean_values: As mean_keys.
        seq_len: Tokens of the context.
    """

    vectors_per_group = 1
    """Vectors of ``head_size`` that are read of each group to score it."""

    def __init__(self, method: GroupedMethod, scale: float) -> None:
        self.method, self.scale = method, scale
        self.seq_len = 0
        self.labels = torch.empty(0)
        self.mean_keys = torch.empty(0)
        self.mean_values = torch.empty(0)

    def update(self, keys, values) -> None:
        if self.seq_len == 0:
            num_kv_heads, _, head_size = keys.shape
            self.labels = keys.new_empty((num_kv_heads, 0), dtype=torch.int64)
            self.mean_keys = keys.new_empty((num_kv_heads, 0, head_size))
            self.mean_values = self.mean_keys
        self.seq_len = keys.shape[1]
        self._form_groups(keys, values)

    @abstractmethod
    def _form_groups(self, keys, values) -> None:
        """Puts tokens beyond ``labels`` into groups, where it is time to."""

    def _append(self, keys, values, labels, num_groups, mean_keys=None) -> None:
        """Appends groups of the next tokens.

        Args:
            keys: [num_kv_heads, num_new, head_size]: the tokens behind ``labels``.
            values: As keys.
            labels: [num_kv_heads, num_new] int64, from 0; -1 for no group.
            num_groups: Groups that ``labels`` counts.
            mean_keys: [num_kv_heads, num_groups, head_size], if they are not the means.
        """
        if mean_keys is None:
            mean_keys = group_means(keys, labels, num_groups)
        first = self.mean_keys.shape[1]
        mean_values = group_means(values, labels, num_groups)
        self.mean_keys = torch.cat([self.mean_keys, mean_keys.to(keys.dtype)], 1)
        self.mean_values = torch.cat([self.mean_values, mean_values], 1)
        labels = torch.where(labels < 0, -1, labels + first)
        self.labels = torch.cat([self.labels, labels], 1)

    def _scores(self, query) -> torch.Tensor:
        """A logit for each group and query head.

        Args:
            query: [num_kv_heads, group, head_size] fp32.

        Returns:
            [num_kv_heads, group, num_groups] fp32.
        """
        return self.scale * query @ self.mean_keys.float().mT

    def _index_bytes(
        self, num_groups: int, num_selected: torch.Tensor
    ) -> float | torch.Tensor:
        """Bytes a KV head that scoring and selecting read.

        Args:
            num_groups: Groups scored.
            num_selected: Tokens taken from groups, mean over the KV heads: a tensor
                of no dimensions.
        """
        vector_bytes = self.mean_keys.shape[2] * BYTES_PER_ELEMENT
        return self.vectors_per_group * num_groups * vector_bytes

    def _mean_value_bytes(self) -> float | None:
        """Bytes of a group's mean value; None for those of a token's value."""
        return None

    def select(self, query, token_budget) -> Selection:
        num_kv_heads, num_groups, _ = self.mean_keys.shape
        num_labels = self.labels.shape[1]
        last_page = self.method.last_page_start(self.seq_len)
        shape = (num_kv_heads, self.seq_len)
        # Known without a look at the labels: all but the sinks are in a group.
        if min(num_labels, last_page) - self.method.num_sink_tokens <= token_budget:
            return Selection(self.labels.new_ones(shape, dtype=torch.bool))
        missing = self.seq_len - num_labels
        labels = torch.nn.functional.pad(self.labels, (0, missing), value=-1)
        always = self.method.always_attended(self.seq_len, labels.device)
        labels = labels.masked_fill(always, -1)
        counts = count_labels(labels, num_groups)
        query = query.float().unflatten(0, (num_kv_heads, -1))
        scores = self._scores(query)
        ranks = rank(scores, counts, self.method.vote)
        mask = take_groups(ranks, labels, counts, token_budget, self.method.trim)
        num_selected = (mask & (labels >= 0)).double().sum(1).mean()
        selection = Selection(mask, self._index_bytes(num_groups, num_selected))
        if self.method.tail:
            left = count_labels(labels.masked_fill(mask, -1), num_groups)
            selection.extra_logits = scores + left.log()[:, None]
            selection.extra_values = self.mean_values
            selection.extra_value_bytes = self._mean_value_bytes()
        return selection


def take_groups(ranks, labels, counts, token_budget: int, trim: bool) -> torch.Tensor:
    """Takes the fewest groups, best first, whose tokens reach the budget.

    Args:
        ranks: [num_kv_heads, num_groups] fp32; ties go to the lowest group.
        labels: [num_kv_heads, seq_len] int64; -1 is always taken.
        counts: [num_kv_heads, num_groups] int64.
        token_budget: Tokens a KV head.
        trim: Whether to cut the last group, keeping its earliest tokens.

    Returns:
        [num_kv_heads, seq_len] bool.
    """
    order = ranks.argsort(dim=1, descending=True, stable=True)
    sizes = counts.gather(1, order)
    before = sizes.cumsum(1) - sizes
    room = torch.zeros_like(counts).scatter(1, order, token_budget - before)
    taken = torch.nn.functional.pad((room > 0) & (counts > 0), (0, 1), value=True)
    # Label -1 finds the entry behind the last group.
    mask = taken.gather(1, labels.remainder(taken.shape[1]))
    if trim:
        # One group a KV head at most: those before it have room for all of theirs.
        cut = (room > 0) & (room < counts)
        members = torch.nn.functional.pad(cut, (0, 1)).gather(
            1, labels.remainder(taken.shape[1])
        )
        kept = room.where(cut, 0).sum(1, keepdim=True)
        mask &= ~members | (members.cumsum(1) <= kept)
    return mask


def count_labels(labels, num_groups: int) -> torch.Tensor:
    """Tokens of each group, without label -1: [num_kv_heads, num_groups] int64."""
    counts = labels.new_zeros((labels.shape[0], num_groups + 1))
    ones = torch.ones_like(labels)
    return counts.scatter_add(1, labels.remainder(num_groups + 1), ones)[:, :-1]


def group_means(rows, labels, num_groups: int) -> torch.Tensor:
    """Mean row of each group, in fp32 and then rounded; zero for an empty group.

    Args:
        rows: [num_kv_heads, num_rows, head_size].
        labels: [num_kv_heads, num_rows] int64; -1 for no group.
        num_groups: Groups.

    Returns:
        [num_kv_heads, num_groups, head_size], as rows.
    """
    num_kv_heads, _, head_size = rows.shape
    sums = rows.new_zeros((num_kv_heads, num_groups + 1, head_size), dtype=torch.float)
    where = labels.remainder(num_groups + 1)[..., None].expand(rows.shape)
    sums = sums.scatter_add(1, where, rows.float())[:, :-1]
    counts = count_labels(labels, num_groups).clamp(min=1)
    return (sums / counts[..., None]).to(rows.dtype)
