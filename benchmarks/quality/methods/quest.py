# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_clusterkv project
"""Quest (arXiv 2406.10774): the bound of the logits of each page of 16 tokens.

Of each page the smallest and the largest element of every channel are kept. No key of
the page has a larger logit than ``sum_d max(q_d min_d, q_d max_d)``.

As published, every query head has a KV head of its own and ranks pages by that bound.
Adapted to GQA here: the query heads of a KV head share a selection by the same vote as
the product's, with the bound as the logit of every token of the page (the largest of
the bounds, ``vote="max"``, measured worse, their mean alike).
The paper's two dense first layers are left to whoever runs the layers.
"""

from dataclasses import dataclass

import torch

from benchmarks.quality.methods.small_pages import SmallPageIndex, SmallPageMethod


@dataclass(frozen=True)
class Quest(SmallPageMethod):
    """Scores a small page by the bound of its logits."""

    def index(self, scale: float) -> "QuestIndex":
        return QuestIndex(self, scale)


class QuestIndex(SmallPageIndex):
    """Smallest and largest element of each channel, a small page."""

    vectors_per_group = 2

    def __init__(self, method: Quest, scale: float) -> None:
        super().__init__(method, scale)
        self.smallest: torch.Tensor | None = None  # [num_kv_heads, num_groups, D]
        self.largest: torch.Tensor | None = None

    def _note(self, keys) -> None:
        smallest, largest = keys.amin(2), keys.amax(2)
        if self.smallest is not None and self.largest is not None:
            smallest = torch.cat([self.smallest, smallest], 1)
            largest = torch.cat([self.largest, largest], 1)
        self.smallest, self.largest = smallest, largest

    def _scores(self, query) -> torch.Tensor:
        assert self.smallest is not None and self.largest is not None
        # A channel's bound is at its largest element where the query is positive.
        positive, negative = query.clamp(min=0), query.clamp(max=0)
        bound = positive @ self.largest.float().mT + negative @ self.smallest.float().mT
        return self.scale * bound
