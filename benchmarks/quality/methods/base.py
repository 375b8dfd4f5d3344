# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_clusterkv project
"""What every selection method is: settings, an index of one layer, a selection.

Shapes used throughout, all of one layer and one request:

    keys, values: [num_kv_heads, seq_len, head_size], rotated keys, as they are cached
    query:        [num_heads, head_size] of the current token, which is the last of
                  the ``seq_len``; head ``h`` belongs to KV head ``h // group``
    mask:         [num_kv_heads, seq_len] bool, tokens attended to exactly

The query heads of a KV head share one selection, for all methods: what is read of the
cache is read once a KV head, as in the product.

Every method attends to the sinks and to the last page, as far as it is filled,
whatever the budget: ``token_budget`` counts the tokens it may choose besides. That is
how the product counts.

Plain PyTorch, for evaluation: correct and readable, not fast. But no selection waits
for the device (``int()`` of a tensor, ``nonzero``): a step has one of each layer.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch

BYTES_PER_ELEMENT = 2
"""Bytes are counted as in a 16-bit cache, whatever type the evaluation runs in."""


@dataclass
class Selection:
    """What one layer attends to in one decode step.

    Attributes:
        mask: [num_kv_heads, seq_len] bool.
        index_bytes: Bytes of the index that were read to choose, a KV head; a tensor
            of no dimensions where they depend on what was chosen.
        extra_logits: [num_kv_heads, group, num_extra] fp32. Logits of rows that stand
            in for tokens left out; -inf where a KV head has none. None: no such rows.
        extra_values: [num_kv_heads, num_extra, head_size]. Their values.
        extra_value_bytes: Bytes of one of these; None for those of a token's value.
    """

    mask: torch.Tensor
    index_bytes: float | torch.Tensor = 0.0
    extra_logits: torch.Tensor | None = None
    extra_values: torch.Tensor | None = None
    extra_value_bytes: float | None = None

    @property
    def num_attended(self) -> torch.Tensor:
        """Tokens attended to exactly: [num_kv_heads] int64."""
        return self.mask.sum(1)

    def bytes_moved(self, head_size: int) -> float:
        """Bytes that the step reads, mean over the KV heads.

        The index, keys and values of the tokens attended to, and the values of the
        rows that stand in (their keys are part of the index). Query and output, the
        same for all methods, are left out.
        """
        row_bytes = head_size * BYTES_PER_ELEMENT
        total = float(self.index_bytes) + float(self.num_attended.double().mean()) * (
            2 * row_bytes
        )
        if self.extra_logits is not None:
            num_extra = (self.extra_logits[:, 0] > float("-inf")).sum(1)
            extra_bytes = self.extra_value_bytes
            if extra_bytes is None:
                extra_bytes = row_bytes
            total += float(num_extra.double().mean()) * extra_bytes
        return total


class Index(ABC):
    """What a method knows of one layer's context.

    No tensor is changed in place, so that ``copy.copy`` of an index gives one that
    grows on its own: a prompt is indexed once and continued several times.
    """

    @abstractmethod
    def update(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Takes note of new tokens.

        The first call brings the prompt. A later one brings the same tokens and the
        ones generated since, as a rule one.

        Args:
            keys: [num_kv_heads, seq_len, head_size], the whole context.
            values: As keys.
        """

    @abstractmethod
    def select(self, query: torch.Tensor, token_budget: int) -> Selection:
        """Chooses what the current token attends to.

        Args:
            query: [num_heads, head_size], of the last token that ``update`` brought.
            token_budget: Tokens to choose a KV head, besides those always attended to.
        """


@dataclass(frozen=True)
class Method(ABC):
    """A selection method and its settings.

    Attributes:
        num_sink_tokens: First tokens, always attended to.
        page_size: Tokens a page. The last page, which holds the current token and at
            most ``page_size`` tokens, is always attended to.
    """

    num_sink_tokens: int = 16
    page_size: int = 256

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            low = 0 if name == "num_sink_tokens" else 1
            if type(value) is int and value < low:
                raise ValueError(f"{name} must be at least {low}, got {value}")

    @property
    def depends_on_prompt(self) -> bool:
        """Whether a context in one piece is indexed otherwise than token by token."""
        return False

    @abstractmethod
    def index(self, scale: float) -> Index:
        """An index of no tokens.

        Args:
            scale: Softmax scale, 1 / sqrt(head_size) as a rule.
        """

    def always_attended(self, seq_len: int, device: torch.device) -> torch.Tensor:
        """The sinks and the last page: [seq_len] bool."""
        position = torch.arange(seq_len, device=device)
        last_page = self.last_page_start(seq_len)
        return (position < self.num_sink_tokens) | (position >= last_page)

    def num_choosable(self, seq_len: int) -> int:
        """Tokens that are not always attended to."""
        return max(self.last_page_start(seq_len) - self.num_sink_tokens, 0)

    def last_page_start(self, seq_len: int) -> int:
        """First position of the page that holds the current token."""
        return max(seq_len - 1, 0) // self.page_size * self.page_size
