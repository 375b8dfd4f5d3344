# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_clusterkv project
"""vLLM engines inside the test process, one after the other."""

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

NUM_TOKENS = 20
"""Tokens that the equality tests generate."""

LOGPROB_TOLERANCE = 1e-3
"""Nats between backends in fp32, which differ by 1e-5 in practice."""


@dataclass
class Generated:
    """A request's greedy continuation."""

    token_ids: list[int]
    logprobs: list[float]  # of the generated tokens
    num_cached_tokens: int
    text: str


@contextmanager
def engine(model: str, **kwargs) -> Iterator:
    """An ``LLM`` whose scheduler, worker and layers live in this process."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    llm = LLM(
        model,
        **{
            "max_model_len": 4096,
            "dtype": "float32",
            "enforce_eager": True,
            "disable_log_stats": False,
            **kwargs,
        },
    )
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()
        cleanup_dist_env_and_memory()
        os.environ.pop("VLLM_ENABLE_V1_MULTIPROCESSING", None)


def clusterkv(**settings) -> dict:
    """Engine arguments that select the backend."""
    return {
        "attention_backend": "clusterkv",
        "additional_config": {"clusterkv": settings},
    }


def poison(llm, rows: float = float("nan")) -> None:
    """Fills the KV cache, index and padding included, with NaN (and ends of -1).

    Args:
        llm: An in-process engine.
        rows: Fills K and V instead. FlashAttention multiplies by zero what it masks,
            so there it must be finite.
    """
    caches = [layer.kv_cache for layer in attention_layers(llm).values()]
    for cache in caches:
        everything = torch.empty(0, dtype=torch.uint8, device=cache.device)
        everything.set_(cache.untyped_storage()).fill_(0xFF)
    for cache in caches:
        assert cache.isnan().all()
        cache.fill_(rows)


def sampling(max_tokens: int, trace: list[int] | None = None):
    """Greedy sampling of exactly ``max_tokens`` tokens.

    Args:
        max_tokens: Tokens.
        trace: The tokens to go on with, whatever is likeliest. The log-probabilities
            remain the model's. Needs an engine with ``enable_trace_replay``.
    """
    from vllm import SamplingParams

    forced = {} if trace is None else {"trace_decode_token_ids": trace}
    return SamplingParams(
        max_tokens=max_tokens, temperature=0, logprobs=0, ignore_eos=True, **forced
    )


def as_generated(output) -> Generated:
    """Of vLLM's ``RequestOutput``."""
    completion = output.outputs[0]
    token_ids = list(completion.token_ids)
    logprobs = [
        step[token].logprob
        for step, token in zip(completion.logprobs, token_ids, strict=True)
    ]
    return Generated(
        token_ids, logprobs, output.num_cached_tokens or 0, completion.text
    )


def generate(
    llm,
    prompts: list[list[int]],
    max_tokens: int,
    traces: list[list[int]] | None = None,
) -> list[Generated]:
    """Greedy continuations of prompts of token ids, or ``traces`` as ``sampling``."""
    outputs = llm.generate(
        [{"prompt_token_ids": prompt} for prompt in prompts],
        [sampling(max_tokens, trace) for trace in traces or [None] * len(prompts)],
        use_tqdm=False,
    )
    return [as_generated(output) for output in outputs]


def run_twins(core, prompt: list[int], trace: list[int] | None = None):
    """Answers of two equal requests, preempted when 257 tokens are known.

    Resumed in one step, the first computes its page again; the second hits it in the
    prefix cache at once and has one token left.

    Args:
        core: vLLM's ``LLMEngine``.
        prompt: Less than 257 tokens.
        trace: As ``sampling``.
    """
    for name in "AB":
        core.add_request(name, {"prompt_token_ids": prompt}, sampling(40, trace))
    finished, known, preempted = {}, {}, False
    while core.has_unfinished_requests():
        for output in core.step():
            num_generated = len(output.outputs[0].token_ids)
            known[output.request_id] = len(prompt) + num_generated
            if output.finished:
                finished[output.request_id] = as_generated(output)
        if not preempted and set(known.values()) == {257}:
            preempted = True
            assert core.reset_prefix_cache(reset_running_requests=True)
    assert preempted
    return [finished["A"], finished["B"]]


def run_with_follower(
    core, prompt: list[int], continuation: list[int], forced: bool = False
) -> list[Generated]:
    """Answers of a request, and of one that shares a page in the step that fills it.

    Before the step that computes the 256th token of the first, the second is added:
    its prompt is those 256 tokens and one more. Scheduled behind the first, it hits
    the page in the prefix cache and has one token left: both are rows of one token.

    Args:
        core: vLLM's ``LLMEngine``, with synchronous scheduling.
        prompt: Of the first; less than 256 tokens.
        continuation: What the first generates.
        forced: Whether both are made to go on with it, as ``sampling`` says.
    """
    tokens = prompt + continuation
    prompts = {"A": prompt, "B": tokens[:257]}

    def add(name: str) -> None:
        rest = tokens[len(prompts[name]) :]
        core.add_request(
            name,
            {"prompt_token_ids": prompts[name]},
            sampling(len(rest), rest if forced else None),
        )

    add("A")
    finished = {}
    while core.has_unfinished_requests():
        for output in core.step():
            num_known = len(prompt) + len(output.outputs[0].token_ids)
            if output.request_id == "A" and num_known == 256:
                add("B")
            if output.finished:
                finished[output.request_id] = as_generated(output)
    return [finished["A"], finished["B"]]


def attention_layers(llm) -> dict:
    """The attention layers of an in-process engine, by name."""
    context = llm.llm_engine.vllm_config.compilation_config.static_forward_context
    return {name: layer for name, layer in context.items() if hasattr(layer, "impl")}


def assert_equal(actual: list[Generated], expected: list[Generated]) -> None:
    """Equal tokens, and log-probabilities within ``LOGPROB_TOLERANCE``."""
    assert [a.token_ids for a in actual] == [e.token_ids for e in expected]
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(
            torch.tensor(a.logprobs),
            torch.tensor(e.logprobs),
            atol=LOGPROB_TOLERANCE,
            rtol=0,
        )
