# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_clusterkv project
"""Methods of others, on transformers, where ``hf_runner`` is there."""

from typing import Any, Protocol

from benchmarks.quality.engine_child import Generated


class Runner(Protocol):
    """What an evaluation needs of a method, in vLLM or on transformers."""

    name: str

    @property
    def mean_attended(self) -> float | None:
        """Tokens that a decode step of the last call attended to exactly."""

    def generate(self, prompts: list[list[int]], max_tokens: int) -> list[list[int]]:
        """Greedy answers to prompts of token ids."""

    def score(self, prompts: list[list[int]], forced: list[list[int]]) -> Generated:
        """Next-token distributions along given continuations, by the decode path."""


def load_hf_runner() -> Any:
    """The module ``benchmarks.quality.hf_runner``.

    Raises:
        ValueError: There is none, or it lacks what it imports.
    """
    try:
        from benchmarks.quality import hf_runner  # type: ignore[attr-defined]
    except ImportError as error:
        raise ValueError(
            "--methods other than dense, clusterkv and clusterkv-notail run by "
            f"benchmarks/quality/hf_runner.py, which could not be imported: {error}"
        ) from error
    return hf_runner


def check_methods(names: list[str]) -> None:
    """Raises ValueError for a name, or a setting behind it, that is not known."""
    if names:
        hf_runner = load_hf_runner()
        for name in names:
            if name.partition(":")[0] not in hf_runner.METHODS:
                known = ["dense", "clusterkv", "clusterkv-notail", *hf_runner.METHODS]
                raise ValueError(
                    f"--methods must be among {', '.join(known)}; got {name!r}"
                )
            hf_runner.make_method(name)


def make_runners(
    model: str,
    methods: list[tuple[str, int | None]],
    question_tokens: int,
    top_k: int,
    device: str,
) -> list[Runner]:
    """Runners that share one model, and the prefill of a prompt.

    Args:
        model: Folder.
        methods: Names, settings included, with token budgets; None for ``full``.
        question_tokens: Last tokens of each prompt that are decoded one by one, where
            answers are generated.
        top_k: Log-probabilities a token.
        device: "cpu" or "cuda".
    """
    hf_runner = load_hf_runner()
    import torch

    dtype = torch.bfloat16
    loaded = hf_runner.HFModel(model, device=device, dtype=dtype)
    return [
        hf_runner.HFRunner(
            loaded,
            hf_runner.make_method(name),
            budget or 0,
            name=name,
            num_decoded_prompt_tokens=question_tokens,
            top_k=top_k,
        )
        for name, budget in methods
    ]
