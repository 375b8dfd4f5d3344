# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_clusterkv project
"""Samples through methods, into results."""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.quality import longbench, needle_grid, peers, ruler, teacher_forcing
from benchmarks.quality.plan import method_budgets
from benchmarks.quality.results import Results, key_of
from benchmarks.quality.samples import Prompter, Sample
from benchmarks.quality.scoring import METRICS
from benchmarks.quality.teacher_forcing import ForcedSample
from benchmarks.quality.texts import Texts
from benchmarks.quality.vllm_runner import SETTINGS, EngineOptions, VllmRunner


def make_samples(
    args: argparse.Namespace, prompter: Prompter, texts: Texts
) -> list[Sample | ForcedSample]:
    """All samples that the command line asks for."""
    samples: list[Sample | ForcedSample] = []
    for context_len in args.context_lens:
        for task in args.tasks:
            if task in ruler.TASKS:
                samples += [
                    ruler.make_sample(
                        task,
                        prompter,
                        texts,
                        context_len,
                        index,
                        args.seed,
                        args.max_answer_tokens,
                    )
                    for index in range(args.samples)
                ]
            elif task == needle_grid.TASK:
                samples += needle_grid.make_samples(
                    prompter,
                    texts,
                    context_len,
                    args.depths,
                    args.needle_samples,
                    args.seed,
                    args.max_answer_tokens,
                )
            else:
                steps = args.forced_tokens
                if task == "long_generation":
                    steps = args.long_tokens
                if context_len < 2 * steps:
                    print(f"{task}: context {context_len} left out, has < 2 x {steps}")
                    continue
                samples += [
                    teacher_forcing.make_sample(
                        task, prompter, texts, context_len, steps, index, args.seed
                    )
                    for index in range(args.forced_samples)
                ]
    if args.longbench:
        samples += longbench.make_samples(
            args.longbench,
            prompter,
            max(args.context_lens),
            args.samples,
            args.max_answer_tokens,
        )
    return samples


