# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_clusterkv project
"""What each method's selection captures of dense attention, on real text.

    python -m benchmarks.quality.fidelity --model DIR --out FOLDER

One dense prefill captures queries, keys and values of every layer. Each decode position
is then attended to densely and by every method over the same keys, so errors of one
layer do not reach the next.

``--out`` gets ``fidelity.jsonl`` (one line a context, text, layer, method and budget,
means over positions and heads), ``fidelity.csv`` (means over texts, by layer and over
layers) and ``settings.json``. A run that was cut off, or one with more methods or
budgets, goes on from the lines that are there.
"""

import argparse
import csv
import json
import sysconfig
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from tqdm import tqdm
from transformers import AutoTokenizer, DynamicCache

from benchmarks.quality.hf_runner import HFModel
from benchmarks.quality.methods import METHODS, Index, Method, make_method
from benchmarks.quality.methods.attention import attend, exact_logits
from benchmarks.quality.results import code_fingerprint

SPAN = 512
"""Offsets of positions count from a multiple of this: the largest page of a sweep."""

MEASURES = {
    "attended": "tokens attended to exactly, a KV head",
    "mass": "attention mass of these, mean over the query heads",
    "best": "the largest mass that so many tokens can have",
    "error": "norm of the output's difference from exact attention's, relative",
    "kib": "KiB read a step and KV head: index, tokens, stand-ins; 16-bit elements",
    "dense_kib": "KiB that dense attention reads",
}

_KEYS = ("context", "text", "layer", "method", "budget")


@dataclass
class Layer:
    """What one layer's attention was given.

    Attributes:
        queries: [num_positions, num_heads, head_size], of the positions captured.
        keys: [num_kv_heads, seq_len, head_size].
        values: As keys.
        scale: Softmax scale.
    """

    queries: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    scale: float


def capture(
    model: HFModel, token_ids: list[int], contexts: list[int], layers: list[int]
) -> dict[int, Layer]:
    """Runs a text densely and keeps what attention was given.

    Args:
        model: The model.
        token_ids: The text.
        contexts: Tokens up to and with each position to capture, ascending.
        layers: Layers to capture.
    """
    captured: dict[int, Layer] = {}
    last = torch.tensor(contexts, device=model.device) - 1

    def keep(layer, query, keys, values, scale) -> None:
        if layer in layers:
            queries = query[:, last].transpose(0, 1)
            captured[layer] = Layer(queries, keys, values, scale)

    model.forward(token_ids[: contexts[-1]], DynamicCache(), keep)
    return captured


def decode_contexts(context_len: int, offsets: Iterable[int]) -> list[int]:
    """Longest contexts up to ``context_len`` whose last page holds so many tokens.

    Args:
        context_len: Tokens, at most.
        offsets: 1 to ``SPAN``; the current token is that one of its span.
    """
    contexts = [
        (context_len - offset) // SPAN * SPAN + offset for offset in sorted(offsets)
    ]
    return sorted(context for context in contexts if context > 0)


def measure(
    layer: Layer, method: Method, budgets: list[int], contexts: list[int]
) -> dict[int, dict[str, float]]:
    """Holds a method against exact attention in one layer.

    Args:
        layer: From ``capture``.
        method: The method.
        budgets: Token budgets.
        contexts: As ``capture``.

    Returns:
        By budget, the ``MEASURES``: means over positions and heads.
    """
    rows: dict[int, list[dict[str, float]]] = defaultdict(list)
    index = method.index(layer.scale)
    for query, context in zip(layer.queries, contexts, strict=True):
        keys, values = layer.keys[:, :context], layer.values[:, :context]
        if method.depends_on_prompt:
            # As right after a prompt of this length: positions then compare.
            index = method.index(layer.scale)
        index.update(keys, values)
        for budget in budgets:
            row = _measure_step(index, query, keys, values, layer.scale, budget)
            rows[budget].append(row)
    return {
        budget: {name: fmean(row[name] for row in group) for name in MEASURES}
        for budget, group in rows.items()
    }


def _measure_step(
    index: Index, query, keys, values, scale: float, budget: int
) -> dict[str, float]:
    selection = index.select(query, budget)
    logits = exact_logits(query, keys, scale)  # [num_kv_heads, group, seq_len]
    weights = logits.softmax(2)
    exact = (weights @ values.float()).flatten(0, 1)
    error = (attend(selection, logits, values) - exact).norm(dim=1) / exact.norm(dim=1)
    shared = weights.mean(1)  # a selection is the group's: [num_kv_heads, seq_len]
    attended = selection.num_attended
    ordered = shared.sort(dim=1, descending=True).values.cumsum(1)
    best = ordered.gather(1, attended[:, None] - 1)
    head_size = keys.shape[2]
    return {
        "attended": float(attended.double().mean()),
        "mass": float((shared * selection.mask).sum(1).mean()),
        "best": float(best.mean()),
        "error": float(error.mean()),
        "kib": selection.bytes_moved(head_size) / 1024,
        "dense_kib": keys.shape[1] * 4 * head_size / 1024,
    }


