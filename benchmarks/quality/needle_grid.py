# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_clusterkv project
"""One fact at a given depth of a text of a given length, and a picture of the grid."""

import random
from collections import defaultdict
from pathlib import Path
from statistics import mean

from benchmarks.quality.ruler import hide_in_prose
from benchmarks.quality.samples import Message, Prompter, Sample
from benchmarks.quality.texts import Texts
from benchmarks.quality.words import names

TASK = "needle_grid"
MAX_TOKENS = 32


def make_samples(
    prompter: Prompter,
    texts: Texts,
    context_len: int,
    depths: list[float],
    num_samples: int,
    seed: int = 0,
    max_answer_tokens: int | None = None,
) -> list[Sample]:
    """The samples of one length, by depth.

    Args:
        prompter: With the model's tokenizer.
        texts: For the haystack.
        context_len: Tokens of prompt and answer together.
        depths: Shares of the text that come before the fact.
        num_samples: For each depth. Text and fact are those of the sample's index, so
            that only the place differs.
        seed: Of all samples.
        max_answer_tokens: If less than ``MAX_TOKENS``.
    """
    max_tokens = min(MAX_TOKENS, max_answer_tokens or MAX_TOKENS)
    samples = []
    for depth_idx, depth in enumerate(depths):
        for index in range(num_samples):
            rng = random.Random(f"{seed}/{TASK}/{context_len}/{index}")
            key, value = next(names(rng)), str(rng.randint(1_000_000, 9_999_999))
            start = rng.randrange(len(texts.pieces))

            def build(
                amount: int, key=key, value=value, start=start, depth=depth
            ) -> Message:
                fact = f"The access code of the {key} is {value}."
                pieces = texts.excerpt(start, amount)
                return Message(
                    "Read this document and remember the access code in it.\n\n"
                    f"{hide_in_prose(pieces, [fact], [depth])}\n\n"
                    f"What is the access code of the {key}?",
                    f" The access code of the {key} is",
                    [value],
                )

            prompt, message = prompter.fit(build, context_len - max_tokens, TASK)
            samples.append(
                Sample(
                    TASK,
                    context_len,
                    depth_idx * num_samples + index,
                    prompt,
                    message.answers,
                    max_tokens,
                    labels={"depth": depth},
                )
            )
    return samples


def draw(records: list[dict], folder: Path) -> list[Path]:
    """Draws a heat map a method and budget, depth by length.

    Args:
        records: Of ``results.Results``; those of other tasks are left out.
        folder: For the pictures.

    Returns:
        The pictures; none, with a message, where matplotlib is not installed.
    """
    grids: dict[tuple, dict[tuple, list[float]]] = defaultdict(
        lambda: defaultdict(list)
    )
    for record in records:
        if record["task"] == TASK:
            cell = (record["labels"]["depth"], record["context_len"])
            which = (record["method"], record["token_budget"])
            grids[which][cell].append(record["scores"]["score"])
    if not grids:
        return []
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        print("no heat maps of the needle grid: matplotlib is not installed")
        return []
    files = []
    for (method, budget), cells in grids.items():
        depths = sorted({depth for depth, _ in cells})
        lengths = sorted({length for _, length in cells})
        found = [
            [mean(cells.get((d, n), [float("nan")])) for n in lengths] for d in depths
        ]
        title = f"{method}, budget {budget:,}" if budget else method
        figure, axes = pyplot.subplots(
            figsize=(2 + 0.8 * len(lengths), 1.5 + 0.4 * len(depths)),
            layout="constrained",
        )
        image = axes.imshow(found, vmin=0, vmax=100, cmap="RdYlGn", aspect="auto")
        axes.set_xticks(range(len(lengths)), [f"{n:,}" for n in lengths])
        axes.set_yticks(range(len(depths)), [f"{d:.0%}" for d in depths])
        axes.set(xlabel="context [tokens]", ylabel="depth of the fact", title=title)
        figure.colorbar(image, label="found [%]")
        stem = f"{TASK}-{method}" + (f"-{budget}" if budget else "")
        files.append(folder / f"{stem}.png")
        figure.savefig(files[-1], dpi=120)
        pyplot.close(figure)
    return files
