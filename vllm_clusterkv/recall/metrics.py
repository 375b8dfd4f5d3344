# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_clusterkv project
"""What the host tier holds and does, on /metrics and in vLLM's periodic log line."""

from typing import TYPE_CHECKING, Any

from vllm.distributed.kv_transfer.kv_connector.v1.metrics import (
    KVConnectorPromMetrics,
    KVConnectorStats,
)
from vllm.v1.metrics.utils import create_metric_per_engine

if TYPE_CHECKING:
    from vllm_clusterkv.recall.books import RecallCounts

GAUGES = {
    "num_resident": ("resident_pages", "Pages that requests hold in blocks"),
    "num_copying": ("copying_pages", "Pages on their way to the host"),
    "num_clean": ("mirrored_pages", "Pages on the host, still read on the device"),
    "num_released": ("released_pages", "Pages that are read from the host"),
    "num_free_host_pages": ("free_pages", "Room in the host pool, in pages"),
    "num_slots": ("requests", "Requests that have pages on the host"),
}
"""Fields of ``RecallCounts`` that go up and down: metric and meaning."""

COUNTERS = {
    "total_copied": ("page_copies", "Pages copied to the host"),
    "total_released": ("page_releases", "Pages whose block was given away"),
    "total_late": ("late_page_copies", "Copies done when their request had ended"),
}
"""Fields that only grow."""

RECALLS = {
    "found": ("found_lines", "Lines of selected rows that were in hot blocks"),
    "recalled": ("recalled_lines", "Lines recalled from the host"),
    "left": ("left_lines", "Lines read on the host, having no room in hot blocks"),
    "recalled_bytes": ("recalled_bytes", "Bytes recalled from the host"),
    "calls": ("recalls", "Recalls, one of a row in a step, layer and KV head"),
    "recall_seconds": ("recall_seconds", "Time of these, side by side as they run"),
    "mass": ("covered_mass", "Estimated share of weight of selected clusters, summed"),
    "mass_samples": ("covered_mass_samples", "Samples of it"),
}
"""What workers count in all layers and KV heads. A line is 8 rows of a KV head."""


class RecallStats(KVConnectorStats):
    """Gauges as they are now, and what counters grew by since the last one."""

    @classmethod
    def between(
        cls, before: "RecallCounts | None", now: "RecallCounts"
    ) -> "RecallStats":
        """Of two moments; None for the start."""
        data = {name: getattr(now, name) for name in GAUGES}
        for name in COUNTERS:
            data[name] = getattr(now, name) - getattr(before, name, 0)
        return cls(data=data)

    def reset(self) -> None:
        self.data = {}

    def aggregate(self, other: KVConnectorStats) -> "RecallStats":
        for name, value in other.data.items():
            if name in COUNTERS or name in RECALLS:
                value += self.data.get(name, 0)
            self.data[name] = value
        return self

    def reduce(self) -> dict[str, int | float]:
        words = {
            "num_clean": "mirrored pages",
            "num_released": "released pages",
            "total_released": "just released",
        }
        reduced = {
            word: self.data[name] for name, word in words.items() if name in self.data
        }
        found = self.data.get("found", 0)
        needed = found + sum(self.data.get(name, 0) for name in ("recalled", "left"))
        if needed:
            reduced["hot cache hit rate"] = round(found / needed, 3)
            megabytes = self.data.get("recalled_bytes", 0) / 2**20
            reduced["MiB recalled"] = round(megabytes, 1)
        if calls := self.data.get("calls", 0):
            microseconds = 1e6 * self.data.get("recall_seconds", 0) / calls
            reduced["us a recall"] = round(microseconds, 1)
        if samples := self.data.get("mass_samples", 0):
            reduced["attention covered"] = round(self.data["mass"] / samples, 3)
        return reduced

    def is_empty(self) -> bool:
        return not self.data


class RecallPromMetrics(KVConnectorPromMetrics):
    """``vllm:clusterkv_host_*``, an instance for each engine."""

    def __init__(self, vllm_config, metric_types, labelnames, per_engine_labelvalues):
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)

        def make(
            kind: Any, names: dict[str, tuple[str, str]], of: str = "", **kwargs: Any
        ) -> dict:
            return {
                field: create_metric_per_engine(
                    kind(
                        name=f"vllm:clusterkv_host_{metric}",
                        documentation=f"clusterkv host tier: {meaning}{of}.",
                        labelnames=labelnames,
                        **kwargs,
                    ),
                    per_engine_labelvalues,
                )
                for field, (metric, meaning) in names.items()
            }

        self._gauges = make(self._gauge_cls, GAUGES, multiprocess_mode="mostrecent")
        self._counters = make(self._counter_cls, COUNTERS)
        of_all = ", of all layers, KV heads and ranks"
        self._counters |= make(self._counter_cls, RECALLS, of_all)

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        for name, value in transfer_stats_data.items():
            if name in GAUGES:
                self._gauges[name][engine_idx].set(value)
            elif value:
                self._counters[name][engine_idx].inc(value)