class Results:
    """The lines of ``fidelity.jsonl``, old and new.

    Attributes:
        rows: All of them.
    """

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        """Opens a folder, new or with the results of a run with these settings.

        Raises:
            ValueError: The folder has results of other settings.
        """
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._lines = folder, folder / "fidelity.jsonl"
        note = folder / "settings.json"
        if note.exists():
            old = json.loads(note.read_text(encoding="utf-8"))
            if old != settings:
                other = [name for name in settings if old.get(name) != settings[name]]
                raise ValueError(
                    f"{note} must have this run's settings, but differs in "
                    f"{', '.join(other)}; choose another --out"
                )
        note.write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
        self.rows: list[dict[str, Any]] = []
        if self._lines.exists():
            text = self._lines.read_text(encoding="utf-8")
            whole = text[: text.rfind("\n") + 1]  # a cut run may end within a line
            self._lines.write_text(whole, encoding="utf-8")
            self.rows = [json.loads(line) for line in whole.splitlines()]
        self._done = {tuple(row[key] for key in _KEYS) for row in self.rows}

    def has(self, **keys: Any) -> bool:
        """Whether there is a line of these ``_KEYS``."""
        return tuple(keys[key] for key in _KEYS) in self._done

    def add(self, row: dict[str, Any]) -> None:
        """Writes a line."""
        self.rows.append(row)
        self._done.add(tuple(row[key] for key in _KEYS))
        with self._lines.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def write_csv(self) -> None:
        """Writes ``fidelity.csv``."""
        with (self._folder / "fidelity.csv").open("w", newline="") as file:
            columns = ["context", "budget", "method", "layer", *MEASURES]
            writer = csv.DictWriter(file, columns, lineterminator="\n")
            writer.writeheader()
            for row in summarise(self.rows):
                measures = {name: f"{row[name]:.5g}" for name in MEASURES}
                writer.writerow({**row, **measures})


