# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_clusterkv project
"""What runs in an engine's process: one vLLM engine, and calls to it."""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.quality.fidelity_math import Scored

_ENV = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # steps and statistics in one process
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    # collective_rpc of a function, within this machine.
    "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",
}


@dataclass(frozen=True)
class EngineSpec:
    """How to start an engine.

    Attributes:
        model: Folder.
        settings: Of clusterkv; None for vLLM's own dense backend.
        dense_backend: Its name; None for FLASH_ATTN on GPUs, CPU_ATTN on CPUs.
        max_model_len: Tokens of prompt and answer, at most.
        top_k: Log-probabilities a token, at most.
        stats_path: For the attended tokens of each step.
        args: More for ``LLM``.
    """

    model: str
    settings: dict[str, Any] | None
    dense_backend: str | None
    max_model_len: int
    top_k: int
    stats_path: str
    args: dict[str, Any]


@dataclass(frozen=True)
class Generated:
    """What an engine generated.

    Attributes:
        token_ids: Of each request.
        attended: Tokens attended to exactly, mean over requests, decode steps, layers
            and KV heads; None where it is not known.
        scored: Of each request, if asked for.
    """

    token_ids: list[list[int]]
    attended: float | None
    scored: list[Scored] | None = None


class _State:
    llm: Any = None
    is_cuda = False
    is_dense = False
    stats: Any = None


def start(spec: EngineSpec, log: str) -> dict:
    """Starts the engine in this process.

    Args:
        spec: Of the engine.
        log: File that takes what is printed.

    Returns:
        What the engine made of its arguments.
    """
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.environ.update(_ENV)
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")  # GiB
    # Read when torch is loaded. Threads that spin starve each other on shared cores.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    from vllm import LLM
    from vllm.platforms import current_platform

    from benchmarks.quality import forcing

    is_cuda = current_platform.is_cuda()
    args = {
        "model": spec.model,
        "generation_config": "vllm",
        "max_model_len": spec.max_model_len,
        "max_logprobs": spec.top_k,
        # No sample may depend on those before it.
        "enable_prefix_caching": False,
        # Attended tokens are counted on the host, which a CUDA graph has no room for.
        "enforce_eager": True,
        # vLLM's 1,024 on large GPUs is more than there is scratch for at 32k tokens
        # with clusters of 8.
        "max_num_seqs": 128,
        **forcing.engine_args(is_cuda),
        **spec.args,
    }
    if spec.settings is None:
        usual = "FLASH_ATTN" if is_cuda else "CPU_ATTN"
        args["attention_backend"] = spec.dense_backend or usual
    else:
        settings = dict(spec.settings)
        if args["enforce_eager"]:
            settings["stats_path"] = spec.stats_path
        args["attention_backend"] = "clusterkv"
        args["additional_config"] = {"clusterkv": settings}
    if is_cuda:
        forcing.let_traces_end()
    _State.is_cuda = is_cuda
    _State.is_dense = spec.settings is None
    _State.llm = LLM(**args)
    if spec.settings is not None and args["enforce_eager"]:
        _State.stats = Path(spec.stats_path).open()  # noqa: SIM115
    from engine import worker_facts

    return {
        **_State.llm.collective_rpc(worker_facts)[0],
        "dtype": str(_State.llm.llm_engine.model_config.dtype),
        "max_model_len": spec.max_model_len,
        "enforce_eager": args["enforce_eager"],
    }


def generate(
    prompts: list[list[int]],
    max_tokens: int,
    forced: list[list[int]] | None = None,
    top_k: int | None = None,
    stop: bool = True,
) -> Generated:
    """Greedy continuations.

    Args:
        prompts: Token ids of each.
        max_tokens: To generate for each, forced ones included.
        forced: Of each, the tokens that its continuation begins with.
        top_k: Likeliest tokens to give for each step; None to give none.
        stop: Whether a request ends with the model's end-of-text token. Those forced
            do not end it.
    """
    from benchmarks.quality.forcing import forced_params

    per_request = forced or [[] for _ in prompts]
    params = [
        forced_params(
            _State.is_cuda,
            tokens,
            max_tokens=max_tokens,
            logprobs=top_k,
            detokenize=False,
            stop_token_ids=_end_tokens() if stop and not tokens else None,
        )
        for tokens in per_request
    ]
    _read_stats()
    outputs = _State.llm.generate(
        [{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False
    )
    results = [output.outputs[0] for output in outputs]
    token_ids = [list(result.token_ids) for result in results]
    scored = None
    if top_k is not None:
        scored = [_as_scored(result, top_k) for result in results]
    if stop:
        token_ids = [
            _cut(tokens, len(begin))
            for tokens, begin in zip(token_ids, per_request, strict=True)
        ]
    return Generated(token_ids, _mean_attended(prompts, token_ids), scored)


def stop_engine() -> None:
    """Ends the engine."""
    _State.llm.llm_engine.engine_core.shutdown()


def _end_tokens() -> list[int]:
    """The model's end-of-text tokens, by its generation config and tokenizer."""
    config = _State.llm.llm_engine.model_config.try_get_generation_config()
    found = config.get("eos_token_id", [])
    ends = set(found if isinstance(found, list) else [found])
    ends.add(_State.llm.get_tokenizer().eos_token_id)
    return sorted(ends - {None})


def _cut(tokens: list[int], start: int) -> list[int]:
    """The tokens before an end-of-text token at or behind ``start``."""
    ends = set(_end_tokens())
    for i in range(start, len(tokens)):
        if tokens[i] in ends:
            return tokens[:i]
    return tokens


def _as_scored(result, top_k: int) -> Scored:
    token_ids = np.array(result.token_ids, np.int32)
    steps = len(token_ids)
    logprobs = np.zeros(steps, np.float32)
    top_ids = np.zeros((steps, top_k), np.int32)
    top_logprobs = np.zeros((steps, top_k), np.float32)
    for i, step in enumerate(result.logprobs):
        logprobs[i] = step[int(token_ids[i])].logprob
        # The forced token comes on top of the likeliest.
        best = sorted(step.items(), key=lambda item: item[1].rank)[:top_k]
        top_ids[i] = [token for token, _ in best]
        top_logprobs[i] = [found.logprob for _, found in best]
    return Scored(token_ids, logprobs, top_ids, top_logprobs)


def _read_stats() -> list[dict]:
    """What the backend wrote since the last call."""
    if _State.stats is None:
        return []
    return [json.loads(line) for line in _State.stats.read().splitlines()]


def _mean_attended(
    prompts: list[list[int]], token_ids: list[list[int]]
) -> float | None:
    if _State.is_dense:
        # Step i attends to the prompt and i tokens; the first is prefill's.
        steps = [
            len(prompt) + i
            for prompt, tokens in zip(prompts, token_ids, strict=True)
            for i in range(1, len(tokens))
        ]
    else:
        steps = [value for line in _read_stats() for value in line["attended"]]
    return sum(steps) / len(steps) if steps else None
