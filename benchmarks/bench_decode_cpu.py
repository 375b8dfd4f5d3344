# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_clusterkv project
"""Times decode attention on this CPU: sparse, dense, and vLLM's own kernel.

Each case is one layer's attention for a batch of decode rows. In one run, on the
same keys and values, take turns:

    sparse    score_clusters + select_clusters + sparse_decode, at each budget
    dense     sparse_decode of dense rows: what this package costs below
              min_sparse_len, where it attends to everything without an index
    cpu_attn  vLLM's default CPU kernel; its metadata, made once a step and not once
              a layer, is not timed (--no-vllm leaves this side out)

and index_pages is timed for one page of one layer, what prefill pays for the index.
bench_decode_step_cpu.py times whole decode steps of a real engine. README.md beside
this file says what the figures mean and what they leave out.
"""

import argparse
import csv
import itertools
import json
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from plots import plot_decode
from timing import (
    Side,
    Timing,
    command_line,
    last_level_cache_bytes,
    machine,
    positive,
    take_turns,
)
from traffic import mean_value_bytes, scored_bytes

from vllm_clusterkv import ops
from vllm_clusterkv.config import ClusterKVConfig
from vllm_clusterkv.page_layout import BLOCK_SIZE, PageLayout

ROOT = Path(__file__).resolve().parent.parent
# cpu_backend's; not imported, so that --no-vllm needs no vLLM
NUM_SCORE_PARTS, NUM_SPLITS = 16, 8
CPU_ATTN_BLOCK_SIZE = 128  # what vLLM gives CPU_ATTN unless told otherwise
CONFIG = ClusterKVConfig()


@dataclass(frozen=True)
class Shape:
    """The attention of a model."""

    name: str
    num_heads: int
    num_kv_heads: int
    head_size: int


SHAPES = [Shape("SmolLM2-135M", 9, 3, 64), Shape("Llama-3.1-8B", 32, 8, 128)]


