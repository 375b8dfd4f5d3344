# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_clusterkv project
"""Throughput of `vllm serve` with more requests than the KV cache holds.

A server a backend, one after another, with the same flags but for the attention
backend and where pages go that do not fit:

    dense            vLLM's own backend (--dense-backend)
    dense+offload    the same, with --kv-offloading-size of --host-memory-gib
    clusterkv        this plugin, with host_memory_gib of as much

A point is a concurrency and a length of answers: --num-requests requests of
--prompt-len random token ids, no two with a beginning in common, are sent to the server
as fast as the concurrency allows, and each gets --output-len tokens. Before a server's
first point two others warm it up. Of each point:

    output_tok_s     tokens of all answers over the time from the first request to the
                     last token: with prompts, waiting, first and last requests
    decode_tok_s     tokens a second while the most requests decoded (decode_requests,
                     for decode_s seconds) and no prompt was being computed, from
                     samples of /metrics each 0.25 s; server_metrics.py has the rule
    tpot_ms, ttft_ms medians of the requests, as the client saw them; tpot is from the
                     first token to the last over the tokens behind the first, with the
                     prompts of others that were computed meanwhile
    max_running      the most that vllm:num_requests_running showed
    max_decoding     the most that had their first token and not yet their last, as the
                     client saw it
    hit_rate         of the lines of host pages that decode needed, those it found in
                     hot blocks; by counters that may be some steps late
    kv_tokens        that the KV cache holds, as the server's log says
    cached_tokens    of prompts, that came from a prefix cache: 0, unless a request was
                     preempted before its first token

On a CPU it can be tried out with small numbers; VLLM_CPU_KVCACHE_SPACE is the GiB of
the KV cache there, 1 if not set, and vLLM does not offload: no dense+offload.

Writes throughput.csv, throughput.machine.json, a log a server and, with matplotlib,
throughput.png. Rows are written as they come; points that the CSV file in --out has are
left out, and so is a server without points, so a run goes on where the last one ended.
One of another commit, GPU or settings needs another folder.
"""

import argparse
import csv
import itertools
import json
import shlex
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from statistics import median

import server_metrics
from engine import ROOT, draw, random_prompt, wait_for_memory
from gpu_timing import gpu_machine
from server import DENSE_BACKEND, Server, device, running_server
from server_metrics import Sample
from streams import Crowd, Stream, max_decoding, serve, stop_under_load
from timing import command_line, positive

from vllm_clusterkv.page_layout import BLOCK_SIZE

BACKENDS = ["dense", "dense+offload", "clusterkv"]
WARM_UP_TOKENS = 32


def can_run(backend: str) -> bool:
    """Whether vLLM has it on this device."""
    return backend != "dense+offload" or device() == "cuda"


def server_flags(backend: str, args: argparse.Namespace) -> list[str]:
    """Flags of ``vllm serve``, without those of the device."""
    flags = {
        "--dtype": "bfloat16",
        "--max-model-len": args.max_model_len,
        "--max-num-seqs": args.max_num_seqs,
        "--max-num-batched-tokens": args.max_num_batched_tokens,
        "--gpu-memory-utilization": args.gpu_memory_utilization,
    }
    if backend == "clusterkv":
        settings = {"token_budget": args.token_budget} | args.settings
        if args.host_memory_gib:
            settings["host_memory_gib"] = args.host_memory_gib
        flags["--attention-backend"] = "clusterkv"
        flags["--additional-config"] = json.dumps({"clusterkv": settings})
    else:
        flags["--attention-backend"] = args.dense_backend
    if backend == "dense+offload":
        flags["--kv-offloading-size"] = args.host_memory_gib
    words = [str(word) for pair in flags.items() for word in pair]
    return [*words, *shlex.split(args.server_args)]


def make_prompts(args: argparse.Namespace, seed: int, number: int) -> list:
    """Token ids, of each seed and row others from the first on."""
    config = json.loads((Path(args.model) / "config.json").read_text())
    return [
        random_prompt(row, args.prompt_len, config["vocab_size"], seed)
        for row in range(number)
    ]


def num_requests(args: argparse.Namespace, concurrency: int) -> int:
    return args.num_requests or max(concurrency, 3)


Point = tuple[int, int]
"""Requests at once, and tokens of an answer."""


def missing_points(
    backend: str, args: argparse.Namespace, rows: list[dict]
) -> list[Point]:
    """Points that ``rows`` do not have."""
    return [
        point
        for point in itertools.product(args.concurrency, args.output_len)
        if not any(is_point(row, backend, args, point) for row in rows)
    ]