def summarise(rows: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Means over the texts, by layer and ("mean") over the layers."""
    groups: dict[tuple, list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        for layer in ("mean", row["layer"]):
            groups[row["context"], row["budget"], row["method"], layer].append(row)
    for (context, budget, method, layer), group in groups.items():
        measures = {name: fmean(row[name] for row in group) for name in MEASURES}
        keys = {"context": context, "budget": budget, "method": method, "layer": layer}
        yield {**keys, **measures}


def table(rows: list[dict[str, Any]]) -> str:
    """The means over layers as text, best error first."""
    means = [row for row in summarise(rows) if row["layer"] == "mean"]
    lines = []
    for context, budget in sorted({(row["context"], row["budget"]) for row in means}):
        part = [r for r in means if (r["context"], r["budget"]) == (context, budget)]
        width = max(len(row["method"]) for row in part)
        dense = f"dense reads {part[0]['dense_kib']:.0f} KiB"
        lines += [
            f"context {context}, budget {budget} ({dense})",
            f"  {'method':{width}}  attended   mass   best  error      KiB",
        ]
        lines += [
            f"  {row['method']:{width}} {row['attended']:9.1f} {row['mass']:6.3f} "
            f"{row['best']:6.3f} {row['error']:6.3f} {row['kib']:8.1f}"
            for row in sorted(part, key=lambda row: row["error"])
        ]
        lines.append("")
    return "\n".join(lines)


def read_texts(folder: Path) -> str:
    """All files of a folder, in sorted order; of the standard library its ``*.py``."""
    is_stdlib = folder == Path(sysconfig.get_path("stdlib"))
    files = sorted(folder.glob("*.py" if is_stdlib else "*"))
    parts = [file.read_text(encoding="utf-8") for file in files if file.is_file()]
    if not parts:
        raise ValueError(f"--texts must hold text files, got {folder} without any")
    return "\n".join(parts)


def cut_texts(tokenizer: Any, text: str, num_texts: int, num_tokens: int) -> list[list]:
    """Pieces of so many tokens, from evenly spaced places of a text."""
    pieces = []
    for i in range(num_texts):
        # Characters enough for the tokens: few tokens are longer than 8.
        start = i * len(text) // num_texts
        ids = tokenizer(text[start : start + 8 * num_tokens]).input_ids[:num_tokens]
        if len(ids) < num_tokens:
            raise ValueError(
                f"the text at {start} must have {num_tokens} tokens, got {len(ids)}"
            )
        pieces.append(ids)
    return pieces


def method_specs(methods: list[str], sweeps: list[str], base: str) -> list[str]:
    """The methods, and for each sweep ``FIELD=V1,V2`` variants of ``base``."""
    specs = list(methods)
    for sweep in sweeps:
        name, _, values = sweep.partition("=")
        joint = "," if ":" in base else ":"
        specs += [f"{base}{joint}{name}={value}" for value in values.split(",")]
    for spec in specs:
        make_method(spec)  # wrong ones are to fail now, not after hours
    return list(dict.fromkeys(specs))


@torch.inference_mode()
def run(args: argparse.Namespace, results: Results, specs: list[str]) -> None:
    """Measures what is not yet in the results."""
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    pieces = cut_texts(
        tokenizer, read_texts(args.texts), args.num_texts, max(args.context_lens)
    )
    model = HFModel(args.model, args.device, getattr(torch, args.dtype))
    layers = list(range(0, model.num_layers, args.every_nth_layer))
    tasks = list(product(sorted(args.context_lens), range(args.num_texts)))
    with tqdm(total=len(tasks) * len(layers) * len(specs), unit="layer") as progress:
        for context_len, text in tasks:
            contexts = decode_contexts(context_len, args.offsets)
            todo = {}
            for layer, spec in product(layers, specs):
                keys = {"context": context_len, "text": text, "layer": layer}
                budgets = [
                    budget
                    for budget in args.token_budgets
                    if not results.has(**keys, method=spec, budget=budget)
                ]
                if budgets:
                    todo[layer, spec] = budgets
                else:
                    progress.update()
            if not todo:
                continue
            captured = capture(model, pieces[text], contexts, layers)
            for (layer, spec), budgets in todo.items():
                progress.set_postfix_str(f"{context_len} tokens, {spec}")
                method = make_method(spec)
                found = measure(captured[layer], method, budgets, contexts)
                for budget, measures in found.items():
                    keys = {"context": context_len, "text": text, "layer": layer}
                    results.add({**keys, "method": spec, "budget": budget, **measures})
                progress.update()


def make_parser(name: str, description: str) -> argparse.ArgumentParser:
    """What measurements on captured attention have in common.

    Args:
        name: Of the module, in ``benchmarks.quality``.
        description: One line.
    """
    made = argparse.ArgumentParser(
        prog=f"python -m benchmarks.quality.{name}", description=description
    )
    add = made.add_argument
    add("--model", required=True, help="folder of a Hugging Face Llama or Qwen2")
    add("--out", required=True, type=Path, help="folder for the results")
    add("--context-lens", nargs="+", type=int, metavar="N", help="default %(default)s")
    add("--token-budgets", nargs="+", type=int, metavar="N", help="default %(default)s")
    add(
        "--texts",
        type=Path,
        default=Path(sysconfig.get_path("stdlib")),
        help="folder of text files; default the Python standard library's *.py",
    )
    add("--every-nth-layer", type=int, default=1, metavar="N")
    add("--device", default="cpu")
    add("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    return made


def parser() -> argparse.ArgumentParser:
    """The command line's arguments."""
    made = make_parser(
        "fidelity", "What each selection captures of dense attention, on real text."
    )
    made.set_defaults(context_lens=[4096, 8192], token_budgets=[256, 512, 1024])
    add = made.add_argument
    add(
        "--methods",
        nargs="*",
        default=list(METHODS),
        help="names, or name:setting=value,...; default all",
    )
    add(
        "--sweep",
        action="append",
        default=[],
        metavar="FIELD=V1,V2",
        help="variants of --sweep-base with one setting changed; may be repeated",
    )
    add("--sweep-base", default="ours-tail", help="default %(default)s")
    add("--num-texts", type=int, default=1, help="pieces of the text; default 1")
    add(
        "--offsets",
        nargs="+",
        type=int,
        default=[64, 192, 320, 448],
        metavar="N",
        help=f"decode positions, in spans of {SPAN} tokens; up to 128 for page sweeps, "
        "so that last pages are equally full; default %(default)s",
    )
    return made


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    arguments = parser()
    args = arguments.parse_args(argv)
    is_stdlib = args.texts == Path(sysconfig.get_path("stdlib"))
    version = sysconfig.get_python_version()
    settings: dict[str, Any] = {
        "model": Path(args.model).name,
        "text": f"Python {version} standard library" if is_stdlib else args.texts.name,
        "num_texts": args.num_texts,
        "longest": max(args.context_lens),
        "offsets": sorted(args.offsets),
        "every_nth_layer": args.every_nth_layer,
        "dtype": args.dtype,
    }
    described = ", ".join(f"{name} {value}" for name, value in settings.items())
    # A line's method means what it meant: with other defaults a run does not go on.
    settings["code"] = code_fingerprint()
    settings["defaults"] = {name: asdict(make_method(name)) for name in METHODS}
    try:
        specs = method_specs(args.methods, args.sweep, args.sweep_base)
        results = Results(args.out, settings)
        run(args, results, specs)
    except ValueError as error:
        arguments.error(str(error))
    results.write_csv()
    print(f"{described}\n\n{table(results.rows)}")


if __name__ == "__main__":
    main()