@dataclass(frozen=True)
class Case:
    """One measurement: every side on one batch."""

    shape: Shape
    dtype: torch.dtype
    context_len: int
    batch_size: int

    @property
    def seq_len(self) -> int:
        """Half a page short of the context: the tail page is half full on average."""
        return max(self.context_len - BLOCK_SIZE // 2, 1)

    @property
    def num_pages(self) -> int:
        """Pages of one request."""
        return -(-self.seq_len // BLOCK_SIZE)

    @property
    def layout(self) -> PageLayout:
        return PageLayout(
            self.shape.num_kv_heads,
            self.shape.head_size,
            CONFIG.num_clusters,
            self.dtype,
        )

    @property
    def layer_bytes(self) -> int:
        """Bytes of one copy of the KV cache."""
        return self.batch_size * self.num_pages * self.layout.page_bytes


class Layer:
    """A copy of the batch's KV cache as semantic pages, in an order of its own."""

    def __init__(self, case: Case, buffer: torch.Tensor, block_table: torch.Tensor):
        layout = case.layout
        row = 2 * layout.head_size
        self.buffer = buffer  # [num_blocks, page_bytes] int8
        self.block_table = block_table  # [batch_size, num_pages] int32
        self.kv_cache = buffer.view(layout.dtype).as_strided(
            (len(buffer), layout.num_kv_heads, BLOCK_SIZE, row),
            (layout.page_bytes // layout.dtype.itemsize, BLOCK_SIZE * row, row, 1),
        )
        self.index = (self.kv_cache, layout.index_view(self.kv_cache))


def make_first_layer(case: Case, generator: torch.Generator) -> Layer:
    """Pages of clustered random keys, indexed by ``index_pages``.

    A key is one of 64 directions of its KV head plus noise of half its length, and
    stays with a direction for about 8 tokens, as text stays with a topic. Requests
    hold the same tokens; only their queries differ.
    """
    num_blocks = case.batch_size * case.num_pages
    buffer = torch.zeros(num_blocks, case.layout.page_bytes, dtype=torch.int8)
    blocks = torch.randperm(num_blocks, generator=generator)
    layer = Layer(case, buffer, blocks.view(case.batch_size, -1).to(torch.int32))
    pages, heads, size = case.num_pages, case.shape.num_kv_heads, case.shape.head_size
    directions = torch.randn(heads, 64, size, generator=generator)
    topics = torch.randint(64, (heads, pages, BLOCK_SIZE // 8), generator=generator)
    for i in range(pages):
        rows = torch.randn(heads, BLOCK_SIZE, 2 * size, generator=generator)
        rows[..., :size] *= 0.5
        topic_of_row = topics[:, i].repeat_interleave(8, dim=1)  # [heads, BLOCK_SIZE]
        rows[..., :size] += directions[torch.arange(heads)[:, None], topic_of_row]
        layer.kv_cache[layer.block_table[:, i].long()] = rows.to(case.dtype)
    sinks = torch.zeros(case.batch_size, case.num_pages, dtype=torch.int32)
    sinks[:, 0] = CONFIG.num_sink_tokens
    num_indexed = (case.seq_len - 1) // BLOCK_SIZE
    ops.index_pages(
        *layer.index,
        layer.block_table[:, :num_indexed].flatten(),
        sinks[:, :num_indexed].flatten(),
        CONFIG.num_iters,
    )
    return layer


def copy_layer(case: Case, first: Layer, generator: torch.Generator) -> Layer:
    """The same pages in other memory, and in another order."""
    order = torch.randperm(len(first.buffer), generator=generator)
    buffer = torch.empty_like(first.buffer)
    buffer[order] = first.buffer
    return Layer(case, buffer, order[first.block_table.long()].to(torch.int32))


class Semantic:
    """This package's sides. Outputs are allocated once, as a workspace would be."""

    def __init__(self, case: Case, layers: list[Layer], query: torch.Tensor):
        self.layers = layers
        self.query = query  # [batch_size, num_heads, head_size]
        self.scale = case.shape.head_size**-0.5
        batch, heads, size = query.shape
        max_clusters = case.num_pages * CONFIG.num_clusters
        kv_heads = case.shape.num_kv_heads
        self.seq_lens = torch.full((batch,), case.seq_len, dtype=torch.int32)
        self.all_sparse = torch.zeros(batch, dtype=torch.int32)
        self.all_dense = torch.full((batch,), 2**31 - 1, dtype=torch.int32)
        self.scores = torch.zeros(batch, heads, max_clusters)
        self.softmax_sums = torch.zeros(batch, heads, NUM_SCORE_PARTS, 2)
        self.selected = torch.zeros(batch, kv_heads, max_clusters, dtype=torch.uint8)
        self.num_attended = torch.zeros(batch, kv_heads, dtype=torch.int32)
        self.workspace = torch.empty(batch, heads, NUM_SPLITS, size + 2)
        self.output = torch.empty_like(query)

    def sparse(self, token_budget: int) -> Side:
        """Times the three ops of a decode row, each and together."""

        def run(layer_idx: int) -> dict[str, float]:
            layer = self.layers[layer_idx]
            rows = (layer.block_table, self.seq_lens, self.all_sparse)
            start = time.perf_counter_ns()
            ops.score_clusters(
                self.query,
                *layer.index,
                *rows,
                self.scale,
                CONFIG.num_sink_tokens,
                self.scores,
                self.softmax_sums,
            )
            scored = time.perf_counter_ns()
            ops.select_clusters(
                self.scores,
                self.softmax_sums,
                *layer.index,
                *rows,
                CONFIG.num_sink_tokens,
                token_budget,
                self.selected,
                self.num_attended,
            )
            chosen = time.perf_counter_ns()
            self._attend(layer, self.all_sparse)
            end = time.perf_counter_ns()
            return {
                f"score_clusters {token_budget}": (scored - start) / 1e3,
                f"select_clusters {token_budget}": (chosen - scored) / 1e3,
                f"sparse_decode {token_budget}": (end - chosen) / 1e3,
                f"sparse {token_budget}": (end - start) / 1e3,
            }

        return run

    def dense(self, layer_idx: int) -> dict[str, float]:
        """Times attention to everything."""
        layer = self.layers[layer_idx]
        start = time.perf_counter_ns()
        self._attend(layer, self.all_dense)
        return {"dense": (time.perf_counter_ns() - start) / 1e3}

    def num_attended_tokens(self, token_budget: int) -> float:
        """Tokens attended to exactly, a mean over rows and KV heads."""
        self.sparse(token_budget)(0)
        return self.num_attended.float().mean().item()

    def _attend(self, layer: Layer, min_sparse_lens: torch.Tensor) -> None:
        ops.sparse_decode(
            self.query,
            *layer.index,
            layer.block_table,
            self.seq_lens,
            min_sparse_lens,
            self.scores,
            self.selected,
            self.scale,
            CONFIG.num_sink_tokens,
            CONFIG.tail_estimate,
            self.workspace,
            self.output,
        )


class CPUAttention:
    """vLLM's default CPU kernel on copies of the same keys and values."""

    def __init__(
        self, case: Case, first: Layer, num_layers: int, generator: torch.Generator
    ):
        from vllm import _custom_ops, envs
        from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

        self.ops = _custom_ops
        shape, block_size = case.shape, CPU_ATTN_BLOCK_SIZE
        batch, size = case.batch_size, shape.head_size
        self.scale = size**-0.5
        isa = _get_attn_isa(case.dtype, block_size, size)
        self.seq_lens = torch.full((batch,), case.seq_len, dtype=torch.int32)
        self.query_start_loc = torch.arange(batch + 1, dtype=torch.int32)
        self.output = torch.empty(batch, shape.num_heads, size, dtype=case.dtype)
        self.metadata = _custom_ops.cpu_attn_get_scheduler_metadata(
            num_reqs=batch,
            num_heads=shape.num_heads,
            num_kv_heads=shape.num_kv_heads,
            head_dim=size,
            seq_lens=self.seq_lens,
            dtype=case.dtype,
            query_start_loc=self.query_start_loc,
            causal=True,
            sliding_window_size=-1,
            isa=isa,
            enable_kv_split=envs.VLLM_CPU_ATTN_SPLIT_KV,
        )
        blocks_per_req = -(-case.seq_len // block_size)
        num_blocks = batch * blocks_per_req
        cache_shape = (num_blocks, shape.num_kv_heads, 2 * block_size, size)
        self.layers = []
        for _ in range(num_layers):
            cache = torch.zeros(cache_shape, dtype=case.dtype)
            blocks = torch.randperm(num_blocks, generator=generator)
            block_table = blocks.view(batch, -1).to(torch.int32)
            self.layers.append((*cache.chunk(2, dim=2), block_table))
        first_blocks = first.block_table[0].long()
        # [num_pages, kv_heads, BLOCK_SIZE, 2 * size] -> [seq_len, kv_heads, 2 * size]
        rows = first.kv_cache[first_blocks].transpose(1, 2).flatten(0, 1)
        key, value = rows[: case.seq_len].split(size, dim=-1)
        position = torch.arange(case.seq_len)
        for key_cache, value_cache, block_table in self.layers:
            for req in range(batch):
                slots = block_table[req].long()[position // block_size] * block_size
                _custom_ops.cpu_attn_reshape_and_cache(
                    key,
                    value,
                    key_cache,
                    value_cache,
                    slots + position % block_size,
                    isa,
                )

    def side(self, query: torch.Tensor) -> Side:
        """Times attention for ``query``: [batch_size, num_heads, head_size]."""

        def run(layer_idx: int) -> dict[str, float]:
            key_cache, value_cache, block_table = self.layers[
                layer_idx % len(self.layers)
            ]
            start = time.perf_counter_ns()
            self.ops.cpu_attention_with_kv_cache(
                query=query,
                key_cache=key_cache,
                value_cache=value_cache,
                output=self.output,
                query_start_loc=self.query_start_loc,
                seq_lens=self.seq_lens,
                scale=self.scale,
                causal=True,
                alibi_slopes=None,
                sliding_window=-1,
                block_table=block_table,
                softcap=0,
                scheduler_metadata=self.metadata,
                s_aux=None,
            )
            return {"cpu_attn": (time.perf_counter_ns() - start) / 1e3}

        return run


def index_one_page(layers: list[Layer]) -> Side:
    """Times the indexing of one page; the first page of a copy, with its sinks."""
    sinks = torch.tensor([CONFIG.num_sink_tokens], dtype=torch.int32)

    def run(layer_idx: int) -> dict[str, float]:
        layer = layers[layer_idx]
        block_ids = layer.block_table[0, :1].contiguous()
        start = time.perf_counter_ns()
        ops.index_pages(*layer.index, block_ids, sinks, CONFIG.num_iters)
        return {"index_pages": (time.perf_counter_ns() - start) / 1e3}

    return run


def turns_between_uses(case: Case, num_dense_sides: int) -> int:
    """Turns that read at least twice the last-level cache.

    A real step streams other layers and the weights between two uses of a layer.
    With so many turns between two uses of a copy, its bytes come from memory, too.
    """
    bytes_per_turn = case.layer_bytes * num_dense_sides
    return -(-2 * last_level_cache_bytes() // bytes_per_turn) + 1


def traffic_bytes(case: Case, attended: float) -> float:
    """Bytes of keys, values and indexes that one call has to read.

    Args:
        case: The case.
        attended: Tokens attended to exactly, a row and KV head.
    """
    shape = case.shape
    row = 2 * shape.head_size * case.dtype.itemsize
    left_out = max(case.seq_len - attended, 0) / CONFIG.tokens_per_cluster
    scored = (case.seq_len - 1) // BLOCK_SIZE if left_out else 0  # pages
    per_head = attended * row + scored * scored_bytes(case.layout)
    per_head += left_out * mean_value_bytes(case.layout)
    return case.batch_size * shape.num_kv_heads * per_head


def run_case(
    case: Case, token_budgets: list[int], with_vllm: bool, repeats: int, seed: int
) -> list[dict]:
    """Measures one case.

    Returns:
        A row of the CSV file for each measurement.
    """
    generator = torch.Generator().manual_seed(seed)
    turns = turns_between_uses(case, 1 + with_vllm)
    num_layers = turns * (1 + len(token_budgets) + with_vllm)
    first = make_first_layer(case, generator)
    layers = [first]
    layers += [copy_layer(case, first, generator) for _ in range(num_layers - 1)]
    shape = (case.batch_size, case.shape.num_heads, case.shape.head_size)
    query = torch.randn(shape, generator=generator).to(case.dtype)

    semantic = Semantic(case, layers, query)
    sides: list[Side] = [semantic.dense]
    sides += [semantic.sparse(budget) for budget in token_budgets]
    if with_vllm:
        cpu_attn = CPUAttention(case, first, turns, generator)
        sides.append(cpu_attn.side(query))
    timings = take_turns(sides, num_layers, repeats, warmup=3)
    if with_vllm:
        semantic.dense(0)
        torch.testing.assert_close(
            semantic.output, cpu_attn.output, rtol=0.02, atol=0.01
        )
    timings |= take_turns([index_one_page(layers)], num_layers, repeats, warmup=3)

    rows = []
    for name, timing in timings.items():
        op, _, budget = name.partition(" ")
        attended = semantic.num_attended_tokens(int(budget)) if budget else case.seq_len
        has_traffic = op in ("sparse", "dense", "cpu_attn")
        rows.append(
            result_row(
                case,
                op,
                timing,
                timings,
                token_budget=budget or "",
                attended_tokens="" if op == "index_pages" else round(attended),
                bytes=round(traffic_bytes(case, attended)) if has_traffic else "",
            )
        )
    return rows


def result_row(
    case: Case, op: str, timing: Timing, timings: dict[str, Timing], **columns
) -> dict:
    """A row of the CSV file. Ratios above 1 mean that ``op`` is the faster one."""
    dense = timings["dense"].median_us
    row = {
        "model": case.shape.name,
        "num_heads": case.shape.num_heads,
        "num_kv_heads": case.shape.num_kv_heads,
        "head_size": case.shape.head_size,
        "dtype": str(case.dtype).removeprefix("torch."),
        "context_len": case.context_len,
        "batch_size": case.batch_size,
        "op": op,
        **columns,
        "time_us": round(timing.median_us, 1),
        "p90_us": round(timing.p90_us, 1),
        "dense_us": round(dense, 1),
        "cpu_attn_us": "",
        "dense_ratio": "",
        "cpu_attn_ratio": "",
    }
    comparable = op in ("sparse", "dense", "cpu_attn")
    if comparable:
        row["dense_ratio"] = round(dense / timing.median_us, 3)
    if "cpu_attn" in timings:
        cpu_attn = timings["cpu_attn"].median_us
        row["cpu_attn_us"] = round(cpu_attn, 1)
        if comparable:
            row["cpu_attn_ratio"] = round(cpu_attn / timing.median_us, 3)
    return row


def print_header(token_budgets: list[int], with_vllm: bool) -> None:
    names = ["dense"] + (["cpu_attn"] if with_vllm else [])
    names += [f"sparse {budget}" for budget in token_budgets]
    columns = "".join(f"{name:>22}" for name in names)
    print(f"{'model':14}{'context':>8}{'batch':>6}{columns}{'index page':>12}")


def print_case(case: Case, rows: list[dict]) -> None:
    """One line: median (p90) of each side, and how much faster than dense it is."""
    cells = ""
    # In the order of the header; the sort keeps that of the budgets.
    columns = ["dense", "cpu_attn", "sparse"]
    shown = [row for row in rows if row["op"] in columns]
    for row in sorted(shown, key=lambda row: columns.index(row["op"])):
        cell = f"{row['time_us']:.0f} ({row['p90_us']:.0f})"
        cell += f" {row['dense_ratio']:.2f}x"
        cells += f"{cell:>22}"
    index = next(row for row in rows if row["op"] == "index_pages")
    line = f"{case.shape.name:14}{case.context_len:>8}{case.batch_size:>6}{cells}"
    print(f"{line}{index['time_us']:>12.0f}", flush=True)


def measure(args: argparse.Namespace) -> list[dict]:
    """Runs every case, printing each as it comes."""
    shapes = SHAPES
    if args.num_heads is not None:
        shapes = [Shape("custom", args.num_heads, args.num_kv_heads, args.head_size)]
    print_header(args.token_budgets, args.vllm)
    rows = []
    for shape, batch_size, context_len in itertools.product(
        shapes, args.batch_sizes, args.context_lens
    ):
        case = Case(shape, getattr(torch, args.dtype), context_len, batch_size)
        if batch_size > 1 and batch_size * context_len > args.max_batch_tokens:
            continue
        found = run_case(case, args.token_budgets, args.vllm, args.repeats, args.seed)
        print_case(case, found)
        rows += found
    return rows


def write_results(out: Path, rows: list[dict], info: dict) -> None:
    """Writes the CSV file, and the machine beside it as JSON."""
    out.parent.mkdir(parents=True, exist_ok=True)
    common = {"cpu": info["cpu"], "threads": info["torch_threads"]}
    with out.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*common, *rows[0]])
        writer.writeheader()
        writer.writerows(common | row for row in rows)
    text = json.dumps(info, indent=2)
    out.with_suffix(".machine.json").write_text(f"{text}\n")
    print(f"wrote {out} and {out.with_suffix('.machine.json')}")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    contexts = [1024, 2048, 4096, 8192, 16384, 32768]
    add("--context-lens", type=positive, nargs="+", default=contexts)
    add("--token-budgets", type=positive, nargs="+", default=[256, 512, 1024])
    add("--batch-sizes", type=positive, nargs="+", default=[1, 8])
    add(
        "--max-batch-tokens",
        type=positive,
        default=32768,
        help="skip batches (not single requests) with more context than this",
    )
    add("--num-heads", type=positive, help="instead of the two models' shapes")
    add("--num-kv-heads", type=positive)
    add("--head-size", type=positive)
    dtypes = ["bfloat16", "float16", "float32"]
    add("--dtype", choices=dtypes, default=dtypes[0])
    add("--repeats", type=positive, default=60, help="calls that count, of each side")
    add("--seed", type=int, default=0)
    add(
        "--no-vllm",
        dest="vllm",
        action="store_false",
        help="leave out vLLM's kernel (vLLM need not be installed)",
    )
    add("--out", type=Path, default=ROOT / "benchmarks/results/decode_cpu.csv")
    add("--no-plot", dest="plot", action="store_false")
    args = parser.parse_args()
    shape = [args.num_heads, args.num_kv_heads, args.head_size]
    if any(shape) and not all(shape):
        parser.error("--num-heads, --num-kv-heads and --head-size go together")
    return args


def main() -> None:
    args = parse_args()
    info = machine() | {"command": command_line(), "date": time.strftime("%Y-%m-%d")}
    print(
        f"{info['cpu']}, {info['torch_threads']} threads, torch {info['torch']}, "
        f"vLLM {info['vllm']}, {args.dtype}"
    )
    print("microseconds a layer: median (p90), and how many times dense's speed")
    rows = measure(args)
    write_results(args.out, rows, info)
    if args.plot:
        plot_decode(args.out, args.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
