# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_clusterkv project
"""Groups of neighbours: small pages of tokens in their order of arrival."""

from dataclasses import dataclass

import torch

from benchmarks.quality.methods.groups import GroupedIndex, GroupedMethod


@dataclass(frozen=True)
class SmallPageMethod(GroupedMethod):
    """Settings of a method that chooses small pages.

    Attributes:
        tokens_per_group: Tokens a small page. Divides ``page_size``.
    """

    tokens_per_group: int = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.page_size % self.tokens_per_group:
            raise ValueError(
                f"tokens_per_group must divide the page of {self.page_size} tokens, "
                f"got {self.tokens_per_group}"
            )


class SmallPageIndex(GroupedIndex):
    """Small pages of everything before the last page; sinks are in none."""

    method: SmallPageMethod

    def _form_groups(self, keys, values) -> None:
        start = self.labels.shape[1]
        end = self.method.last_page_start(self.seq_len)
        if end == start:
            return
        position = torch.arange(start, end, device=keys.device)
        labels = (position - start) // self.method.tokens_per_group
        num_groups = (end - start) // self.method.tokens_per_group
        labels = labels.masked_fill(position < self.method.num_sink_tokens, -1)
        labels = labels.expand(keys.shape[0], -1)
        keys, values = keys[:, start:end], values[:, start:end]
        self._append(keys, values, labels, num_groups)
        self._note(keys.unflatten(1, (num_groups, -1)))

    def _note(self, keys: torch.Tensor) -> None:
        """Keeps more of the new small pages than their means.

        Args:
            keys: [num_kv_heads, num_new_groups, tokens_per_group, head_size].
        """