def is_point(row: dict, backend: str, args: argparse.Namespace, point: Point) -> bool:
    """Whether a row, perhaps read from a file, is of that point."""
    columns = point_columns(backend, args, point)
    return all(str(row[name]) == str(value) for name, value in columns.items())


def point_columns(backend: str, args: argparse.Namespace, point: Point) -> dict:
    """What tells a point from others."""
    is_sparse = backend == "clusterkv"
    concurrency, output_len = point
    return {
        "model": Path(args.model).name,
        "backend": backend,
        "concurrency": concurrency,
        "prompt_len": args.prompt_len,
        "output_len": output_len,
        "num_requests": num_requests(args, concurrency),
        "max_num_batched_tokens": args.max_num_batched_tokens,
        "token_budget": args.token_budget if is_sparse else "",
        "host_memory_gib": "" if backend == "dense" else args.host_memory_gib,
    }


def run_backend(
    backend: str, args: argparse.Namespace, points: list[Point], facts: dict
) -> Iterator[dict]:
    """Measures a backend's points.

    Args:
        backend: One of ``BACKENDS``.
        args: The command line's.
        points: To measure, in this order.
        facts: Gets what is to be known of the server.

    Yields:
        A row for each point, without what all rows have in common.
    """
    log = args.out / f"throughput-{backend.replace('+', '-')}.log"
    print(f"{backend}: starting the server, log in {log}", flush=True)
    flags = server_flags(backend, args)
    with running_server(args.model, flags, log, args.start_timeout) as server:
        print(f"{backend}: ready after {server.start_s:.0f} s", flush=True)
        facts[backend] = server.facts()
        warm_up = make_prompts(args, 0, 2)
        serve(server.url, Crowd(args.model, warm_up, WARM_UP_TOKENS, 2))
        for point in points:
            concurrency, output_len = point
            # No point finds another's prompts in the prefix cache.
            seed = max(args.concurrency) * output_len + concurrency
            prompts = make_prompts(args, seed, num_requests(args, concurrency))
            crowd = Crowd(args.model, prompts, output_len, concurrency)
            row = point_columns(backend, args, point)
            row |= summary(*serve(server.url, crowd))
            row["kv_tokens"] = facts[backend]["kv_tokens"]
            print(f"{backend}: {json.dumps(row)}", flush=True)
            yield row
        stop(server, args)
    facts[backend] = server.facts() | {"stopped": args.stop}


def stop(server: Server, args: argparse.Namespace) -> None:
    """Stops a server, idle or with ``--concurrency``'s last point's requests."""
    if args.stop == "idle":
        server.stop()
    else:
        number = args.concurrency[-1]
        crowd = Crowd(
            args.model,
            make_prompts(args, 10**6, number),
            args.output_len[-1],
            number,
        )
        unfinished = stop_under_load(server.url, crowd, server.stop)
        print(f"stopped with {unfinished} of {number} requests unfinished")
    end = "killed" if server.was_killed else "ended"
    print(f"{end} {server.stop_s:.1f} s after SIGTERM, {args.stop}", flush=True)
    if server.gone_s is not None:
        print(f"all that it started was gone after {server.gone_s:.1f} s")
    if server.left_processes:
        print(f"it left processes behind: {', '.join(server.left_processes)}")


def summary(streams: list[Stream], samples: list[Sample]) -> dict:
    """Columns of a point."""
    first, last = samples[0], samples[-1]

    def grown(name: str) -> int:
        return round(last[name] - first[name])

    start = min(stream.sent_s for stream in streams)
    seconds = max(stream.last_s for stream in streams) - start
    tokens = sum(stream.num_tokens for stream in streams)
    decode = server_metrics.decode_rate(samples)
    lines = {name: grown(metric) for name, metric in server_metrics.LINES.items()}
    needed = sum(lines.values())
    has_tier = server_metrics.RELEASED in last.values
    return {
        "output_tok_s": round(tokens / seconds, 2),
        "tpot_ms": round(1e3 * median(stream.tpot_s for stream in streams), 2),
        "ttft_ms": round(1e3 * median(stream.ttft_s for stream in streams), 1),
        "max_running": round(max(s[server_metrics.RUNNING] for s in samples)),
        "hit_rate": round(lines["found"] / needed, 4) if needed else "",
        "max_decoding": max_decoding(streams),
        "decode_tok_s": round(decode.tokens_per_s, 2) if decode else "",
        "decode_requests": decode.num_requests if decode else "",
        "decode_s": round(decode.seconds, 1) if decode else "",
        "duration_s": round(seconds, 1),
        "pages_released": grown(server_metrics.RELEASED) if has_tier else "",
        "preemptions": grown(server_metrics.PREEMPTIONS),
        "cached_tokens": grown(server_metrics.CACHED),
    }