class Evaluation:
    """Samples that go through methods.

    Attributes:
        facts: What each engine made of its arguments, by method and budget.
    """

    def __init__(
        self,
        args: argparse.Namespace,
        samples: Sequence[Sample | ForcedSample],
        prompter: Prompter,
        results: Results,
        progress: Any,
    ) -> None:
        """Takes what is to be run.

        Args:
            args: The command line's, complete.
            samples: Of all tasks.
            prompter: Turns answers into text.
            results: What is there already is left out.
            progress: A tqdm bar.
        """
        self.facts: dict[str, dict] = {}
        self._args, self._samples = args, samples
        self._prompter, self._results, self._progress = prompter, results, progress

    def run(self) -> None:
        """Runs everything that has no result yet, an engine after another."""
        pairs = method_budgets(self._args)
        for name, budget in pairs:
            if name in SETTINGS:
                self._run_vllm(name, budget)
        others = [pair for pair in pairs if pair[0] not in SETTINGS]
        if others:
            self._run_peers(others)

    def count(self) -> int:
        """Results still to come."""
        return sum(
            len(self._missing(name, budget))
            for name, budget in method_budgets(self._args)
        )

    def _run_vllm(self, name: str, budget: int | None) -> None:
        missing = self._missing(name, budget)
        if not missing:
            return
        args = self._args
        options = EngineOptions(
            args.model,
            _max_len(self._samples),
            args.out / "engines",
            args.top_k,
            args.question_tokens,
            args.dense_backend,
            args.settings,
            args.engine_args,
            args.timeout,
        )
        label = _label(name, budget)
        self._progress.set_description(f"{label}: starting")
        runner = VllmRunner(name, budget, options)
        self.facts[label] = runner.facts
        try:
            for batch in _batches(missing, args.batch_size):
                self._progress.set_description(f"{label}: {batch[0].task}")
                if isinstance(batch[0], ForcedSample):
                    self._force(runner, batch[0], budget)
                else:
                    self._answer(runner, name, batch, budget)
        except BaseException:
            runner.kill()
            raise
        runner.close()

    def _run_peers(self, pairs: list[tuple[str, int | None]]) -> None:
        wanted = [(pair, self._missing(*pair)) for pair in pairs]
        wanted = [(pair, missing) for pair, missing in wanted if missing]
        if not wanted:
            return
        import torch

        device = "cuda" if torch.cuda.is_available() else "cpu"
        args = self._args
        runners = peers.make_runners(
            args.model,
            [pair for pair, _ in wanted],
            args.question_tokens,
            args.top_k,
            device,
        )
        keys = [{_where(s) for s in missing} for _, missing in wanted]
        # Runners share a prompt's prefill, so prompts are the outer loop. The first is
        # dense attention, against which the others are held.
        for sample in self._samples:
            for ((name, budget), _), runner, missing in zip(
                wanted, runners, keys, strict=True
            ):
                if _where(sample) not in missing:
                    continue
                self._progress.set_description(f"{_label(name, budget)}: {sample.task}")
                if isinstance(sample, ForcedSample):
                    self._force(runner, sample, budget)
                else:
                    self._answer(runner, name, [sample], budget)

    def _missing(self, name: str, budget: int | None) -> list[Sample | ForcedSample]:
        """Samples without a result, of those that the method can run."""
        return [
            s
            for s in self._samples
            if (isinstance(s, Sample) or teacher_forcing.can_run(name, s))
            and key_of(s.task, s.context_len, s.index, name, budget)
            not in self._results
        ]

    def _answer(
        self,
        runner: peers.Runner,
        name: str,
        batch: Sequence[Sample | ForcedSample],
        budget: int | None,
    ) -> None:
        samples = [sample for sample in batch if isinstance(sample, Sample)]
        start = time.perf_counter()
        answers = runner.generate([s.prompt for s in samples], samples[0].max_tokens)
        seconds = (time.perf_counter() - start) / len(samples)
        for sample, answer in zip(samples, answers, strict=True):
            prediction = self._prompter.decode(answer)
            score = METRICS[sample.metric](prediction, sample.answers)
            self._add(
                sample,
                name,
                budget,
                scores={"score": score},
                attended=runner.mean_attended,
                seconds=seconds,
                answers=sample.answers,
                prediction=prediction,
                labels=sample.labels,
            )

    def _force(
        self, runner: peers.Runner, sample: ForcedSample, budget: int | None
    ) -> None:
        start = time.perf_counter()
        scores, attended = teacher_forcing.run(runner, sample, Path(self._args.out))
        self._add(
            sample,
            runner.name,
            budget,
            scores=scores,
            attended=attended,
            seconds=time.perf_counter() - start,
            steps=sample.num_tokens - 1,
        )

    def _add(
        self,
        sample: Sample | ForcedSample,
        method: str,
        budget: int | None,
        seconds: float,
        **found: Any,
    ) -> None:
        self._results.add(
            {
                "key": key_of(
                    sample.task, sample.context_len, sample.index, method, budget
                ),
                "task": sample.task,
                "context_len": sample.context_len,
                "index": sample.index,
                "method": method,
                "token_budget": budget,
                "prompt_tokens": len(sample.prompt),
                "seconds": round(seconds, 2),
                **found,
            }
        )
        self._progress.update()


def _label(name: str, budget: int | None) -> str:
    return f"{name}@{budget}" if budget else name


def _where(sample: Sample | ForcedSample) -> tuple[str, int, int]:
    return sample.task, sample.context_len, sample.index


def _max_len(samples: Sequence[Sample | ForcedSample]) -> int:
    """Tokens of the longest prompt and its answer."""
    return max(
        len(s.prompt) + (s.max_tokens if isinstance(s, Sample) else s.num_tokens)
        for s in samples
    )


def _batches(
    samples: list[Sample | ForcedSample], batch_size: int
) -> list[list[Sample | ForcedSample]]:
    """Samples that run together: of one context and number of tokens to generate.

    Forced ones run alone.
    """
    batches: list[list[Sample | ForcedSample]] = []
    for sample in samples:
        last = batches[-1][0] if batches else None
        if (
            isinstance(sample, Sample)
            and isinstance(last, Sample)
            and len(batches[-1]) < batch_size
            and last.context_len == sample.context_len
            and last.max_tokens == sample.max_tokens
        ):
            batches[-1].append(sample)
        else:
            batches.append([sample])
    return batches
