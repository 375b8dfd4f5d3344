# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_clusterkv project
"""Runs tasks through methods, and writes and prints their scores.

Files in ``--out``: ``results.jsonl`` (a line a sample and method, from which an
interrupted run goes on), ``settings.json``, ``machine.json``, ``quality.csv``, heat
maps of the needle grid, dense attention's log-probabilities, and the engines' logs.
"""

import argparse
import json
import time
from dataclasses import asdict
from pathlib import Path

from benchmarks.quality import needle_grid, ruler
from benchmarks.quality.evaluate import Evaluation, make_samples
from benchmarks.quality.methods import METHODS, make_method
from benchmarks.quality.plan import complete, make_parser
from benchmarks.quality.results import (
    Results,
    code_fingerprint,
    less_dense,
    summarize,
    table,
    write_csv,
)
from benchmarks.quality.samples import Prompter
from benchmarks.quality.texts import Texts, load_texts
from vllm_clusterkv.config import ClusterKVConfig


def main(argv: list[str] | None = None) -> None:
    """Runs the command line.

    Args:
        argv: Its words; None for the process's.
    """
    args = make_parser().parse_args(argv)
    start = time.perf_counter()
    try:
        args.model = str(_model_folder(args.model))
        from transformers import AutoConfig, AutoTokenizer

        config = AutoConfig.from_pretrained(args.model)
        max_model_len = config.get_text_config().max_position_embeddings
        complete(args, max_model_len)
        texts = load_texts(args.texts)
        prompter = Prompter(AutoTokenizer.from_pretrained(args.model))
        results = Results(args.out, _settings(args, texts))
        print("making prompts", flush=True)
        samples = make_samples(args, prompter, texts)
    except ValueError as error:
        raise SystemExit(f"error: {error}") from error
    from tqdm import tqdm

    with tqdm(total=0, unit="sample") as progress:
        evaluation = Evaluation(args, samples, prompter, results, progress)
        progress.total = evaluation.count()
        progress.refresh()
        try:
            evaluation.run()
        except (RuntimeError, ValueError) as error:
            raise SystemExit(f"error: {error}") from error
        except KeyboardInterrupt:
            raise SystemExit("interrupted; the same command goes on") from None
        finally:
            _write(args, evaluation, results, time.perf_counter() - start)
    rows = _rows(args, results)
    print(table(rows, averaged=list(ruler.TASKS)))
    for file in needle_grid.draw(results.records, args.out):
        print(f"drawn: {file}")
    print(f"written: {args.out / 'quality.csv'}")


def _model_folder(model: str) -> Path:
    folder = Path(model)
    if not (folder / "config.json").is_file():
        raise ValueError(f"--model must be a folder with config.json, got {model}")
    return folder.resolve()


def _settings(args: argparse.Namespace, texts: Texts) -> dict:
    """What results of one folder have in common."""
    return {
        "model": Path(args.model).name,
        "weights": _fingerprint(Path(args.model)),
        "code": code_fingerprint(),
        "defaults": _defaults(),
        "seed": args.seed,
        "needle_samples": args.needle_samples,
        "depths": args.depths,
        "max_answer_tokens": args.max_answer_tokens,
        "forced_tokens": args.forced_tokens,
        "long_tokens": args.long_tokens,
        "top_k": args.top_k,
        "question_tokens": args.question_tokens,
        "batch_size": args.batch_size,
        "dense_backend": args.dense_backend,
        "settings": args.settings,
        "engine_args": args.engine_args,
        "texts": texts.sources,
    }


def _fingerprint(model: Path) -> dict[str, int]:
    """Bytes of the model's files: another model of the same name shows."""
    files = sorted([*model.glob("*.safetensors"), *model.glob("*.json")])
    return {file.name: file.stat().st_size for file in files}


def _defaults() -> dict[str, dict]:
    """What methods mean without settings behind their names."""
    return {
        "clusterkv": asdict(ClusterKVConfig()),
        **{name: asdict(make_method(name)) for name in METHODS},
    }


def _rows(args: argparse.Namespace, results: Results) -> list[dict]:
    """What quality.csv has."""
    model = Path(args.model).name
    compared = less_dense(results.records, model, list(ruler.TASKS))
    return [*summarize(results.records, model), *compared]


def _write(
    args: argparse.Namespace, evaluation: Evaluation, results: Results, seconds: float
) -> None:
    from gpu_timing import gpu_machine
    from timing import command_line, machine

    rows = _rows(args, results)
    if rows:
        write_csv(args.out / "quality.csv", rows)
    file = args.out / "machine.json"
    runs = json.loads(file.read_text()) if file.exists() else []
    runs.append(
        {
            **machine(),
            **gpu_machine(),
            "command": command_line(),
            "seconds": round(seconds, 1),
            "engines": evaluation.facts,
        }
    )
    file.write_text(json.dumps(runs, indent=2) + "\n")


if __name__ == "__main__":
    main()
