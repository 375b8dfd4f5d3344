# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_clusterkv project
"""How near one backend's next-token distributions are to another's."""

from dataclasses import dataclass

import numpy as np

SMALLEST = 1e-9
"""Mass that tokens outside of the lists have at least, against rounding below 0."""


@dataclass(frozen=True)
class Scored:
    """Next-token distributions along a continuation.

    Attributes:
        token_ids: [num_steps] int32, the continuation.
        logprobs: [num_steps] float32, of those tokens, in nats.
        top_ids: [num_steps, top_k] int32, the likeliest tokens, best first.
        top_logprobs: [num_steps, top_k] float32.
    """

    token_ids: np.ndarray
    logprobs: np.ndarray
    top_ids: np.ndarray
    top_logprobs: np.ndarray


def kl_divergence(dense: Scored, other: Scored) -> tuple[np.ndarray, np.ndarray]:
    """KL(dense || other) of each step, with all unlisted tokens taken as one.

    Each step's vocabulary is divided into the tokens that both sides list among their
    likeliest, and one rest. The divergence of the distributions over that division is
    computed exactly; by the data processing inequality it is a lower bound of that
    over the vocabulary, and near it where the listed tokens carry nearly all mass.

    Returns:
        kl: [num_steps] nats.
        mass: [num_steps] dense probability of the tokens listed by both.
    """
    kls, masses = [], []
    for i in range(len(dense.token_ids)):
        _, at_p, at_q = np.intersect1d(
            dense.top_ids[i], other.top_ids[i], return_indices=True
        )
        log_p = dense.top_logprobs[i][at_p].astype(np.float64)
        log_q = other.top_logprobs[i][at_q].astype(np.float64)
        rest_p = max(1 - np.exp(log_p).sum(), SMALLEST)
        rest_q = max(1 - np.exp(log_q).sum(), SMALLEST)
        listed = (np.exp(log_p) * (log_p - log_q)).sum()
        kls.append(listed + rest_p * np.log(rest_p / rest_q))
        masses.append(np.exp(log_p).sum())
    return np.array(kls), np.array(masses)


def compare(dense: Scored, other: Scored) -> dict[str, float]:
    """Means over the steps of two runs along the same continuation.

    The first step is left out: its distribution is prefill's, which is dense in both.

    Returns:
        kl: As ``kl_divergence``, nats.
        kl_p99: 99th percentile of it.
        top_k_mass: Dense probability of the tokens that the KL tells apart.
        agreement: Steps in which both like the same token best, percent.
        nll: -log-probability of the continuation's tokens, nats a token.
        nll_dense: The dense run's.
        logprob_gap: Its log-probability less the other's, nats a token.

    Raises:
        ValueError: The continuations differ.
    """
    if not np.array_equal(dense.token_ids, other.token_ids):
        raise ValueError("the two runs did not go along the same tokens")
    kl, mass = (values[1:] for values in kl_divergence(dense, other))
    same = dense.top_ids[1:, 0] == other.top_ids[1:, 0]
    nll, nll_dense = (
        -float(other.logprobs[1:].mean()),
        -float(dense.logprobs[1:].mean()),
    )
    return {
        "kl": float(kl.mean()),
        "kl_p99": float(np.quantile(kl, 0.99)),
        "top_k_mass": float(mass.mean()),
        "agreement": 100 * float(same.mean()),
        "nll": nll,
        "nll_dense": nll_dense,
        "logprob_gap": nll - nll_dense,
    }


def first_difference(a: list[int], b: list[int]) -> int:
    """Tokens that two continuations have in common at their begin."""
    common = 0
    for x, y in zip(a, b, strict=False):
        if x != y:
            break
        common += 1
    return common
