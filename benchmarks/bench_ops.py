# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_clusterkv project
"""Times the ops on a GPU, one by one and as decode attention, against dense kernels.

One layer of Llama-3.1-8B's attention in bf16, for a batch of decode rows:

    score_clusters, select_clusters, sparse_decode   alone; every row sparse
    decode           the three as vllm_clusterkv.backend.decode calls them
    decode_dense     the same call with every row below its min_sparse_len
    decode_in_layer, flash_attn_in_layer
                     what they add to the matrix products of a layer, between which they
                     run; the figure nearest to a model's
    index_pages      of all 32 layers: a page each (a decode row fills one), and the 32
                     pages each of a prefill chunk of 8192 tokens
    flash_attn       vLLM's FLASH_ATTN as in a FULL CUDA graph, on the same pages
    flashinfer, xformers   their paged decode, where installed

A CUDA graph holds 24 calls, each on another layer's pool (4 to 23 where no more fit
--pool-gib), and the L2 cache is read full of other data before each replay, so no key
or mean that is read comes from L2. Scores and marks that one op leaves for the next do,
as in a model. The graphs of all sides are replayed in turns. Times are medians of the
replays over the calls.

Tail pages are full, which is the worst case for sparse, and the block table is as wide
as --max-model-len needs, for both sides. Before anything is timed, decode_dense and
decode with a budget that covers the context must agree with FLASH_ATTN; every baseline
must agree with decode_dense on each case, or its row is left out.

Writes ops.csv and ops.machine.json. traffic.py says what `bytes` counts;
share_of_copy_bw is bytes over time over the bandwidth of a copy in the same run.
"""

import argparse
import csv
import dataclasses
import json
from importlib.util import find_spec
from itertools import product
from pathlib import Path

import torch
from gpu_baselines import BASELINES, Baseline, Unavailable
from gpu_layers import (
    Case,
    IndexCall,
    LayerProducts,
    Layers,
    OpCalls,
    num_score_parts,
    num_splits,
)
from gpu_timing import Call, Timing, gpu_machine, measure_bandwidth, take_turns
from timing import command_line, positive
from traffic import Load, Shape, bytes_owed

from vllm_clusterkv.config import ClusterKVConfig
from vllm_clusterkv.page_layout import BLOCK_SIZE

ROOT = Path(__file__).resolve().parent.parent
OPS = ["score_clusters", "select_clusters", "sparse_decode"]
WHOLES = ["decode", "decode_dense"]
IN_LAYER = "decode_in_layer"
CONTEXT_LENS = [512, 1024, 2048, 4096, 8192, 16384, 32768, 131072]
QUICK = [(4096, 64), (32768, 1), (32768, 8), (131072, 1)]
MAX_LAYERS, MIN_LAYERS = 24, 4
INDEX_LAYERS = 32  # of Llama-3.1-8B
INDEX_CHUNK = 32  # pages
TOLERANCE = 2e-2


def check_agreement(args: argparse.Namespace) -> None:
    """Compares decode with FLASH_ATTN on a small case; raises where they differ."""
    config = ClusterKVConfig(token_budget=args.max_model_len)
    case = make_case(args, config, 2048, 3)
    layers = Layers(case, 1, args.device, args.seed)
    layers.seq_lens.copy_(torch.tensor([2048, 700, 257]))
    results = {}
    for name, min_sparse_lens in [
        ("decode, every row dense", layers.all_dense),
        ("decode, the budget covers the context", layers.all_sparse),
    ]:
        output = torch.full_like(layers.query, torch.nan)
        layers.decode(0, min_sparse_lens, output)
        results[name] = output
    try:
        flash_attn = BASELINES["flash_attn"](layers)
    except Unavailable as reason:
        print(f"decode is NOT compared with FLASH_ATTN: {reason}")
        expected = results["decode, every row dense"]
    else:
        flash_attn(0)
        expected = flash_attn.output
    for name, output in results.items():
        largest, relative = difference(output, expected)
        print(f"{name}: differs by {largest:.1e} at most, {relative:.1e} in norm")
        if not max(largest, relative) < TOLERANCE:
            raise SystemExit(f"{name} is wrong; nothing was timed")


