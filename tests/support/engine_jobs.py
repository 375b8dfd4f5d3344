# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_clusterkv project
"""Whole runs of an engine, each in a process of its own.

An engine with CUDA graphs does not give all of its memory back before its process ends.
"""

import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch

from tests.support.engine import (
    Generated,
    clusterkv,
    engine,
    generate,
    poison,
    run_twins,
)

GARBAGE = 1000.0
"""K and V where nothing was written: finite, and visible if attended to."""

CAPTURE_SIZES = [1, 2, 4, 8, 16, 32, 64]

GRAPHS = {"compilation_config": {"cudagraph_capture_sizes": CAPTURE_SIZES}}
"""As a server starts: compiled, FULL graphs for decode, PIECEWISE for the rest."""

DECODE_GRAPHS = {
    "compilation_config": {
        "mode": 0,  # not compiled, which saves the time to compile
        "cudagraph_mode": "FULL_DECODE_ONLY",
        "cudagraph_capture_sizes": CAPTURE_SIZES,
    }
}

EAGER = {"enforce_eager": True}

SMALL_ENGINE = {
    "dtype": "float16",
    "enforce_eager": False,
    "max_model_len": 4096,
    "max_num_seqs": CAPTURE_SIZES[-1],
    "gpu_memory_utilization": 0.25,
    "enable_trace_replay": True,
}

CHUNK = {"max_num_batched_tokens": 600}
"""Chunks that end inside pages."""

COVERING = CHUNK | clusterkv(token_budget=4096, min_sparse_len=0)
"""Every row selects, and attends to all of its tokens."""

SMALL_BUDGET = CHUNK | clusterkv(token_budget=128, min_sparse_len=0)


@dataclass
class Round:
    """Prompts that run together, or one after another.

    Attributes:
        prompts: Of token ids.
        max_tokens: To generate for each.
        traces: Tokens to go on with, as ``engine.sampling`` says.
        one_by_one: Whether each prompt is a batch of its own.
        forget: Whether the prefix cache is emptied before.
    """

    prompts: list[list[int]]
    max_tokens: int
    traces: list[list[int]] | None = None
    one_by_one: bool = False
    forget: bool = False


@dataclass
class Outcome:
    """What an engine generated."""

    rounds: dict[str, list[Generated]] = field(default_factory=dict)
    twins: list[Generated] = field(default_factory=list)
    num_preemptions: int = 0


def in_own_process(function: Callable, *args, **kwargs) -> Any:
    """The result of a function, called in a new process that ends with it."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=1, mp_context=spawn) as pool:
        return pool.submit(function, *args, **kwargs).result()


def run_rounds(
    model: str,
    rounds: dict[str, Round],
    *,
    twins: tuple[list[int], list[int] | None] | None = None,
    **engine_args,
) -> Outcome:
    """Runs rounds on one engine, whose cache has garbage where nothing was written.

    Args:
        model: Folder.
        rounds: By name, in their order.
        twins: Prompt and trace of ``engine.run_twins``, which run last.
        **engine_args: Of the engine, on top of ``SMALL_ENGINE``.
    """
    outcome = Outcome()
    with engine(model, **{**SMALL_ENGINE, **engine_args}) as llm:
        if engine_args.get("attention_backend") == "clusterkv":
            poison(llm, rows=GARBAGE)
        for name, step in rounds.items():
            if step.forget:
                assert llm.reset_prefix_cache()
            outcome.rounds[name] = _run_round(llm, step)
        if twins is not None:
            outcome.twins = run_twins(llm.llm_engine, *twins)
        metrics = {m.name: getattr(m, "value", None) for m in llm.get_metrics()}
        outcome.num_preemptions = int(metrics["vllm:num_preemptions"])
    return outcome


def _run_round(llm, step: Round) -> list[Generated]:
    if not step.one_by_one:
        return generate(llm, step.prompts, step.max_tokens, step.traces)
    traces = step.traces or [None] * len(step.prompts)
    return [
        generate(llm, [prompt], step.max_tokens, trace and [trace])[0]
        for prompt, trace in zip(step.prompts, traces, strict=True)
    ]


def run_random_weights(
    model: str,
    prompts: list[list[int]],
    max_tokens: int,
    traces: list[list[int]] | None = None,
    **engine_args,
) -> list[Generated]:
    """Generates with a model that has a config but no weights.

    vLLM's dummy weights are so small that attention makes no difference. These are
    drawn as at the start of a training, but for sharper attention: a few of many
    thousand keys carry most of it.
    """
    with engine(
        model,
        load_format="dummy",
        skip_tokenizer_init=True,
        enable_trace_replay=True,
        **engine_args,
    ) as llm:
        llm.apply_model(_draw_weights)
        return generate(llm, prompts, max_tokens, traces)


def _draw_weights(model: torch.nn.Module) -> None:
    for index, (name, parameter) in enumerate(sorted(model.named_parameters())):
        if "norm" in name:
            parameter.data.fill_(1)
        else:
            generator = torch.Generator(parameter.device).manual_seed(index)
            std = 0.03 if "qkv" in name else 0.02
            parameter.data.normal_(std=std, generator=generator)