COMMON = ("commit", "gpu", "vllm", "torch")
"""What all rows of a folder have in common beside settings, as the JSON file has it."""


def server_settings(args: argparse.Namespace) -> dict:
    """What makes servers and prompts what they are, beside the backend."""
    points = ("model", "backends", "concurrency", "output_len", "num_requests")
    apart = {*points, "stop", "start_timeout", "out", "commit"}
    return {name: value for name, value in vars(args).items() if name not in apart}


def read_results(out: Path, info: dict) -> tuple[list[dict], dict]:
    """What a run before has left in a folder.

    Args:
        out: The folder.
        info: What the results of this run are to be of.

    Returns:
        Rows, and facts of the servers.

    Raises:
        ValueError: Its results are of something else.
    """
    table, machine = out / "throughput.csv", out / "throughput.machine.json"
    if not table.exists():
        return [], {}
    earlier = json.loads(machine.read_text())
    for before, now in ((earlier, info), (earlier["settings"], info["settings"])):
        for name in COMMON if now is info else now:
            if before.get(name) != now[name]:
                raise ValueError(
                    f"--out {out} holds results with {name} = {before.get(name)}, "
                    f"now it is {now[name]}: give another folder"
                )
    with table.open() as file:
        return list(csv.DictReader(file)), earlier["servers"]


def write_results(out: Path, rows: list[dict], info: dict, facts: dict) -> None:
    """Writes throughput.csv and throughput.machine.json."""
    with (out / "throughput.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[-1])
        writer.writeheader()
        writer.writerows(rows)
    text = json.dumps(info | {"servers": facts}, indent=2)
    (out / "throughput.machine.json").write_text(f"{text}\n")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", required=True, help="a folder with config.json")
    backends = [name for name in BACKENDS if can_run(name)]
    add("--backends", nargs="+", choices=BACKENDS, default=backends)
    add("--concurrency", type=positive, nargs="+", default=[1, 8, 13, 36])
    add("--num-requests", type=positive, help="of each point; as many as at once, or 3")
    add("--prompt-len", type=positive, default=32768)
    add("--output-len", type=positive, nargs="+", default=[512], help="2 and more")
    add("--host-memory-gib", type=float, default=96.0, help="0: clusterkv has no tier")
    add("--token-budget", type=positive, default=1024)
    add("--settings", type=json.loads, default={}, help="more for clusterkv, as JSON")
    add("--dense-backend", default=DENSE_BACKEND[device()])
    add(
        "--max-model-len",
        type=positive,
        help="prompt and longest output, in whole pages",
    )
    add("--max-num-seqs", type=positive, default=64)
    add("--max-num-batched-tokens", type=positive, default=8192)
    add("--gpu-memory-utilization", type=float, default=0.9)
    add("--server-args", default="", help="more for vllm serve, all backends")
    add("--stop", choices=["idle", "under load"], default="idle", help="servers' end")
    add("--start-timeout", type=float, default=400, help="seconds")
    add("--out", type=Path, default=ROOT / "benchmarks/results", help="folder")
    add("--commit", help="to record, where this is no checkout")
    args = parser.parse_args()
    for backend in args.backends:
        if not can_run(backend):
            parser.error(f"--backends {backend}: vLLM offloads from GPUs alone")
    if min(args.output_len) < 2:
        parser.error("--output-len must be at least 2")
    if not args.max_model_len:
        length = args.prompt_len + max(args.output_len)
        args.max_model_len = -(-length // BLOCK_SIZE) * BLOCK_SIZE
    if args.max_num_seqs < max(args.concurrency):
        parser.error("--max-num-seqs must be at least --concurrency")
    return args


def main() -> None:
    args = parse_args()
    # An end by SIGTERM takes the servers along.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by SIGTERM"))
    info = gpu_machine() | {"command": command_line()}
    info["settings"] = server_settings(args)
    if args.commit:
        info["commit"] = args.commit
    args.out.mkdir(parents=True, exist_ok=True)
    try:
        rows, facts = read_results(args.out, info)
    except ValueError as error:
        sys.exit(f"error: {error}")
    for backend in args.backends:
        points = missing_points(backend, args, rows)
        if not points:
            print(f"{backend}: every point is there already")
            continue
        for row in run_backend(backend, args, points, facts):
            common = {name: info[name] for name in ("commit", "vllm", "torch")}
            rows.append({"gpu": info["gpu"] or "none (cpu)"} | row | common)
            write_results(args.out, rows, info, facts)
        write_results(args.out, rows, info, facts)
        wait_for_memory()
    draw("plot_throughput", args.out, "throughput")


if __name__ == "__main__":
    main()
