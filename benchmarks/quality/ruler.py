# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_clusterkv project
"""The synthetic tasks of RULER (arXiv 2404.06654), made offline from a seed.

Written from the paper's description, with its settings: needles in a haystack of one,
several keys, values and queries; variable tracking of one chain of four hops; the most
common and the most frequent words. What differs: essays are other text (``texts.py``),
words come from it or from ``words.py``; the two question answering tasks, which need
data sets, are left out. As in RULER, a context length has room for the answer in it.
"""

import random
import string
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import islice

from benchmarks.quality.samples import Message, Prompter, Sample
from benchmarks.quality.texts import Texts
from benchmarks.quality.words import names

NOISE = (
    "The grass is green. The sky is blue. The sun is yellow. Here we go. "
    "There and back again."
)
DEPTHS = [index / 39 for index in range(40)]
"""Where needles may be, as shares of the haystack."""

# Draws a message: the texts, the sample's seed, the amount of filler, the context.
Build = Callable[[Texts, str, int, int], Message]


@dataclass(frozen=True)
class Task:
    """A kind of message.

    Attributes:
        build: Makes it.
        max_tokens: Of the answer.
    """

    build: Build
    max_tokens: int


@dataclass(frozen=True)
class Needles:
    """Settings of a haystack.

    Attributes:
        haystack: "noise", "essay", or "needles", of which all hay is made.
        keys: "words" or "uuids".
        values: "numbers" or "uuids".
        num_keys: Different keys hidden.
        num_values: Values a key.
        num_queries: Keys asked for.
    """

    haystack: str
    keys: str = "words"
    values: str = "numbers"
    num_keys: int = 1
    num_values: int = 1
    num_queries: int = 1


def build_needles(
    kind: Needles, texts: Texts, seed: str, amount: int, context_len: int
) -> Message:
    """Values of keys, hidden in a haystack."""
    rng = random.Random(seed)
    keys = _drawn(kind.keys, rng)
    values = _drawn(kind.values, rng)
    hidden = {
        next(keys): list(islice(values, kind.num_values)) for _ in range(kind.num_keys)
    }
    needles = [_needle(kind, key, v) for key in hidden for v in hidden[key]]
    rng.shuffle(needles)
    depths = sorted(rng.sample(DEPTHS, len(needles)))
    queries = rng.sample(sorted(hidden), kind.num_queries)
    if kind.haystack == "essay":
        # From anywhere, so that samples differ in more than their needles.
        start = rng.randrange(len(texts.pieces))
        context = hide_in_prose(texts.excerpt(start, amount), needles, depths)
    else:
        hay = [NOISE] * amount
        if kind.haystack == "needles":
            hay = [_needle(kind, next(keys), next(values)) for _ in range(amount)]
        context = "\n".join(_hide(hay, needles, depths))
    asked = " and ".join([", ".join(queries[:-1]), queries[-1]][len(queries) == 1 :])
    what = kind.values
    if kind.num_queries * kind.num_values == 1:
        what = what[:-1]
        some, are, verb = f"A special magic {what} is", "is", "it"
    else:
        some, are, verb = f"Some special magic {what} are", "are all", "them"
    return Message(
        f"{some} hidden within the following text. Make sure to memorize {verb}. I "
        f"will quiz you about the {what} afterwards.\n{context}\nWhat {are} the "
        f"special magic {what} for {asked} mentioned in the provided text?",
        f" The special magic {what} for {asked} mentioned in the provided text "
        f"{are.split()[0]}",
        [value for key in queries for value in hidden[key]],
    )


def build_variables(texts: Texts, seed: str, amount: int, context_len: int) -> Message:
    """A chain of variables that are assigned one value, among noise, and an example."""
    rng = random.Random(seed)
    example = _variables(rng, 5)
    task = _variables(rng, amount)
    shown = ", ".join(example.answers)
    return Message(
        f"{example.text}{example.answer_prefix} {shown}\n\n{task.text}",
        task.answer_prefix,
        task.answers,
    )


def _variables(rng: random.Random, amount: int, num_hops: int = 4) -> Message:
    chain: list[str] = []
    while len(chain) <= num_hops:
        name = "".join(rng.choices(string.ascii_uppercase, k=5))
        if name not in chain:
            chain.append(name)
    value = str(rng.randint(10_000, 99_999))
    lines = [f"VAR {chain[0]} = {value}"]
    lines += [f"VAR {b} = VAR {a}" for a, b in zip(chain, chain[1:], strict=False)]
    depths = sorted(rng.sample(DEPTHS, len(lines)))
    context = "\n".join(_hide([NOISE] * amount, lines, depths))
    return Message(
        "Memorize and track the chain(s) of variable assignment hidden in the "
        f"following text.\n\n{context}\nQuestion: Find all variables that are "
        f"assigned the value {value} in the text above.",
        " Answer: According to the chain(s) of variable assignment in the text above, "
        f"{len(chain)} variables are assigned the value {value}, they are:",
        chain,
    )


def build_common_words(
    texts: Texts, seed: str, amount: int, context_len: int
) -> Message:
    """Ten words that appear often in a numbered list, and an example."""
    rng = random.Random(seed)
    # RULER's 30 and 3; less where that would not fit.
    often, seldom = (30, 3) if context_len >= 4096 else (10, 1)
    if context_len < 2048:
        often = 3
    pool = rng.sample(texts.words, len(texts.words))
    example = _common_words(rng, pool[:30], min(often, 10), seldom)
    rest = pool[30:]
    if len(rest) < 10 + amount:
        rest += [f"{a}{b}" for a, b in zip(rest, reversed(rest), strict=True)]
    task = _common_words(rng, rest[: 10 + amount], often, seldom)
    return Message(
        f"{example.text}{example.answer_prefix} {_numbered(example.answers)}\n\n"
        f"{task.text}",
        task.answer_prefix,
        task.answers,
    )


