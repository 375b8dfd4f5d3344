# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_clusterkv project
"""StreamingLLM (arXiv 2309.17453): the sinks and the most recent tokens.

Positions are not renumbered, unlike in the paper: contexts here are within what the
model was trained for, and the cache holds rotated keys.
"""

from dataclasses import dataclass

import torch

from benchmarks.quality.methods.base import Index, Method, Selection


@dataclass(frozen=True)
class Window(Method):
    """Spends the budget on the tokens right before the last page."""

    def index(self, scale: float) -> "WindowIndex":
        return WindowIndex(self)


class WindowIndex(Index):
    """Nothing but the keys' shape."""

    def __init__(self, method: Window) -> None:
        self.method = method

    def update(self, keys, values) -> None:
        self.keys = keys

    def select(self, query, token_budget) -> Selection:
        num_kv_heads, seq_len, _ = self.keys.shape
        mask = self.method.always_attended(seq_len, self.keys.device)
        position = torch.arange(seq_len, device=mask.device)
        mask |= position >= self.method.last_page_start(seq_len) - token_budget
        return Selection(mask.expand(num_kv_heads, -1))
