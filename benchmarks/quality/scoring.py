# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_clusterkv project
"""Scores of an answer, from 0 to 100, as RULER and LongBench define them."""

import difflib
import re
import string
from collections import Counter
from collections.abc import Callable


def match_all(prediction: str, answers: list[str]) -> float:
    """RULER's recall: the share of the answers that the prediction holds."""
    text = prediction.lower()
    return 100 * sum(answer.lower() in text for answer in answers) / len(answers)


def match_part(prediction: str, answers: list[str]) -> float:
    """RULER's for questions: whether the prediction holds one of the answers."""
    text = prediction.lower()
    return 100.0 * any(answer.lower() in text for answer in answers)


def match_words(prediction: str, answers: list[str]) -> float:
    """The share of the words of the first answer that the prediction holds."""
    found = set(_normalize(prediction).split())
    words = set(_normalize(answers[0]).split())
    return 100 * len(words & found) / len(words)


def qa_f1(prediction: str, answers: list[str]) -> float:
    """LongBench's: F1 of the words, of the answer where it is largest."""
    return 100 * max(
        (_f1(_normalize(prediction).split(), _normalize(a).split()) for a in answers),
        default=0.0,
    )


def retrieval(prediction: str, answers: list[str]) -> float:
    """LongBench's: how many of the numbers named are the right paragraph's."""
    numbers = re.findall(r"\d+", prediction)
    right = re.findall(r"Paragraph (\d+)", answers[0])
    if not numbers or not right:
        return 0.0
    return 100 * numbers.count(right[0]) / len(numbers)


def code_similarity(prediction: str, answers: list[str]) -> float:
    """LongBench's edit similarity of the first line of code.

    By ``difflib``, where LongBench has fuzzywuzzy: the same ratio when that runs
    without its C library, up to its rounding to whole percents.
    """
    lines = prediction.lstrip("\n").split("\n")
    line = next(
        (
            text
            for text in lines
            if not any(mark in text for mark in "`#") and "//" not in text
        ),
        "",
    )
    return 100 * max(
        (difflib.SequenceMatcher(None, line, answer).ratio() for answer in answers),
        default=0.0,
    )


def _f1(prediction: list[str], answer: list[str]) -> float:
    common = sum((Counter(prediction) & Counter(answer)).values())
    if not common:
        return 0.0
    precision, recall = common / len(prediction), common / len(answer)
    return 2 * precision * recall / (precision + recall)


def _normalize(text: str) -> str:
    """Lower case, without punctuation, articles and more than one space."""
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


METRICS: dict[str, Callable[[str, list[str]], float]] = {
    "match_all": match_all,
    "match_part": match_part,
    "match_words": match_words,
    "qa_f1": qa_f1,
    "retrieval": retrieval,
    "code_similarity": code_similarity,
}