def _common_words(
    rng: random.Random, words: list[str], often: int, seldom: int
) -> Message:
    common = words[:10]
    listed = common * often + words[10:] * seldom
    rng.shuffle(listed)
    return Message(
        "Below is a numbered list of words. In these words, some appear more often "
        "than others. Memorize the ones that appear most often.\n"
        f"{_numbered(listed)}\n"
        "Question: What are the 10 most common words in the above list?",
        " Answer: The top 10 words that appear most often in the list are:",
        common,
    )


def build_frequent_words(
    texts: Texts, seed: str, amount: int, context_len: int
) -> Message:
    """The three most frequent of coded words, whose counts follow a zeta law."""
    rng = random.Random(seed)
    coded = [
        "".join(rng.choices(string.ascii_lowercase, k=6))
        for _ in range(max(context_len // 50, 10))
    ]
    coded[0] = "..."  # The most frequent is noise.
    num_words = 60 + amount
    zeta = 1.6449340668482264  # of 2, the exponent
    words = []
    for rank, word in enumerate(coded, 1):
        words += [word] * int(num_words / (rank**2 * zeta))
    rng.shuffle(words)
    return Message(
        "Read the following coded text and track the frequency of each coded word. "
        f"Find the three most frequently appeared coded words. {' '.join(words)}\n"
        "Question: Do not provide any explanation. Please ignore the dots '....'. What "
        "are the three most frequently appeared words in the above coded text?",
        " Answer: According to the coded text above, the three most frequently "
        "appeared words are:",
        coded[1:4],
    )


TASKS = {
    "niah_single_1": Task(partial(build_needles, Needles("noise")), 128),
    "niah_single_2": Task(partial(build_needles, Needles("essay")), 128),
    "niah_single_3": Task(
        partial(build_needles, Needles("essay", values="uuids")), 128
    ),
    "niah_multikey_1": Task(partial(build_needles, Needles("essay", num_keys=4)), 128),
    "niah_multikey_2": Task(partial(build_needles, Needles("needles")), 128),
    "niah_multikey_3": Task(
        partial(build_needles, Needles("needles", keys="uuids", values="uuids")), 128
    ),
    "niah_multivalue": Task(
        partial(build_needles, Needles("essay", num_values=4)), 128
    ),
    "niah_multiquery": Task(
        partial(build_needles, Needles("essay", num_keys=4, num_queries=4)), 128
    ),
    "vt": Task(build_variables, 30),
    "cwe": Task(build_common_words, 120),
    "fwe": Task(build_frequent_words, 50),
}


def make_sample(
    name: str,
    prompter: Prompter,
    texts: Texts,
    context_len: int,
    index: int,
    seed: int = 0,
    max_answer_tokens: int | None = None,
) -> Sample:
    """A sample of a task.

    Args:
        name: Of the task.
        prompter: With the model's tokenizer.
        texts: For essays and words.
        context_len: Tokens of prompt and answer together.
        index: Samples of different indices differ.
        seed: Of all samples.
        max_answer_tokens: If less than RULER's.
    """
    task = TASKS[name]
    max_tokens = min(task.max_tokens, max_answer_tokens or task.max_tokens)
    drawn = f"{seed}/{name}/{context_len}/{index}"
    prompt, message = prompter.fit(
        lambda amount: task.build(texts, drawn, amount, context_len),
        context_len - max_tokens,
        name,
    )
    return Sample(name, context_len, index, prompt, message.answers, max_tokens)


def hide_in_prose(pieces: list[str], needles: list[str], depths: list[float]) -> str:
    """Puts needles between the sentences, or lines, of a text.

    Args:
        pieces: Words, each with the white space behind it.
        needles: Sentences.
        depths: Of each, a share of the text, ascending.
    """
    ends = [0]
    ends += [i + 1 for i, p in enumerate(pieces) if p.endswith(". ") or "\n" in p]
    at = [
        max((end for end in ends if end <= depth * len(pieces)), default=0)
        for depth in depths
    ]
    parts, last = [], 0
    for place, needle in zip(at, needles, strict=True):
        parts += [*pieces[last:place], f"{needle} "]
        last = place
    return "".join([*parts, *pieces[last:]])


def _hide(hay: list[str], needles: list[str], depths: list[float]) -> list[str]:
    lines, last = [], 0
    for depth, needle in zip(depths, needles, strict=True):
        place = int(depth * len(hay))
        lines += [*hay[last:place], needle]
        last = place
    return lines + hay[last:]


def _needle(kind: Needles, key: str, value: str) -> str:
    return f"One of the special magic {kind.values} for {key} is: {value}."


def _drawn(what: str, rng: random.Random):
    if what == "words":
        return names(rng)
    if what == "uuids":
        return iter(lambda: str(uuid.UUID(int=rng.getrandbits(128), version=4)), None)
    return iter(lambda: str(rng.randint(1_000_000, 9_999_999)), None)


def _numbered(words: list[str]) -> str:
    return " ".join(f"{i}. {word}" for i, word in enumerate(words, 1))
