# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_clusterkv project
"""Times recall of lines from host memory: alone, and what it adds to decode attention.

One layer of Llama-3.1-8B's attention in bf16, for a batch of decode rows, each with a
slot of its own and all pages but the first and the last in pinned host memory:

    copy      one cudaMemcpyAsync of --copy-gib from the same memory: what the bus
              gives
    recall    the op alone in steps that find none of their lines; its bytes are those
              of the lines it brings
    resident  score, select and sparse_decode, as vllm_clusterkv.backend.decode calls
              them without a host tier
    no_slot   the same with a host tier, of rows that have no page there: recall is
              launched and has nothing to do
    recalled  the same of rows with their pages there, of whose lines hot blocks lack
              --miss-shares
    bypass    the same without hot blocks: sparse_decode reads the rows on the host

exposed_us is the time above that of resident; miss_share is what recall counted.

A CUDA graph holds a call for each of 24 layers (fewer where no more fit --host-gib),
which have pools of their own on the GPU and on the host. Before each replay the tables
of the hot blocks are put back, outside of the timed region: full of lines, of which
those that are needed and not to be missed were used last. (The hot blocks' rows are not
put back with them: no time depends on what is in a row.) Then the L2 cache is read full
of other data. The graphs take turns; times are medians of the replays over the calls.

Nothing is timed before the outputs agree with those of resident pages: in a step that
recalls everything, in the next one, which finds everything, and without hot blocks.

Writes recall.csv, recall.machine.json and, with matplotlib, recall.png, which has the
hit rates of results/hit_rate.csv beside them: there a model's own keys were asked.
"""

import argparse
import csv
import json
from pathlib import Path

import torch
from engine import draw
from gpu_layers import Case, Layers, OpCalls, num_score_parts, num_splits
from gpu_timing import Call, Timing, gpu_machine, host_copy_bandwidth, take_turns
from recall_layers import (
    SpilledLayers,
    host_layer_bytes,
    host_pages_a_row,
    line_bytes,
)
from timing import command_line, positive
from traffic import Shape

from vllm_clusterkv.config import ClusterKVConfig
from vllm_clusterkv.page_layout import BLOCK_SIZE
from vllm_clusterkv.recall import host_memory

ROOT = Path(__file__).resolve().parent.parent
MAX_LAYERS = 24
TOLERANCE = 2e-2


def make_case(args: argparse.Namespace, batch_size: int) -> Case:
    config = ClusterKVConfig(
        token_budget=args.token_budget, hot_cache_tokens=args.hot_cache_tokens
    )
    shape = Shape(num_clusters=config.num_clusters)
    splits = num_splits(batch_size, shape, args.device)
    length = args.context_len
    max_len = args.max_model_len
    parts = num_score_parts(batch_size, shape, args.device, max_len)
    return Case(shape, length, batch_size, config, max_len, parts, splits)


