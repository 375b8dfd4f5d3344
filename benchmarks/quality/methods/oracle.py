# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_clusterkv project
"""The best selection there is: tokens by their exact softmax weight.

It reads every key, so it is a bound and no method. Its bytes count all keys as index.
"""

from dataclasses import dataclass

from benchmarks.quality.methods.attention import exact_logits
from benchmarks.quality.methods.base import (
    BYTES_PER_ELEMENT,
    Index,
    Method,
    Selection,
)


@dataclass(frozen=True)
class Oracle(Method):
    """Takes the tokens with most weight, summed over the query heads of a KV head."""

    def index(self, scale: float) -> "OracleIndex":
        return OracleIndex(self, scale)


class OracleIndex(Index):
    """The keys themselves."""

    def __init__(self, method: Oracle, scale: float) -> None:
        self.method, self.scale = method, scale

    def update(self, keys, values) -> None:
        self.keys = keys

    def select(self, query, token_budget) -> Selection:
        _, seq_len, head_size = self.keys.shape
        mass = exact_logits(query, self.keys, self.scale).softmax(2).sum(1)
        always = self.method.always_attended(seq_len, mass.device)
        mass = mass.masked_fill(always, -1.0)
        num_taken = min(token_budget, self.method.num_choosable(seq_len))
        best = mass.topk(num_taken, dim=1).indices
        mask = always.expand_as(mass).scatter(1, best, True)
        return Selection(mask, seq_len * head_size * BYTES_PER_ELEMENT)
