# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_clusterkv project
"""Next-token fidelity by the decode path: forced text, and long generation.

``teacher_forcing``: behind a prompt of text, the text's next tokens are forced one a
step. ``long_generation``: dense attention goes on freely behind a long prompt; others
are forced along its tokens, and go on freely, too, to see where they first differ.

Both hold a method's next-token distributions against dense attention's of the same
positions (``fidelity_math.compare`` says what is computed). Every forced token but the
first is a decode step, whose attended tokens are recorded with it.

Each harness has a dense attention of its own, which rounds as the methods beside it do:
in vLLM ``dense``, on transformers ``full``. Only vLLM's methods generate freely here.
"""

import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.quality.fidelity_math import Scored, compare, first_difference
from benchmarks.quality.peers import Runner
from benchmarks.quality.samples import Prompter
from benchmarks.quality.texts import Texts
from benchmarks.quality.vllm_runner import SETTINGS, VllmRunner

TASKS = ("teacher_forcing", "long_generation")
FOLDERS = {"dense": "dense", "full": "dense-transformers"}
"""Where each dense attention's distributions are kept."""


@dataclass(frozen=True)
class ForcedSample:
    """A text that a model goes on with.

    Attributes:
        task: One of ``TASKS``.
        context_len: Tokens of prompt and continuation together.
        index: Of the sample.
        prompt: Token ids.
        forced: What goes on; None to take what dense attention generates.
        num_tokens: Of the continuation.
    """

    task: str
    context_len: int
    index: int
    prompt: list[int]
    forced: list[int] | None
    num_tokens: int


def dense_of(method: str) -> str:
    """The method that one is held against: dense attention of the same harness."""
    return "dense" if method in SETTINGS else "full"


def can_run(method: str, sample: ForcedSample) -> bool:
    """Whether a method takes a sample: one without tokens to force needs vLLM."""
    return method in SETTINGS or sample.forced is not None


def make_sample(
    task: str,
    prompter: Prompter,
    texts: Texts,
    context_len: int,
    num_tokens: int,
    index: int,
    seed: int = 0,
) -> ForcedSample:
    """A sample.

    Args:
        task: One of ``TASKS``.
        prompter: With the model's tokenizer.
        texts: The text.
        context_len: Tokens of prompt and continuation together.
        num_tokens: Decode steps that count. The continuation has one token more,
            whose distribution is prefill's.
        index: Samples of different indices begin elsewhere in the text.
        seed: Of all samples.
    """
    num_prompt = context_len - num_tokens - 1
    rng = random.Random(f"{seed}/{task}/{context_len}/{index}")
    start = rng.randrange(len(texts.pieces))
    ids: list[int] = []
    num_pieces = context_len
    while len(ids) < context_len:
        ids = prompter.tokenizer.encode("".join(texts.excerpt(start, num_pieces)))
        num_pieces *= 2
    prompt, rest = ids[:num_prompt], ids[num_prompt:context_len]
    forced = rest if task == "teacher_forcing" else None
    return ForcedSample(task, context_len, index, prompt, forced, num_tokens + 1)


def run(
    runner: Runner, sample: ForcedSample, references: Path
) -> tuple[dict[str, float], float | None]:
    """Runs a sample by a method.

    Args:
        runner: Dense attention first: it writes the reference.
        sample: What to run.
        references: Folder that has those of ``FOLDERS``.

    Returns:
        scores: By name.
        attended: Tokens that a decode step along the continuation attended to exactly,
            on average.

    Raises:
        ValueError: Dense attention has not run.
    """
    dense_name = dense_of(runner.name)
    stem = f"{sample.task}-{sample.context_len}-{sample.index}"
    reference = references / FOLDERS[dense_name] / f"{stem}.npz"
    if runner.name == dense_name:
        dense = _run_dense(runner, sample, reference)
        return {"nll": -float(dense.logprobs[1:].mean())}, runner.mean_attended
    if not reference.exists():
        raise ValueError(
            f"--methods must have {dense_name} where {sample.task} is run by "
            f"{runner.name}, which is held against it; {reference} is not there"
        )
    dense = load(reference)
    forced = dense.token_ids.tolist()
    if sample.forced is not None and forced != sample.forced:
        raise ValueError(
            f"{reference} must be of this text and model, but has other tokens; "
            "choose another --out"
        )
    generated = runner.score([sample.prompt], [forced])
    assert generated.scored is not None
    scores = compare(dense, generated.scored[0])
    del scores["nll_dense"]
    if sample.forced is None:
        assert isinstance(runner, VllmRunner)
        free = runner.continue_freely([sample.prompt], sample.num_tokens)
        scores["first_difference"] = first_difference(forced, free.token_ids[0])
    return scores, generated.attended


def _run_dense(runner: Runner, sample: ForcedSample, reference: Path) -> Scored:
    if sample.forced is None:
        assert isinstance(runner, VllmRunner)
        generated = runner.continue_freely([sample.prompt], sample.num_tokens)
    else:
        generated = runner.score([sample.prompt], [sample.forced])
    assert generated.scored is not None
    [dense] = generated.scored
    reference.parent.mkdir(parents=True, exist_ok=True)
    # Under another name first: a file of this name is whole.
    partial = reference.with_suffix(".partial.npz")
    np.savez_compressed(partial, **vars(dense))
    partial.replace(reference)
    return dense


def load(reference: Path) -> Scored:
    """Reads what dense attention wrote."""
    with np.load(reference) as arrays:
        return Scored(**arrays)
