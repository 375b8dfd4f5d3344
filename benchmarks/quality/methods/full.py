# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_clusterkv project
"""Everything: dense attention, for reference."""

from dataclasses import dataclass

import torch

from benchmarks.quality.methods.base import Index, Method, Selection


@dataclass(frozen=True)
class Full(Method):
    """Attends to all tokens, whatever the budget."""

    def index(self, scale: float) -> "FullIndex":
        return FullIndex()


class FullIndex(Index):
    """Nothing but the keys' shape."""

    def update(self, keys, values) -> None:
        self.keys = keys

    def select(self, query, token_budget) -> Selection:
        return Selection(torch.ones_like(self.keys[..., 0], dtype=torch.bool))
