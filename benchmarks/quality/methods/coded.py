# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_clusterkv project
"""The product's clusters, scored by a few bits of each key. Not in the product.

A cluster's mean hides the one key among sixteen that a query asks for. Here the index
also has, of each key, how it differs from its cluster's mean, in ``bits`` bits for each
of the dimensions in which the page's keys are spread most. A cluster's score is the
logarithm of the mean weight of its keys so restored or, with ``best``, what the best of
them makes of that mean alone, if it is more than the product's score.
"""

from dataclasses import dataclass

import torch

from benchmarks.quality.methods.groups import count_labels
from benchmarks.quality.methods.ours import Ours, OursIndex

LEVELS = {
    1: (0.7979,),
    2: (0.4528, 1.5104),
    3: (0.2451, 0.7560, 1.3439, 2.1520),
    4: (0.1284, 0.3881, 0.6568, 0.9424, 1.2562, 1.6181, 2.0690, 2.7326),
}
"""Of a normal variable of deviation 1, with both signs, by bits: Max, Quantizing for
minimum distortion (1960), table I."""


@dataclass(frozen=True)
class Coded(Ours):
    """Settings, those of ``Ours`` besides.

    Attributes:
        bits: Of a dimension, 1 to 4.
        share: Of the dimensions that have bits, those of a page in which its keys are
            farthest from their means; above 0, at most 1.
        best: Score by the best key instead of all: no sum of weights.
    """

    bits: int = 2
    share: float = 0.25
    best: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.bits not in LEVELS:
            raise ValueError(f"bits must be among {list(LEVELS)}, got {self.bits!r}")
        if not 0 < self.share <= 1:
            raise ValueError(f"share must be above 0, at most 1, got {self.share!r}")
        if not self.spread:
            raise ValueError("spread must be true: codes are relative to it, got False")

    def index(self, scale: float) -> "CodedIndex":
        return CodedIndex(self, scale)


class CodedIndex(OursIndex):
    """Clusters of each full page before the last one, with codes of their keys.

    Attributes:
        codes: [num_kv_heads, num_tokens, head_size] int8: for each of ``labels`` the
            number of a level with its sign, from 1; 0 where there are no bits.
    """

    method: Coded

    def __init__(self, method: Coded, scale: float) -> None:
        super().__init__(method, scale)
        self.codes = torch.empty(0)

    def _form_groups(self, keys, values) -> None:
        start = self.labels.shape[1]
        super()._form_groups(keys, values)
        end = self.labels.shape[1]
        if start == 0:
            self.codes = torch.empty_like(keys[:, :0], dtype=torch.int8)
        if end > start:
            new = self._encode(keys[:, start:end].float(), start)
            self.codes = torch.cat([self.codes, new], 1)

    def _encode(self, keys, start: int) -> torch.Tensor:
        """Codes of [num_kv_heads, num_new, head_size] fp32 from token ``start`` on."""
        levels = self._levels(keys.device)
        labels = self.labels[:, start:].clamp(min=0)
        deviations, has_bits = self._deviations(labels)
        off = (keys - self._means(labels)) / deviations.clamp(min=1e-20)
        # A level is nearest between the middles to its neighbours.
        number = torch.bucketize(off.abs(), (levels[1:-1] + levels[2:]) / 2) + 1
        codes = number.where(off >= 0, -number)
        return codes.where(has_bits[..., : keys.shape[2]], 0).to(torch.int8)

    def _levels(self, device) -> torch.Tensor:
        """Levels, behind a zero for no bits."""
        return torch.tensor((0.0, *LEVELS[self.method.bits]), device=device)

    def _means(self, labels) -> torch.Tensor:
        """Each token's mean key: [num_kv_heads, num_tokens, head_size] fp32."""
        means = self.mean_keys.float()
        where = labels[..., None].expand(*labels.shape, means.shape[2])
        return means.gather(1, where)

    def _deviations(self, labels) -> tuple[torch.Tensor, torch.Tensor]:
        """Each token's deviation in each dimension, and whether that has bits.

        Args:
            labels: [num_kv_heads, num_tokens] int64, from 0.

        Returns:
            [num_kv_heads, num_tokens, head_size], fp32 and bool.
        """
        if self.spreads is None:
            raise RuntimeError("a page is coded before it has spreads")
        head_size = self.mean_keys.shape[2]
        profiles, radii = self.spreads.float().tensor_split([head_size], 2)
        num_coded = max(round(self.method.share * head_size), 1)
        chosen = torch.zeros_like(profiles, dtype=torch.bool)
        chosen.scatter_(2, profiles.topk(num_coded, 2).indices, True)
        pages = (labels // self.method.num_clusters)[..., None]
        pages = pages.expand(*labels.shape, head_size)
        radius = radii.flatten(1).gather(1, labels)[..., None]
        return profiles.sqrt().gather(1, pages) * radius, chosen.gather(1, pages)

    def _scores(self, query) -> torch.Tensor:
        scores = super()._scores(query)
        num_groups = scores.shape[2]
        labels = self.labels.clamp(min=0)
        deviations, _ = self._deviations(labels)
        levels = self._levels(query.device)
        off = levels[self.codes.abs().long()] * self.codes.sign() * deviations
        logits = self.scale * query @ (self._means(labels) + off).mT
        # The sinks go behind the last cluster.
        where = self.labels.remainder(num_groups + 1)[:, None].expand(logits.shape)
        shape = (*scores.shape[:2], num_groups + 1)
        most = logits.new_full(shape, float("-inf"))
        most = most.scatter_reduce(2, where, logits, "amax")
        counts = count_labels(self.labels, num_groups)[:, None]
        log_counts = counts.clamp(min=1).log()
        if self.method.best:
            return torch.maximum(scores, most[..., :-1] - log_counts)
        weights = (logits - most.gather(2, where)).exp()
        sums = torch.zeros_like(most).scatter_add(2, where, weights)
        coded = (most + sums.log())[..., :-1] - log_counts
        return coded.where(counts > 0, scores)

    def _index_bytes(self, num_groups, num_selected) -> float | torch.Tensor:
        head_size = self.mean_keys.shape[2]
        num_coded = max(round(self.method.share * head_size), 1)
        codes = self.labels.shape[1] * num_coded * self.method.bits / 8
        return super()._index_bytes(num_groups, num_selected) + codes