def make_case(
    args: argparse.Namespace, config: ClusterKVConfig, context_len: int, batch_size: int
) -> Case:
    shape = Shape(num_clusters=config.num_clusters)
    splits = args.num_splits or num_splits(batch_size, shape, args.device)
    max_len = args.max_model_len
    parts = num_score_parts(batch_size, shape, args.device, max_len)
    return Case(shape, context_len, batch_size, config, max_len, parts, splits)


def difference(output: torch.Tensor, expected: torch.Tensor) -> tuple[float, float]:
    """Largest absolute difference, and the norm of the difference over the norm."""
    delta = output.float() - expected.float()
    relative = delta.norm() / expected.float().norm()
    return delta.abs().max().item(), relative.item()


def make_baselines(layers: Layers, names: list[str]) -> dict[str, Baseline]:
    """Those of ``names`` that run here and agree with ``decode_dense``."""
    expected = torch.empty_like(layers.query)
    layers.decode(0, layers.all_dense, expected)
    baselines = {}
    for name in names:
        try:
            baseline = BASELINES[name](layers)
            baseline(0)
            largest, relative = difference(baseline.output, expected)
        except Exception as error:  # of another package: no row, whatever it is
            # Its first line says enough.
            reason = (str(error).splitlines() or [""])[0]
            print(f"  {name}: not available: {type(error).__name__}: {reason}")
            continue
        if max(largest, relative) < TOLERANCE:
            baselines[name] = baseline
        else:
            print(f"  {name}: left out: differs from decode_dense by {largest:.1e}")
    return baselines


