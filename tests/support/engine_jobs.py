# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_clusterkv project
"""Engines in processes of their own, and what they are asked to generate there.

An engine with CUDA graphs does not give all of its memory back before its process
ends. And engines that start side by side take as long as one.
"""

import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from tests.support.engine import (
    Generated,
    as_generated,
    attention_layers,
    clusterkv,
    engine,
    generate,
    poison,
    run_twins,
    run_with_follower,
    sampling,
)
from vllm_clusterkv.recall.worker import tier_of

GARBAGE = 1000.0
"""K and V where nothing was written: finite, and visible if attended to."""

CAPTURE_SIZES = [1, 2, 4, 8, 16, 32, 64]

GRAPHS = {"compilation_config": {"cudagraph_capture_sizes": CAPTURE_SIZES}}
"""As a server starts: compiled, FULL graphs for decode, PIECEWISE for the rest."""


def decode_graphs(*capture_sizes: int) -> dict:
    """FULL graphs, of a model that is not compiled, which saves the time for that."""
    return {
        "compilation_config": {
            "mode": 0,
            "cudagraph_mode": "FULL_DECODE_ONLY",
            "cudagraph_capture_sizes": list(capture_sizes),
        }
    }


EAGER = {"enforce_eager": True}

SMALL_ENGINE = {
    "dtype": "float16",
    "enforce_eager": False,
    "max_model_len": 4096,
    "max_num_seqs": CAPTURE_SIZES[-1],
    "enable_trace_replay": True,
    # A fixed size, since vLLM cannot measure beside other engines. The first is but
    # required to be free.
    "gpu_memory_utilization": 0.05,
    "kv_cache_memory_bytes": 3 << 30,
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
        tokens_a_step: At most, if less than the engine's ``max_num_batched_tokens``.
    """

    prompts: list[list[int]]
    max_tokens: int
    traces: list[list[int]] | None = None
    one_by_one: bool = False
    forget: bool = False
    tokens_a_step: int | None = None


@dataclass
class Outcome:
    """What an engine generated.

    Attributes:
        rounds: By name.
        full_replays: By name of a round, the rows of each FULL CUDA graph that was
            replayed, without padding, in order.
        num_preemptions: In ``run_with_few_pages``, of the crowd.
        num_released: In ``run_with_host_tier``, pages whose block was given away.
        num_lines: Likewise, lines found, recalled and left; and other counters.
        held: Likewise, what nobody held when all had ended: by kind.
    """

    rounds: dict[str, list[Generated]] = field(default_factory=dict)
    full_replays: dict[str, list[int]] = field(default_factory=dict)
    num_preemptions: int = 0
    num_released: int = 0
    num_lines: list[int] = field(default_factory=list)
    held: dict[str, int] = field(default_factory=dict)

    @contextmanager
    def record_replays(self, name: str) -> Iterator[None]:
        """Enters the replays of the block under a name."""
        start = len(_full_replays)
        yield
        self.full_replays[name] = _full_replays[start:]


class EngineProcess:
    """An engine that starts in a new process, and takes calls at once."""

    def __init__(self, model: str, **engine_args) -> None:
        self._pool = ProcessPoolExecutor(
            max_workers=1, mp_context=multiprocessing.get_context("spawn")
        )
        self._started = self._pool.submit(_start, model, engine_args)

    def submit(self, function: Callable, *args) -> Callable[[], Any]:
        """Calls a function there, with the ``LLM`` before its arguments.

        Returns:
            What waits for the function's result.
        """
        future = self._pool.submit(_call, function, args)

        def result() -> Any:
            self._started.result()  # Why it did not start, if it did not.
            return future.result()

        return result

    def __enter__(self) -> "EngineProcess":
        return self

    def __exit__(self, *exception) -> None:
        """Waits for what was submitted, and ends the process."""
        self._pool.submit(_stop)
        self._pool.shutdown()


# Of an engine's process.
_llm: Any = None
_open = ExitStack()
_full_replays: list[int] = []


def _start(model: str, engine_args: dict) -> None:
    global _llm
    _record_full_replays()
    _llm = _open.enter_context(engine(model, **engine_args))
    if engine_args.get("attention_backend") == "clusterkv":
        poison(_llm, rows=GARBAGE)


def _call(function: Callable, args: tuple) -> Any:
    return function(_llm, *args)


def _stop() -> None:
    _open.close()


def _record_full_replays() -> None:
    """Makes vLLM append the rows of each replay to ``_full_replays``."""
    from vllm.v1.worker.gpu.cudagraph_utils import ModelCudaGraphManager
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner

    prepare_inputs = GPUModelRunner.prepare_inputs
    run_fullgraph = ModelCudaGraphManager.run_fullgraph
    num_rows = 0

    def count_rows(self, *args, **kwargs):
        nonlocal num_rows
        batch = prepare_inputs(self, *args, **kwargs)
        num_rows = batch.num_reqs
        return batch

    def count_replay(self, *args, **kwargs):
        _full_replays.append(num_rows)
        return run_fullgraph(self, *args, **kwargs)

    GPUModelRunner.prepare_inputs = count_rows
    ModelCudaGraphManager.run_fullgraph = count_replay


def run_rounds(llm, rounds: dict[str, Round]) -> Outcome:
    """Runs rounds in their order."""
    outcome = Outcome()
    for name, step in rounds.items():
        with outcome.record_replays(name):
            outcome.rounds[name] = _run_round(llm, step)
    return outcome


def run_with_few_pages(llm, crowd: Round, page_end: Round) -> Outcome:
    """Runs a crowd, for which there are too few pages, and requests that share one.

    Args:
        llm: An engine.
        crowd: Runs first.
        page_end: One request, with its trace, for ``run_twins`` and
            ``run_with_follower``.
    """
    core = llm.llm_engine
    outcome = Outcome()
    with outcome.record_replays("crowd"):
        outcome.rounds["crowd"] = _run_round(llm, crowd)
    # Before the twins, which are preempted by force.
    outcome.num_preemptions = _num_preemptions(llm)
    [prompt], [trace] = page_end.prompts, page_end.traces
    with outcome.record_replays("twins"):
        outcome.rounds["twins"] = run_twins(core, prompt, trace)
    assert llm.reset_prefix_cache()
    with outcome.record_replays("follower"):
        outcome.rounds["follower"] = run_with_follower(core, prompt, trace, forced=True)
    return outcome


def run_with_host_tier(llm, moving: Round) -> Outcome:
    """Runs requests whose pages move to the host, twice: the second hits prefixes."""
    outcome = Outcome()
    for name in ("moving", "moving again"):
        with outcome.record_replays(name):
            outcome.rounds[name] = _run_round(llm, moving)
    for _ in range(3):
        llm.llm_engine.step()
    scheduler = _scheduler(llm)
    counts = scheduler.connector._decisions.books.counts()
    pool = scheduler.kv_cache_manager.block_pool
    outcome.num_released = counts.total_released
    tier = tier_of(next(iter(attention_layers(llm))))
    assert tier is not None
    outcome.num_lines = tier.counters().tolist()
    outcome.held = {
        "slots": counts.num_slots,
        "transfers": counts.num_copying,
        "host pages": scheduler.connector._num_host_pages - counts.num_free_host_pages,
        "blocks": pool.num_gpu_blocks - 1 - pool.get_num_free_blocks(),
    }
    return outcome


def run_without_page(llm, step: Round, page: int) -> list[Generated]:
    """Runs a round whose rows lose a page once all of them have generated a token.

    Its K and V become zeros: next to keys that attract, as good as left out.

    Args:
        llm: An engine of this backend, with synchronous scheduling.
        step: Of which the prompts run together.
        page: The position of the page in each row.
    """
    core = llm.llm_engine
    for index, (prompt, trace) in enumerate(
        zip(step.prompts, step.traces, strict=True)
    ):
        core.add_request(
            str(index),
            {"prompt_token_ids": prompt},
            sampling(step.max_tokens, trace),
        )
    finished, begun, lost = {}, set(), False
    while core.has_unfinished_requests():
        for output in core.step():
            begun.add(output.request_id)
            if output.finished:
                finished[output.request_id] = as_generated(output)
        if not lost and len(begun) == len(step.prompts):
            lost = True
            scheduler = _scheduler(llm)
            for request in scheduler.running:
                [blocks] = scheduler.kv_cache_manager.get_block_ids(request.request_id)
                for layer in attention_layers(llm).values():
                    layer.kv_cache[blocks[page]] = 0
    assert lost
    return [finished[str(index)] for index in range(len(step.prompts))]


def draw_weights(llm) -> None:
    """Gives a model without weights some.

    vLLM's dummy weights are so small that attention makes no difference. These are
    drawn as at the start of a training, but for sharper attention: a few of many
    thousand keys carry most of it.
    """
    llm.apply_model(_draw_weights)


def _draw_weights(model: torch.nn.Module) -> None:
    for index, (name, parameter) in enumerate(sorted(model.named_parameters())):
        if "norm" in name:
            parameter.data.fill_(1)
        else:
            generator = torch.Generator(parameter.device).manual_seed(index)
            std = 0.03 if "qkv" in name else 0.02
            parameter.data.normal_(std=std, generator=generator)


def _run_round(llm, step: Round) -> list[Generated]:
    if step.forget:
        assert llm.reset_prefix_cache()
    scheduler = _scheduler(llm)
    usual = scheduler.max_num_scheduled_tokens
    scheduler.max_num_scheduled_tokens = step.tokens_a_step or usual
    try:
        if not step.one_by_one:
            return generate(llm, step.prompts, step.max_tokens, step.traces)
        traces = step.traces or [None] * len(step.prompts)
        return [
            generate(llm, [prompt], step.max_tokens, trace and [trace])[0]
            for prompt, trace in zip(step.prompts, traces, strict=True)
        ]
    finally:
        scheduler.max_num_scheduled_tokens = usual


def _scheduler(llm):
    return llm.llm_engine.engine_core.engine_core.scheduler


def _num_preemptions(llm) -> int:
    values = {m.name: getattr(m, "value", None) for m in llm.get_metrics()}
    return int(values["vllm:num_preemptions"])
