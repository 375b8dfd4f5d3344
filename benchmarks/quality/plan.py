# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_clusterkv project
"""What the command line asks for, checked before anything slow begins."""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

from benchmarks.quality import needle_grid, peers, ruler, teacher_forcing
from benchmarks.quality.vllm_runner import SETTINGS, method_settings
from vllm_clusterkv.config import ClusterKVConfig

TASKS = (*ruler.TASKS, needle_grid.TASK, *teacher_forcing.TASKS)
GROUPS = {"ruler": tuple(ruler.TASKS), "all": TASKS}


@dataclass(frozen=True)
class Suite:
    """Defaults of the settings that say how much is run.

    Attributes:
        context_lens: None: powers of two from 4,096 to the model's limit.
        token_budgets: Of every method but dense and full.
        samples: Of each of RULER's and LongBench's tasks, and context.
        needle_samples: Of each depth and context of the needle grid.
        forced_samples: Of teacher forcing and long generation, and context.
        depths: Of the needle grid.
        max_answer_tokens: None: each task's own.
        forced_tokens: Decode steps of teacher forcing.
        long_tokens: Decode steps of long generation.
        batch_size: Prompts that an engine gets together.
    """

    context_lens: list[int] | None
    token_budgets: list[int]
    samples: int
    needle_samples: int
    forced_samples: int
    depths: list[float]
    max_answer_tokens: int | None
    forced_tokens: int
    long_tokens: int
    batch_size: int


SUITES = {
    # On two CPU cores in minutes, with a model of 135M parameters.
    "quick": Suite([2048], [256], 2, 2, 2, [0.1, 0.5, 0.9], 40, 64, 128, 4),
    "full": Suite(
        None,
        [256, 512, 1024, 2048],
        20,
        3,
        4,
        [i / 10 for i in range(11)],
        None,
        256,
        4096,
        8,
    ),
}


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.quality",
        description="Quality of sparse decoding next to dense attention.",
    )
    add = parser.add_argument
    add("--model", required=True, help="folder of a model with its tokenizer")
    add("--suite", default="quick", help="quick (default) or full: the defaults below")
    add(
        "--tasks", nargs="+", default=["all"], help=f"of {', '.join((*TASKS, *GROUPS))}"
    )
    add("--context-lens", nargs="+", type=int, help="tokens, answers included")
    add("--token-budgets", nargs="+", type=int)
    add(
        "--methods",
        nargs="+",
        default=["dense", "clusterkv", "clusterkv-notail"],
        help="these three run in vLLM (the default); others in hf_runner.py",
    )
    add("--samples", type=int, help="of each of RULER's and LongBench's tasks")
    add("--needle-samples", type=int, help="of each depth of the needle grid")
    add("--forced-samples", type=int, help="of teacher_forcing and long_generation")
    add("--depths", nargs="+", type=float, help="of the needle grid, 0 to 1")
    add("--max-answer-tokens", type=int, help="if less than the task's")
    add("--forced-tokens", type=int, help="decode steps of teacher_forcing")
    add("--long-tokens", type=int, help="decode steps of long_generation")
    add("--top-k", type=int, default=100, help="log-probabilities a token, for the KL")
    add(
        "--question-tokens",
        type=int,
        default=0,
        help="last tokens of each prompt that are decoded one by one, not prefilled",
    )
    add("--batch-size", type=int, help="prompts that an engine gets together")
    add("--texts", type=Path, help="folder of filler text; Python's own if not given")
    add(
        "--longbench",
        type=Path,
        help="folder of LongBench's JSONL files; runs them too",
    )
    add("--seed", type=int, default=0)
    add("--dense-backend", help="of vLLM; FLASH_ATTN on GPUs, CPU_ATTN on CPUs")
    add("--settings", type=json.loads, default={}, help="more for clusterkv, as JSON")
    add("--engine-args", type=json.loads, default={}, help="more for LLM(), as JSON")
    add("--timeout", type=float, default=3600, help="seconds a call of an engine")
    add("--out", type=Path, default=Path("quality-results"), help="folder")
    return parser


