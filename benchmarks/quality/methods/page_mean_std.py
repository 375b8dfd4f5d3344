# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_clusterkv project
"""Mean and deviation of each page of 16 tokens.

If the channels of a page's keys were independent, the logits of its tokens would have
the mean ``q . mean`` and the deviation ``sqrt(sum_d q_d^2 var_d)``. A page is scored by
the mean plus ``strength`` deviations: between the mean, which hides a single good
token, and Quest's bound, which is far above every token.
"""

from dataclasses import dataclass

import torch

from benchmarks.quality.methods.small_pages import SmallPageIndex, SmallPageMethod


@dataclass(frozen=True)
class PageMeanStd(SmallPageMethod):
    """Settings.

    Attributes:
        strength: Deviations that are added to the mean.
    """

    strength: float = 1.0

    def index(self, scale: float) -> "PageMeanStdIndex":
        return PageMeanStdIndex(self, scale)


class PageMeanStdIndex(SmallPageIndex):
    """The means, and the variance of each channel."""

    vectors_per_group = 2
    method: PageMeanStd

    def __init__(self, method: PageMeanStd, scale: float) -> None:
        super().__init__(method, scale)
        self.variances: torch.Tensor | None = None  # [num_kv_heads, num_groups, D]

    def _note(self, keys) -> None:
        new = keys.float().var(2, correction=0).to(keys.dtype)
        old = [] if self.variances is None else [self.variances]
        self.variances = torch.cat([*old, new], 1)

    def _scores(self, query) -> torch.Tensor:
        assert self.variances is not None
        deviation = (query.square() @ self.variances.float().mT).sqrt()
        means = super()._scores(query)
        return means + self.scale * self.method.strength * deviation
