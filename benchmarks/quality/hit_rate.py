# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_clusterkv project
"""How often consecutive decode steps ask for the same rows: what a hot cache would hit.

    python -m benchmarks.quality.hit_rate --model DIR --out FOLDER

One dense prefill of real text captures the queries of its last tokens, one after
another, and the keys. In every layer each of them selects clusters as the product
does. A cluster is contiguous in its sorted page, which is read in lines of
``--line-rows`` rows. A cache of so many tokens a KV head keeps the lines used last; one
that a step asks for and does not find is a miss. Page 0 has the sinks and stays where
it is.

``hit_rate.csv``: a row a layer (and "mean"), budget, size of lines and of the cache.
``rows_a_row``: rows in the lines that a step asks for, over the rows it attends to.
"""

import argparse
import csv
from collections import OrderedDict, defaultdict
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean

import torch
from tqdm import tqdm
from transformers import AutoTokenizer

from benchmarks.quality.fidelity import (
    Layer,
    capture,
    cut_texts,
    make_parser,
    read_texts,
)
from benchmarks.quality.hf_runner import HFModel
from benchmarks.quality.methods import make_method
from benchmarks.quality.methods.ours import Ours, OursIndex

FIELDS = (
    "model",
    "context_len",
    "token_budget",
    "line_rows",
    "hot_cache_tokens",
    "layer",
    "hit_rate",
    "lines_a_step",
    "rows_a_row",
)


class LineCache:
    """Lines used last, of one KV head.

    Attributes:
        num_hits: Lines asked for and found.
        num_misses: Lines asked for and not found.
    """

    def __init__(self, num_lines: int) -> None:
        """An empty cache of ``num_lines`` lines."""
        self._lines: OrderedDict[int, None] = OrderedDict()
        self._num_lines = num_lines
        self.num_hits = self.num_misses = 0

    def step(self, lines: list[int], counts: bool) -> None:
        """Asks for the lines of a decode step.

        Args:
            lines: All different.
            counts: Whether hits and misses are counted.
        """
        missing = [line for line in lines if line not in self._lines]
        if counts:
            self.num_misses += len(missing)
            self.num_hits += len(lines) - len(missing)
        for line in lines:
            if line in self._lines:
                self._lines.move_to_end(line)
        # Those of this step stay; what does not fit beside them is not kept.
        room = self._num_lines - (len(lines) - len(missing))
        for line in missing[: max(room, 0)]:
            if len(self._lines) == self._num_lines:
                self._lines.popitem(last=False)
            self._lines[line] = None


def places(index: OursIndex, page_size: int) -> torch.Tensor:
    """The row of its sorted page that each token is in.

    Args:
        index: Of whole pages.
        page_size: Tokens of them.

    Returns:
        [num_kv_heads, num_tokens] int64.
    """
    labels = index.labels.unflatten(1, (-1, page_size))
    order = labels.argsort(dim=2, stable=True)
    rows = torch.arange(page_size, device=labels.device).expand_as(labels)
    return torch.empty_like(labels).scatter(2, order, rows).flatten(1)


def selections(
    layer: Layer, method: Ours, token_budget: int, contexts: list[int]
) -> Iterator[list[torch.Tensor]]:
    """Of each step and KV head, the rows attended to behind page 0.

    Rows count through the pages as they are sorted: row ``r`` of page ``p`` is
    ``p * page_size + r``.
    """
    index = method.index(layer.scale)
    for query, context in zip(layer.queries, contexts, strict=True):
        index.update(layer.keys[:, :context], layer.values[:, :context])
        mask = index.select(query, token_budget).mask[:, : index.labels.shape[1]]
        page = torch.arange(mask.shape[1], device=mask.device) // method.page_size
        rows = page * method.page_size + places(index, method.page_size)
        chosen = mask & (page > 0)
        yield [of_head[c] for of_head, c in zip(rows, chosen, strict=True)]