def complete(args: argparse.Namespace, max_model_len: int) -> None:
    """Fills in the suite's defaults, and checks every setting.

    Args:
        args: The command line's, changed in place.
        max_model_len: Tokens that the model can take.

    Raises:
        ValueError: Names the setting, what was expected, and what came.
    """
    if args.suite not in SUITES:
        _reject("--suite", f"one of {', '.join(SUITES)}", args.suite)
    for name, value in vars(SUITES[args.suite]).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.context_lens is None:
        args.context_lens = [
            n for n in (4096 << i for i in range(10)) if n <= max_model_len
        ] or [max_model_len]
    for length in args.context_lens:
        if not 256 <= length <= max_model_len:
            _reject(
                "--context-lens", f"from 256 to the model's {max_model_len}", length
            )
    for name, low in (
        ("samples", 1),
        ("needle_samples", 1),
        ("forced_samples", 1),
        ("max_answer_tokens", 1),
        ("forced_tokens", 1),
        ("long_tokens", 1),
        ("top_k", 1),
        ("question_tokens", 0),
        ("batch_size", 1),
    ):
        value = getattr(args, name)
        if value is not None and value < low:
            _reject(f"--{name.replace('_', '-')}", f"at least {low}", value)
    for budget in args.token_budgets:
        if budget < 1:
            _reject("--token-budgets", "at least 1", budget)
    for depth in args.depths:
        if not 0 <= depth <= 1:
            _reject("--depths", "from 0 to 1", depth)
    for name in ("settings", "engine_args"):
        if not isinstance(getattr(args, name), dict):
            _reject(f"--{name.replace('_', '-')}", "a JSON object", getattr(args, name))
    args.tasks = _tasks(args.tasks)
    args.methods = list(dict.fromkeys(args.methods))
    peers.check_methods([name for name in args.methods if name not in SETTINGS])
    _check_settings(args)
    _require_dense(args)
    longest = max(args.context_lens)
    for task, name in (
        ("teacher_forcing", "forced_tokens"),
        ("long_generation", "long_tokens"),
    ):
        if task in args.tasks and 2 * getattr(args, name) > longest:
            _reject(
                f"--{name.replace('_', '-')}",
                f"at most half of the longest context, which has {longest} tokens",
                getattr(args, name),
            )


def method_budgets(args: argparse.Namespace) -> list[tuple[str, int | None]]:
    """What to run: dense and full, against which others are held, first."""
    # Full attention has no budget.
    dense = [name for name in teacher_forcing.FOLDERS if name in args.methods]
    pairs: list[tuple[str, int | None]] = [(name, None) for name in dense]
    for name in args.methods:
        if name not in dense:
            pairs += [(name, budget) for budget in sorted(args.token_budgets)]
    return pairs


def _check_settings(args: argparse.Namespace) -> None:
    """Raises ValueError for settings of clusterkv that an engine would refuse."""
    for name, budget in method_budgets(args):
        settings = SETTINGS.get(name) and method_settings(name, budget, args.settings)
        if settings:
            try:
                ClusterKVConfig.from_additional_config({"clusterkv": settings})
            except ValueError as error:
                raise ValueError(f"--settings for {name}: {error}") from error


def _require_dense(args: argparse.Namespace) -> None:
    """Raises ValueError where there is nothing to hold a method against."""
    for dense in teacher_forcing.FOLDERS:
        has_methods = dense in map(teacher_forcing.dense_of, args.methods)
        tasks = []
        if has_methods and "teacher_forcing" in args.tasks:
            tasks.append("teacher_forcing")
        if dense == "dense" and "long_generation" in args.tasks:
            tasks.append("long_generation")
        if tasks and dense not in args.methods:
            where = "" if dense == "dense" else " of methods on transformers"
            _reject(
                "--methods",
                f"with {dense} for {', '.join(tasks)}{where}",
                " ".join(args.methods),
            )


def _tasks(given: list[str]) -> list[str]:
    tasks: list[str] = []
    for name in given:
        if name not in TASKS and name not in GROUPS:
            _reject("--tasks", f"among {', '.join((*TASKS, *GROUPS))}", name)
        tasks += GROUPS.get(name, (name,))
    return list(dict.fromkeys(tasks))


def _reject(setting: str, expected: str, given: object) -> None:
    raise ValueError(f"{setting} must be {expected}, got {given!r}")
