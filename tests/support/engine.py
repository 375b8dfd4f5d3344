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


def poison(llm) -> None:
    """Fills the KV cache, index and padding included, with NaN (and ends of -1)."""
    for layer in attention_layers(llm).values():
        storage = layer.kv_cache.untyped_storage()
        torch.empty(0, dtype=torch.uint8).set_(storage).fill_(0xFF)
        assert layer.kv_cache.isnan().all()


def sampling(max_tokens: int):
    """Greedy sampling of exactly ``max_tokens`` tokens."""
    from vllm import SamplingParams

    return SamplingParams(
        max_tokens=max_tokens, temperature=0, logprobs=0, ignore_eos=True
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


def generate(llm, prompts: list[list[int]], max_tokens: int) -> list[Generated]:
    """Greedy continuations of prompts of token ids."""
    outputs = llm.generate(
        [{"prompt_token_ids": prompt} for prompt in prompts],
        sampling(max_tokens),
        use_tqdm=False,
    )
    return [as_generated(output) for output in outputs]


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
