# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_clusterkv project
"""Mean key of each page of 16 tokens: what is left of the product's method when pages
are not clustered."""

from dataclasses import dataclass

from benchmarks.quality.methods.small_pages import SmallPageIndex, SmallPageMethod


@dataclass(frozen=True)
class PageMean(SmallPageMethod):
    """Scores a small page by query . mean key."""

    def index(self, scale: float) -> SmallPageIndex:
        return SmallPageIndex(self, scale)