def measure(
    layer: Layer, method: Ours, token_budget: int, contexts: list[int], args
) -> Iterator[dict[str, float]]:
    """Hit rates of a layer, by size of lines and of the cache."""
    steps = [
        [rows.tolist() for rows in heads]
        for heads in selections(layer, method, token_budget, contexts)
    ]
    for line_rows in args.line_rows:
        asked = [[sorted({r // line_rows for r in rows}) for rows in s] for s in steps]
        num_lines = [len(lines) for heads in asked for lines in heads]
        num_rows = [len(rows) for heads in steps for rows in heads]
        for budgets in args.hot_budgets:
            hot_cache_tokens = int(budgets * token_budget)
            caches = [LineCache(hot_cache_tokens // line_rows) for _ in asked[0]]
            for step, heads in enumerate(asked):
                for cache, lines in zip(caches, heads, strict=True):
                    cache.step(lines, step >= args.warm_up)
            hits = sum(cache.num_hits for cache in caches)
            misses = sum(cache.num_misses for cache in caches)
            yield {
                "line_rows": line_rows,
                "hot_cache_tokens": hot_cache_tokens,
                "hit_rate": hits / max(hits + misses, 1),
                "lines_a_step": fmean(num_lines),
                "rows_a_row": line_rows * sum(num_lines) / max(sum(num_rows), 1),
            }


@torch.inference_mode()
def run(args: argparse.Namespace) -> list[dict]:
    """Measures everything asked for."""
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    [piece] = cut_texts(tokenizer, read_texts(args.texts), 1, max(args.context_lens))
    model = HFModel(args.model, args.device, getattr(torch, args.dtype))
    method = make_method(args.method)
    if not isinstance(method, Ours):
        raise ValueError(f"--method must be ours or ours-tail, got {args.method!r}")
    layers = list(range(0, model.num_layers, args.every_nth_layer))
    rows = []
    for context_len in args.context_lens:
        contexts = list(range(context_len - args.steps + 1, context_len + 1))
        captured = capture(model, piece, contexts, layers)
        for layer in tqdm(layers, unit="layer"):
            for budget in args.token_budgets:
                for found in measure(captured[layer], method, budget, contexts, args):
                    where = {"context_len": context_len, "token_budget": budget}
                    rows.append({**where, "layer": layer, **found})
    return rows


def with_means(rows: list[dict]) -> list[dict]:
    """The rows, and means over the layers."""
    groups = defaultdict(list)
    keys = ("context_len", "token_budget", "line_rows", "hot_cache_tokens")
    for row in rows:
        groups[tuple(row[key] for key in keys)].append(row)
    measures = ("hit_rate", "lines_a_step", "rows_a_row")
    means = [
        {
            **dict(zip(keys, key, strict=True)),
            "layer": "mean",
            **{name: fmean(row[name] for row in group) for name in measures},
        }
        for key, group in groups.items()
    ]
    return means + rows


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = make_parser("hit_rate", "What a cache of recently used lines would hit.")
    parser.set_defaults(context_lens=[8192], token_budgets=[1024])
    add = parser.add_argument
    add("--method", default="ours-tail", help="with settings; default %(default)s")
    add("--line-rows", nargs="+", type=int, default=[8, 16, 32], metavar="N")
    add(
        "--hot-budgets",
        nargs="+",
        type=float,
        default=[1, 2, 3, 4],
        metavar="X",
        help="tokens of the cache, in budgets",
    )
    add("--steps", type=int, default=128, help="decode steps; default %(default)s")
    add("--warm-up", type=int, default=16, help="steps that do not count")
    args = parser.parse_args(argv)
    for name, least in (("steps", 2), ("every_nth_layer", 1), ("warm_up", 0)):
        if getattr(args, name) < least:
            flag = "--" + name.replace("_", "-")
            parser.error(f"{flag} must be at least {least}, got {getattr(args, name)}")
    if args.warm_up >= args.steps or args.steps >= min(args.context_lens):
        parser.error(
            "--warm-up must be less than --steps, and that less than --context-lens; "
            f"got {args.warm_up}, {args.steps} and {min(args.context_lens)}"
        )
    if any(256 % rows for rows in args.line_rows):
        parser.error(f"--line-rows must divide 256, got {args.line_rows}")
    try:
        rows = with_means(run(args))
    except ValueError as error:
        parser.error(str(error))
    args.out.mkdir(parents=True, exist_ok=True)
    with (args.out / "hit_rate.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
        writer.writeheader()
        for row in rows:
            numbers = {k: f"{v:.4g}" for k, v in row.items() if isinstance(v, float)}
            writer.writerow({"model": Path(args.model).name, **row, **numbers})
    print("context budget line rows  hot tokens  hit rate  lines a step  rows a row")
    for row in rows:
        if row["layer"] == "mean":
            print(
                f"{row['context_len']:7d} {row['token_budget']:6d} "
                f"{row['line_rows']:9d} {row['hot_cache_tokens']:11d} "
                f"{row['hit_rate']:9.3f} {row['lines_a_step']:13.1f} "
                f"{row['rows_a_row']:11.2f}"
            )


if __name__ == "__main__":
    main()
