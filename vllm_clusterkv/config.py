# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_clusterkv project
"""Settings, from ``--additional-config '{"clusterkv": {...}}'``."""

import dataclasses
import difflib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_clusterkv.page_layout import BLOCK_SIZE


@dataclass(frozen=True)
class ClusterKVConfig:
    """Validated settings of the backend.

    Attributes:
        token_budget: Tokens each decode row and KV head attends to exactly, chosen
            by cluster. The attention sinks and the page being filled (at most 255
            tokens and the current one) come on top. A budget that covers the
            context gives exact attention.
        tokens_per_cluster: Average tokens a cluster: 4, 8 or 16. Smaller selects
            more finely and takes a larger index.
        num_iters: Rounds of k-means when a page is indexed.
        num_sink_tokens: First tokens of a request, always attended to.
        tail_estimate: Whether clusters left out are stood in for by their means.
        min_sparse_len: Rows with fewer tokens are attended densely. None: the
            platform's measured crossover, or what ``token_budget`` covers, if that
            is more.
        stats_path: File that receives one JSON line a decode step with the context
            and the attended tokens of each request; None for no file. For demos and
            debugging. With data parallelism, of the first replica alone.
        host_memory_gib: CPU memory for pages of running requests that the KV cache has
            no room for, of all workers of a replica together; 0 for none.
        hot_cache_tokens: Tokens of host pages that a request keeps on the device, of
            each KV head those used last; None for twice ``token_budget``, or less
            where that is much of a request or of the KV cache.
        host_watermark: Share of the KV cache's blocks to keep free by moving pages
            there.
        poison_released: Fill blocks whose page has moved with NaN. For tests.
    """

    token_budget: int = 1024
    tokens_per_cluster: int = 8
    num_iters: int = 4
    num_sink_tokens: int = 16
    tail_estimate: bool = True
    min_sparse_len: int | None = None
    stats_path: str | None = None
    host_memory_gib: float = 0
    hot_cache_tokens: int | None = None
    host_watermark: float = 0.05
    poison_released: bool = False

    @property
    def num_clusters(self) -> int:
        """Clusters a page and KV head."""
        return BLOCK_SIZE // self.tokens_per_cluster

    @property
    def wanted_hot_blocks(self) -> int:
        """Blocks that ``hot_cache_tokens`` asks for; null, at most."""
        tokens = self.hot_cache_tokens
        if tokens is None:
            tokens = 2 * self.token_budget
        return -(-tokens // BLOCK_SIZE)

    def effective_min_sparse_len(self, crossover: int) -> int:
        """Tokens from which a row is attended to sparsely.

        Args:
            crossover: Tokens from which that is faster, as measured for a platform.
        """
        if self.min_sparse_len is not None:
            return self.min_sparse_len
        # The longest row whose clustered tokens all fit the budget.
        num_indexed = (self.token_budget + self.num_sink_tokens) // BLOCK_SIZE
        covered = (num_indexed + 1) * BLOCK_SIZE
        return max(crossover, covered + 1)

    def __post_init__(self) -> None:
        self._check_int("token_budget", 1, 2**30)
        self._check_int("num_iters", 1, 100)
        self._check_int("num_sink_tokens", 0, BLOCK_SIZE // 2)
        if self.min_sparse_len is not None:
            self._check_int("min_sparse_len", 0, 2**30, " or null")
        if self.hot_cache_tokens is not None:
            self._check_int("hot_cache_tokens", 0, 2**30, " or null")
        if type(self.tokens_per_cluster) is not int or (
            self.tokens_per_cluster not in (4, 8, 16)
        ):
            self._reject("tokens_per_cluster", "4, 8 or 16")
        for name in ("tail_estimate", "poison_released"):
            if type(getattr(self, name)) is not bool:
                self._reject(name, "true or false")
        self._check_number("host_memory_gib", 0, 2**20)
        self._check_number("host_watermark", 0, 0.5)
        if self.stats_path is not None and (
            type(self.stats_path) is not str or not self.stats_path
        ):
            self._reject("stats_path", "a file path or null")
        if self.stats_path is not None and (
            Path(self.stats_path).is_dir()
            or not Path(self.stats_path).absolute().parent.is_dir()
        ):
            self._reject("stats_path", "a file in a folder that exists")

    def _check_int(self, name: str, low: int, high: int, or_else: str = "") -> None:
        value = getattr(self, name)
        if type(value) is not int or not low <= value <= high:
            self._reject(name, f"an integer from {low} to {high}{or_else}")

    def _check_number(self, name: str, low: float, high: float) -> None:
        value = getattr(self, name)
        if type(value) not in (int, float) or not low <= value <= high:
            self._reject(name, f"a number from {low} to {high}")

    def _reject(self, name: str, expected: str) -> None:
        raise ValueError(
            f"--additional-config: clusterkv.{name} must be {expected}, "
            f"got {getattr(self, name)!r}"
        )

    @classmethod
    def from_additional_config(cls, additional_config: Any) -> "ClusterKVConfig":
        """Reads the settings of a ``VllmConfig.additional_config``.

        Args:
            additional_config: vLLM's dict; settings are under the key "clusterkv",
                all of them optional.

        Raises:
            ValueError: An unknown setting, or a value out of its range.
        """
        if not isinstance(additional_config, dict):
            return cls()
        known = [field.name for field in dataclasses.fields(cls)]
        for key in additional_config:
            # Other plugins' keys are theirs; these can only be meant for us.
            letters = "".join(c for c in str(key).lower() if c.isalnum())
            is_like = difflib.SequenceMatcher(None, letters, "clusterkv").ratio() > 0.9
            if key in known or (is_like and key != "clusterkv"):
                raise ValueError(
                    "--additional-config: settings must be under the key 'clusterkv', "
                    f'as in {{"clusterkv": {{"token_budget": 1024}}}}, got the '
                    f"key {key!r} beside it"
                )
        given = additional_config.get("clusterkv", {})
        if not isinstance(given, dict):
            raise ValueError(
                "--additional-config: clusterkv must be a mapping of settings, "
                f"got {given!r}"
            )
        for name in given:
            if name not in known:
                raise ValueError(
                    f"--additional-config: clusterkv has no setting {name!r}; "
                    f"the settings are {', '.join(known)}"
                )
        return cls(**given)