def num_layers(case: Case, args: argparse.Namespace) -> int:
    fitting = int(args.host_gib * 2**30 // host_layer_bytes(case))
    if not fitting or host_pages_a_row(case) < 1:
        raise SystemExit(
            f"{case.batch_size} rows of {case.context_len} tokens do not fit --host-gib"
        )
    return min(args.max_layers, fitting)


def check_agreement(tier: SpilledLayers, expected: torch.Tensor) -> None:
    """Compares decode over pages on the host with ``expected``; exits on difference."""
    tier.put(tier.empty_state())
    for name, pages in [
        ("recalls", tier.pages),
        ("finds", tier.pages),
        ("bypasses", tier.bare_pages),
    ]:
        output = torch.full_like(expected, torch.nan)
        tier.decode(0, tier.on_host, pages, output)
        if torch.equal(output, expected):
            continue
        largest = (output.float() - expected.float()).abs().max().item()
        print(f"decode that {name} differs by {largest:.1e} from resident pages'")
        if not largest < TOLERANCE:
            raise SystemExit("which is wrong; nothing was timed")


def run_case(
    case: Case, pool: torch.Tensor, args: argparse.Namespace, copy_bandwidth: float
) -> list[dict]:
    """Measures one number of rows.

    Returns:
        Rows of the CSV file.
    """
    layers = Layers(case, num_layers(case, args), args.device, args.seed)
    expected = torch.empty_like(layers.query)
    layers.decode(0, layers.all_sparse, expected)
    tier = SpilledLayers(layers, pool, case.config.wanted_hot_blocks, args.seed)
    check_agreement(tier, expected)
    selected = OpCalls(layers).selected
    needed = tier.needed_lines(selected)
    output = torch.empty_like(layers.query)

    def over_host(i: int) -> None:
        tier.decode(i, tier.on_host, tier.pages, output)

    calls: dict[str, Call] = {
        "recall": lambda i: tier.recall(i, selected),
        "resident": lambda i: layers.decode(i, layers.all_sparse, output),
        "no_slot": lambda i: tier.decode(i, tier.no_slot, tier.pages, output),
        "bypass": lambda i: tier.decode(i, tier.on_host, tier.bare_pages, output),
    }
    states = {f"recalled {share:g}": share for share in args.miss_shares}
    calls |= dict.fromkeys(states, over_host)
    states["recall"] = 1.0
    prepare, counts = {}, {}
    for name, share in states.items():
        state = tier.state(needed, share)
        tier.put(state)
        counts[name] = tier.count(selected)
        prepare[name] = lambda state=state: tier.put(state)
    timings = take_turns(
        calls,
        len(layers),
        len(layers),
        args.replays,
        device=args.device,
        prepare=prepare,
    )
    resident_us = timings["resident"].median_us
    rows = []
    for name, timing in timings.items():
        row = result_row(case, name, timing, counts.get(name), copy_bandwidth)
        if name not in ("recall", "resident"):
            row["exposed_us"] = round(timing.median_us - resident_us, 2)
        rows.append(row | {"layers": len(layers)})
    return rows


def result_row(
    case: Case,
    name: str,
    timing: Timing,
    counts: tuple[int, int, int] | None,
    copy_bandwidth: float,
) -> dict:
    """A row of the CSV file.

    Args:
        case: What was measured.
        name: The call's.
        timing: Its time.
        counts: Lines found, recalled and left; None where nothing is recalled.
        copy_bandwidth: Bytes a second of ``copy``.
    """
    what = name.partition(" ")[0]
    has_cache = what in ("recall", "recalled", "no_slot")
    hot_tokens = case.config.wanted_hot_blocks * BLOCK_SIZE
    row = {
        "model": case.shape.name,
        "what": what,
        "rows": case.batch_size,
        "context_len": case.context_len,
        "token_budget": case.config.token_budget,
        "hot_cache_tokens": hot_tokens if has_cache else "",
        "miss_share": "",
        "lines": "",
        "bytes": "",
        "time_us": round(timing.median_us, 2),
        "p10_us": round(timing.p10_us, 2),
        "p90_us": round(timing.p90_us, 2),
        "exposed_us": "",
        "gb_s": "",
        "share_of_copy": "",
    }
    if counts:
        found, recalled, left = counts
        row["miss_share"] = round((recalled + left) / (found + recalled + left), 3)
        row["lines"] = found + recalled + left
        row["bytes"] = recalled * line_bytes(case)
    if what == "recall":
        achieved = row["bytes"] / (timing.median_us / 1e6)
        row["gb_s"] = round(achieved / 1e9, 2)
        row["share_of_copy"] = round(achieved / copy_bandwidth, 3)
    return row


def copy_row(rows: list[dict], num_bytes: int, bandwidth: float) -> dict:
    """The copy's row, with the columns of the others."""
    return dict.fromkeys(rows[0], "") | {
        "what": "copy",
        "bytes": num_bytes,
        "time_us": round(num_bytes / bandwidth * 1e6, 2),
        "gb_s": round(bandwidth / 1e9, 2),
        "share_of_copy": 1.0,
    }


def print_case(rows: list[dict]) -> None:
    """A line: microseconds, and of the recall alone its share of the copy."""
    cells = [f"{rows[0]['rows']:>3} rows"]
    for row in rows:
        share = f" {row['miss_share']:.0%}" if row["miss_share"] != "" else ""
        speed = ""
        if row["gb_s"] != "":
            speed = f" ({row['gb_s']} GB/s, {row['share_of_copy']:.0%} of copy)"
        cells.append(f"{row['what']}{share} {row['time_us']:.1f}{speed}")
    print(" | ".join(cells), flush=True)


def write_results(out: Path, rows: list[dict], info: dict) -> None:
    """Writes recall.csv, and the machine beside it as JSON."""
    out.mkdir(parents=True, exist_ok=True)
    with (out / "recall.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["gpu", *rows[0], "commit"])
        writer.writeheader()
        common = {name: info[name] for name in ("gpu", "commit")}
        writer.writerows(common | row for row in rows)
    text = json.dumps(info, indent=2)
    (out / "recall.machine.json").write_text(f"{text}\n")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--rows", type=positive, nargs="+", default=[1, 4, 8, 16, 32])
    add("--context-len", type=positive, default=32768)
    add("--token-budget", type=positive, default=ClusterKVConfig.token_budget)
    add("--hot-cache-tokens", type=positive, help="twice the budget if not given")
    add("--miss-shares", type=float, nargs="+", default=[0, 0.1, 0.2, 1])
    add("--max-model-len", type=positive, default=131072)
    add("--max-layers", type=positive, default=MAX_LAYERS)
    add("--replays", type=positive, default=20, help="that count, of each graph")
    add("--host-gib", type=float, default=24, help="pinned memory for the pages")
    add("--copy-gib", type=float, default=1)
    add("--seed", type=int, default=0)
    add("--device", choices=["cuda", "cpu"], default="cuda", help="cpu: a dry run")
    add("--out", type=Path, default=ROOT / "benchmarks/results", help="folder")
    add("--commit", help="to record, where this is no checkout")
    args = parser.parse_args()
    if args.device == "cpu" and args.out == parser.get_default("out"):
        parser.error("--device cpu needs --out: the results there are a GPU's")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA device; --device cpu for a dry run, with small numbers")
    return args


def main() -> None:
    args = parse_args()
    info = gpu_machine() | {"command": command_line()}
    if args.commit:
        info["commit"] = args.commit
    is_cuda = args.device == "cuda"
    info["gpu"] = torch.cuda.get_device_name() if is_cuda else "none (cpu, a dry run)"
    print(json.dumps(info))
    cases = [make_case(args, batch_size) for batch_size in args.rows]
    copy_bytes = int(args.copy_gib * 2**30)
    pool_bytes = max(
        copy_bytes, *(host_layer_bytes(case) * num_layers(case, args) for case in cases)
    )
    dtype = cases[0].shape.dtype
    host_memory.check(pool_bytes)
    pool = host_memory.allocate((pool_bytes // dtype.itemsize,), dtype, pinned=is_cuda)
    bandwidth = host_copy_bandwidth(pool[: copy_bytes // dtype.itemsize], args.device)
    print(f"copy: {bandwidth / 1e9:.1f} GB/s; times in microseconds", flush=True)
    rows: list[dict] = []
    for case in cases:
        found = run_case(case, pool, args, bandwidth)
        if is_cuda:
            torch.cuda.empty_cache()
        print_case(found)
        if not rows:
            rows.append(copy_row(found, copy_bytes, bandwidth))
        rows += found
        write_results(args.out, rows, info)
    host_memory.release(pool, pinned=is_cuda)
    draw("plot_recall", args.out, "recall")


if __name__ == "__main__":
    main()
