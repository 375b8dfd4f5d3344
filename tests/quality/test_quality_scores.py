# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_clusterkv project
"""Scores of answers, and of next-token distributions."""

import numpy as np
import pytest

from benchmarks.quality import scoring
from benchmarks.quality.fidelity_math import (
    Scored,
    compare,
    first_difference,
    kl_divergence,
)


def test_match():
    assert scoring.match_all("It is 12 and ABC.", ["12", "abc", "34", "56"]) == 50
    assert scoring.match_part("It is 12.", ["34", "12"]) == 100
    assert scoring.match_part("It is 12.", ["34"]) == 0


def test_qa_f1():
    assert scoring.qa_f1("The answer", ["an answer"]) == 100
    # Precision 1/2, recall 1; the better of two answers.
    assert scoring.qa_f1("in Paris", ["Rome", "Paris"]) == pytest.approx(200 / 3)
    assert scoring.qa_f1("", ["Rome"]) == 0


def test_retrieval_and_code():
    assert scoring.retrieval("Paragraph 7, or 8", ["Paragraph 7"]) == 50
    assert scoring.retrieval("none", ["Paragraph 7"]) == 0
    assert scoring.code_similarity("\n# so\nx = 1\ny = 2", ["x = 1"]) == 100


def scored(probabilities: np.ndarray, token_ids: list[int], top_k: int) -> Scored:
    """Of whole distributions [num_steps, vocab_size]."""
    order = np.argsort(-probabilities, axis=1)[:, :top_k]
    logs = np.log(probabilities)
    return Scored(
        np.array(token_ids, np.int32),
        logs[np.arange(len(token_ids)), token_ids].astype(np.float32),
        order.astype(np.int32),
        np.take_along_axis(logs, order, 1).astype(np.float32),
    )


@pytest.fixture
def distributions():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(6, 50)) * 2
    other = logits + rng.normal(size=logits.shape) * 0.3
    return [np.exp(x) / np.exp(x).sum(1, keepdims=True) for x in (logits, other)]


def test_kl_of_all_tokens_is_exact_and_of_some_a_lower_bound(distributions):
    p, q = distributions
    exact = (p * np.log(p / q)).sum(1)
    tokens = [0] * len(p)
    kl, mass = kl_divergence(scored(p, tokens, 50), scored(q, tokens, 50))
    np.testing.assert_allclose(kl, exact, atol=1e-4)
    np.testing.assert_allclose(mass, 1, atol=1e-5)
    kl, mass = kl_divergence(scored(p, tokens, 20), scored(q, tokens, 20))
    assert (kl <= exact + 1e-6).all()
    assert (kl >= 0).all()
    assert (kl > exact / 2).all()


def test_compare_leaves_the_first_step_out(distributions):
    p, q = distributions
    tokens = [3, 1, 4, 1, 5, 9]
    q[0] = q[0][::-1]
    dense, other = scored(p, tokens, 50), scored(q, tokens, 50)
    scores = compare(dense, other)
    assert scores["kl"] == pytest.approx(
        (p * np.log(p / q)).sum(1)[1:].mean(), abs=1e-4
    )
    same = (p.argmax(1) == q.argmax(1))[1:]
    assert scores["agreement"] == pytest.approx(100 * same.mean())
    assert scores["nll"] - scores["nll_dense"] == pytest.approx(scores["logprob_gap"])
    assert compare(dense, dense)["kl"] == 0
    with pytest.raises(ValueError, match="same tokens"):
        compare(dense, scored(q, tokens[::-1], 50))


def test_first_difference():
    assert first_difference([1, 2, 3], [1, 2, 4]) == 2
    assert first_difference([1, 2], [1, 2]) == 2
