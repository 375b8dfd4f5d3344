# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_clusterkv project
"""Methods that run in a real vLLM: dense attention, and this plugin's."""

import contextlib
import multiprocessing
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.quality import engine_child
from benchmarks.quality.engine_child import EngineSpec, Generated

# Settings of clusterkv by method; None is vLLM's own backend. Every row selects,
# however short, or short contexts would show nothing but dense attention.
SETTINGS: dict[str, dict[str, Any] | None] = {
    "dense": None,
    "clusterkv": {"tail_estimate": True, "min_sparse_len": 0},
    "clusterkv-notail": {"tail_estimate": False, "min_sparse_len": 0},
}


def method_settings(
    name: str, token_budget: int | None, more: dict[str, Any]
) -> dict[str, Any] | None:
    """The plugin's settings of a method; None without the plugin.

    Args:
        name: A key of ``SETTINGS``.
        token_budget: Of clusterkv.
        more: ``EngineOptions.settings``.
    """
    settings = SETTINGS[name]
    if settings is None:
        return None
    return settings | {"token_budget": token_budget} | more


@dataclass(frozen=True)
class EngineOptions:
    """What all engines of an evaluation have in common.

    Attributes:
        model: Folder.
        max_model_len: Tokens of prompt and answer, at most.
        log_dir: For the engines' logs and statistics.
        top_k: Log-probabilities a token.
        question_tokens: Last tokens of each prompt that are not prefilled but decoded
            one by one, so that sparse attention reads the question, as in ClusterKV's
            and Quest's evaluations.
        dense_backend: For ``dense``; None for the platform's.
        settings: More settings of clusterkv.
        engine_args: More arguments of ``LLM``, for all methods.
        timeout: Seconds a call.
    """

    model: str
    max_model_len: int
    log_dir: Path
    top_k: int = 100
    question_tokens: int = 0
    dense_backend: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    engine_args: dict[str, Any] = field(default_factory=dict)
    timeout: float = 3600


class VllmRunner:
    """An engine in a process of its own, greedy.

    Attributes:
        name: Of the method.
        facts: What the engine made of its arguments.
        mean_attended: Tokens attended to exactly in the last call, mean over its
            requests, decode steps, layers and KV heads; None if not known.
    """

    def __init__(
        self, name: str, token_budget: int | None, options: EngineOptions
    ) -> None:
        """Starts the engine.

        Args:
            name: A key of ``SETTINGS``.
            token_budget: Of clusterkv; None for ``dense``.
            options: Of all engines.

        Raises:
            RuntimeError: It did not start; the text has the end of its log.
        """
        self.name = name
        self.mean_attended: float | None = None
        self._options = options
        stem = name if token_budget is None else f"{name}-{token_budget}"
        options.log_dir.mkdir(parents=True, exist_ok=True)
        self._log = options.log_dir / f"{stem}.log"
        self._log.write_text("")
        stats = options.log_dir / f"{stem}.stats.jsonl"
        stats.write_text("")
        spec = EngineSpec(
            options.model,
            method_settings(name, token_budget, options.settings),
            options.dense_backend,
            options.max_model_len,
            options.top_k,
            str(stats),
            options.engine_args,
        )
        self._pool = ProcessPoolExecutor(
            max_workers=1, mp_context=multiprocessing.get_context("spawn")
        )
        begin = time.perf_counter()
        self.facts = self._call(engine_child.start, spec, str(self._log))
        self.facts["start_s"] = round(time.perf_counter() - begin, 1)

    def generate(self, prompts: list[list[int]], max_tokens: int) -> list[list[int]]:
        """Greedy answers, up to the model's end-of-text token.

        Args:
            prompts: Token ids of each.
            max_tokens: Of an answer.
        """
        kept = self._options.question_tokens
        if not kept:
            generated = self._generate(prompts, max_tokens)
            return generated.token_ids
        # At least one token is prefilled.
        kept = min(kept, *(len(prompt) - 1 for prompt in prompts))
        generated = self._generate(
            [prompt[:-kept] for prompt in prompts],
            kept + max_tokens,
            [prompt[-kept:] for prompt in prompts],
        )
        return [tokens[kept:] for tokens in generated.token_ids]

    def score(self, prompts: list[list[int]], forced: list[list[int]]) -> Generated:
        """Next-token distributions along given continuations, by the decode path.

        Args:
            prompts: Token ids of each.
            forced: The continuation of each, all of one length.
        """
        return self._generate(
            prompts, len(forced[0]), forced, self._options.top_k, stop=False
        )

    def continue_freely(self, prompts: list[list[int]], num_tokens: int) -> Generated:
        """Greedy continuations of a number of tokens, with their distributions.

        Args:
            prompts: Token ids of each.
            num_tokens: To generate, past end-of-text tokens.
        """
        return self._generate(
            prompts, num_tokens, None, self._options.top_k, stop=False
        )

    def close(self) -> None:
        """Ends the engine and its process, and waits for the GPU's memory."""
        # It is ended, whatever its last words were.
        with contextlib.suppress(RuntimeError):
            self._call(engine_child.stop_engine)
        self._pool.shutdown()
        if "CPU" not in self.facts["backend"]:
            from engine import wait_for_memory

            wait_for_memory()

    def _generate(self, *args, **kwargs) -> Generated:
        generated = self._call(engine_child.generate, *args, **kwargs)
        self.mean_attended = generated.attended
        return generated

    def _call(self, function: Callable, *args, **kwargs) -> Any:
        try:
            future = self._pool.submit(function, *args, **kwargs)
            return future.result(self._options.timeout)
        except Exception as error:
            self.kill()
            tail = "\n".join(self._log.read_text(errors="replace").splitlines()[-30:])
            what = (
                f"took more than {self._options.timeout:.0f} s (--timeout)"
                if isinstance(error, TimeoutError)
                else "ended"
                if isinstance(error, BrokenProcessPool)
                else f"failed: {type(error).__name__}: {error}"
            )
            raise RuntimeError(
                f"the engine of {self.name} {what}; its log, {self._log}, "
                f"ends with\n{tail}"
            ) from error

    def kill(self) -> None:
        """Ends the process at once."""
        for process in list((self._pool._processes or {}).values()):
            process.kill()
        self._pool.shutdown(wait=False, cancel_futures=True)