def run_case(case: Case, args: argparse.Namespace, copy_bandwidth: float) -> list[dict]:
    """Measures one case.

    Returns:
        Rows of the CSV file.
    """
    fitting = int(args.pool_gib * 2**30 // case.layer_bytes)
    if fitting < MIN_LAYERS:
        return []
    names = [name for name in args.baselines if name != "xformers"]
    if "xformers" in args.baselines and fitting >= 2 * MIN_LAYERS:
        names.append("xformers")
        if find_spec("xformers"):  # which needs a copy of the pages
            fitting //= 2
    layers = Layers(case, min(MAX_LAYERS, fitting), args.device, args.seed)
    op_calls = OpCalls(layers)
    load = op_calls.load()
    baselines = make_baselines(layers, names)
    output = torch.empty_like(layers.query)
    wholes: dict[str, Call] = {
        "decode": lambda i: layers.decode(i, layers.all_sparse, output),
        "decode_dense": lambda i: layers.decode(i, layers.all_dense, output),
    }
    calls: dict[str, Call] = {
        name: getattr(op_calls, name) for name in OPS if name in args.ops
    }
    calls |= {name: wholes[name] for name in WHOLES if name in args.ops}
    calls |= baselines
    timings = take_turns(
        calls, len(layers), len(layers), args.replays, device=args.device
    )
    rows = []
    if IN_LAYER in args.ops:
        timings |= time_in_layer(wholes["decode"], baselines, layers, args)
    for name, timing in timings.items():
        if name == IN_LAYER and "flash_attn_in_layer" in timings:
            against = ["flash_attn_in_layer"]
        else:
            against = baselines if name in WHOLES and baselines else [None]
        for baseline in against:
            rows.append(
                result_row(case, name, timing, timings, baseline, load, copy_bandwidth)
            )
    return rows


def time_in_layer(
    decode: Call,
    baselines: dict[str, Baseline],
    layers: Layers,
    args: argparse.Namespace,
) -> dict[str, Timing]:
    """Times what attention adds to a layer's products, by the op's name."""
    products = LayerProducts(layers.case.batch_size, args.device)
    attend: dict[str, Call] = {IN_LAYER: decode}
    if "flash_attn" in baselines:
        attend["flash_attn_in_layer"] = baselines["flash_attn"]
    calls: dict[str, Call] = {"products": lambda i: products(None)}
    for name, call in attend.items():
        calls[name] = lambda i, call=call: products(lambda: call(i))
    timings = take_turns(
        calls, len(layers), len(layers), args.replays, device=args.device
    )
    without = timings.pop("products")
    return {
        name: Timing(
            timing.median_us - without.median_us,
            timing.p10_us - without.median_us,
            timing.p90_us - without.median_us,
        )
        for name, timing in timings.items()
    }


def run_index(
    args: argparse.Namespace, config: ClusterKVConfig, copy_bandwidth: float
) -> list[dict]:
    """Measures ``index_pages`` in all layers at once.

    It sorts pages that are sorted already; its work does not depend on that.

    Returns:
        Rows of the CSV file, whose context_len is the tokens that are indexed.
    """
    rows = []
    for pages in (1, INDEX_CHUNK):
        # The current token is on a page of its own.
        case = make_case(args, config, INDEX_CHUNK * BLOCK_SIZE + 1, 1)
        num_layers = INDEX_LAYERS if args.device == "cuda" else 1
        layers = Layers(case, num_layers, args.device, args.seed)
        turns = {"index_pages": IndexCall(layers, pages)}
        num_calls = INDEX_CHUNK if pages == 1 else 4
        timing = take_turns(
            turns, num_calls, num_calls, args.replays, device=args.device
        )["index_pages"]
        tokens = dataclasses.replace(case, context_len=pages * BLOCK_SIZE)
        load = Load(1, tokens.context_len, num_pages=pages * num_layers)
        rows.append(
            result_row(tokens, "index_pages", timing, {}, None, load, copy_bandwidth)
        )
    return rows


def result_row(
    case: Case,
    op: str,
    timing: Timing,
    timings: dict[str, Timing],
    baseline: str | None,
    load: Load,
    copy_bandwidth: float,
) -> dict:
    """A row of the CSV file."""
    is_sparse = op in OPS or op in ("decode", IN_LAYER)
    has_splits = op in WHOLES or op in ("sparse_decode", IN_LAYER)
    num_bytes = bytes_owed(op.removesuffix("_in_layer"), case.shape, load)
    row = {
        "model": case.shape.name,
        "op": op,
        "context_len": case.context_len,
        "batch_size": case.batch_size,
        "token_budget": case.config.token_budget if is_sparse else "",
        "attended_tokens": round(load.attended) if is_sparse else "",
        "pages": load.num_pages or "",
        "num_splits": case.num_splits if has_splits else "",
        "max_model_len": case.max_model_len,
        "time_us": round(timing.median_us, 2),
        "p10_us": round(timing.p10_us, 2),
        "p90_us": round(timing.p90_us, 2),
        "baseline": baseline or "",
        "baseline_us": "",
        "baseline_ratio": "",
        "bytes": num_bytes,
        "share_of_copy_bw": "",
    }
    if baseline:
        row["baseline_us"] = round(timings[baseline].median_us, 2)
        ratio = timings[baseline].median_us / timing.median_us
        row["baseline_ratio"] = round(ratio, 3)
    if copy_bandwidth:
        achieved = num_bytes / (timing.median_us / 1e6)
        row["share_of_copy_bw"] = round(achieved / copy_bandwidth, 3)
    return row


def print_case(rows: list[dict]) -> None:
    """A line: microseconds and, in percent, the share of the copy's bandwidth."""
    cells = [f"{rows[0]['context_len']:>7}{rows[0]['batch_size']:>4}"]
    seen = set()
    for row in rows:
        if row["op"] in seen:
            continue
        seen.add(row["op"])
        share = row["share_of_copy_bw"]
        percent = f" {share:.0%}" if share != "" else ""
        pages = f" of {row['pages']}" if row["pages"] else ""
        cells.append(f"{row['op']}{pages} {row['time_us']:.1f}{percent}")
    cells += [
        f"{row['op']} is {row['baseline_ratio']:.2f}x {row['baseline']}"
        for row in rows
        if row["baseline"]
    ]
    print(" | ".join(cells), flush=True)


def print_crossover(rows: list[dict]) -> None:
    """Of each batch size, the lengths from which sparse and dense win."""
    for batch_size in sorted({row["batch_size"] for row in rows}):
        times: dict[int, dict[str, float]] = {}
        for row in rows:
            if row["batch_size"] == batch_size:
                times.setdefault(row["context_len"], {})[row["op"]] = row["time_us"]
        for op in ("flash_attn", "decode_dense"):
            faster = [
                context_len
                for context_len, by_op in sorted(times.items())
                if by_op.get("decode", torch.inf) < by_op.get(op, -torch.inf)
            ]
            found = ", ".join(map(str, faster)) or "none of the lengths"
            print(f"batch {batch_size}: decode is faster than {op} at {found}")


def write_results(out: Path, rows: list[dict], info: dict) -> None:
    """Writes ops.csv, and the machine beside it as JSON."""
    out.mkdir(parents=True, exist_ok=True)
    with (out / "ops.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["gpu", *rows[0]])
        writer.writeheader()
        writer.writerows({"gpu": info["gpu"]} | row for row in rows)
    text = json.dumps(info, indent=2)
    (out / "ops.machine.json").write_text(f"{text}\n")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--context-lens", type=positive, nargs="+", default=CONTEXT_LENS)
    add("--batch-sizes", type=positive, nargs="+", default=[1, 8, 64])
    points = " ".join(f"{length}x{batch}" for length, batch in QUICK)
    add("--quick", action="store_true", help=f"only {points}")
    every_op = [*OPS, *WHOLES, IN_LAYER, "index_pages"]
    add("--ops", nargs="+", choices=every_op, default=every_op)
    add("--baselines", nargs="*", choices=list(BASELINES), default=list(BASELINES))
    add("--token-budget", type=positive, default=ClusterKVConfig.token_budget)
    add("--num-splits", type=positive, help="instead of the backend's")
    add("--max-model-len", type=positive, default=131072)
    add("--replays", type=positive, default=20, help="that count, of each graph")
    add("--pool-gib", type=float, default=56, help="GPU memory for the pools")
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
    copy_bandwidth = 0.0
    if args.device == "cpu":
        info["gpu"] = "none (cpu, a dry run)"
    else:
        info["gpu"] = torch.cuda.get_device_name()
        bandwidth = measure_bandwidth()
        copy_bandwidth = bandwidth["copy"]
        info["copy_gb_per_s"] = round(bandwidth["copy"] / 1e9)
        info["read_gb_per_s"] = round(bandwidth["read"] / 1e9)
        torch.cuda.empty_cache()
    print(json.dumps(info))
    check_agreement(args)
    points = QUICK if args.quick else product(args.context_lens, args.batch_sizes)
    config = ClusterKVConfig(token_budget=args.token_budget)
    rows: list[dict] = []
    print("microseconds, and of the bytes owed the share of a copy's bandwidth")
    for context_len, batch_size in points:
        case = make_case(args, config, context_len, batch_size)
        found = run_case(case, args, copy_bandwidth)
        if args.device == "cuda":
            torch.cuda.empty_cache()
        if not found:
            print(f"{context_len:>7}{batch_size:>4} | too large, left out")
            continue
        print_case(found)
        rows += found
        write_results(args.out, rows, info)
    if "index_pages" in args.ops:
        for row in run_index(args, config, copy_bandwidth):
            print_case([row])
            rows.append(row)
        write_results(args.out, rows, info)
    print_crossover(rows)
    print(f"wrote {args.out / 'ops.csv'}")


if __name__ == "__main__":
    main()
