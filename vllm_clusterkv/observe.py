# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_clusterkv project
"""Seeing what a decode step selected, without touching what it computes."""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from vllm.config import ParallelConfig

from vllm_clusterkv.config import ClusterKVConfig


@dataclass
class DecodeStep:
    """The decode rows of one layer in one step, after attention.

    The tensors are the live ones, shaped as in ``ops.py``: copy what must outlast
    the callback.
    """

    layer_name: str
    query: torch.Tensor
    kv_cache: torch.Tensor
    index: torch.Tensor
    block_table: torch.Tensor
    seq_lens: torch.Tensor
    min_sparse_lens: torch.Tensor
    scale: float
    scores: torch.Tensor
    selected: torch.Tensor
    num_attended: torch.Tensor
    config: ClusterKVConfig


observers: list[Callable[[DecodeStep], None]] = []
"""Called with every layer's decode, in this process. Empty costs nothing."""


def notify(step: DecodeStep) -> None:
    """Passes a step to the observers."""
    for observer in observers:
        observer(step)


class StatsWriter:
    """Appends one JSON line a decode step to a file (setting ``stats_path``).

    A line has ``time`` (seconds since the epoch), and for each request of the step
    ``context`` (tokens) and ``attended`` (tokens attended to exactly, mean over
    layers and KV heads).
    """

    def __init__(self, path: str, layer_names: list[str]) -> None:
        try:
            self._file = open(path, "a", buffering=1)  # noqa: SIM115
        except OSError as error:
            raise ValueError(
                "--additional-config: clusterkv.stats_path must be a file that can be "
                f"written, got {path!r} ({error.strerror})"
            ) from error
        self._layer_names = layer_names
        self._attended: list[torch.Tensor] = []

    def __call__(self, step: DecodeStep) -> None:
        if step.layer_name == self._layer_names[0]:
            self._attended.clear()
        self._attended.append(step.num_attended.float().mean(1))  # [num_reqs]
        if step.layer_name != self._layer_names[-1]:
            return
        line = {
            "time": time.time(),
            "context": step.seq_lens.tolist(),
            "attended": torch.stack(self._attended).mean(0).tolist(),
        }
        self._file.write(json.dumps(line) + "\n")

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


def set_stats_file(
    path: str | None, layer_names: list[str], parallel_config: ParallelConfig
) -> None:
    """Installs a ``StatsWriter`` in place of that of an earlier engine, or none.

    Only the first process of the first data-parallel replica gets one: lines of
    several would be mixed up.

    Args:
        path: The file, appended to; None to write no statistics.
        layer_names: The engine's attention layers in the order in which they run.
        parallel_config: Says which process this is.

    Raises:
        ValueError: The file cannot be written.
    """
    for observer in [o for o in observers if isinstance(o, StatsWriter)]:
        observers.remove(observer)
        observer.close()
    # Not data_parallel_rank, which vLLM sets to 0 in replicas of dense models.
    is_first = parallel_config.rank == parallel_config.data_parallel_index == 0
    if path is not None and is_first:
        observers.append(StatsWriter(path, layer_names))
