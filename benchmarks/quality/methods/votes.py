# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_clusterkv project
"""One order of the groups for all query heads of a KV head."""

import torch

from vllm_clusterkv import reference

VOTES = ("softmax", "softmax-max", "mean", "max")
"""``softmax``: sum of the query heads' softmax weights a token, the product's rule;
``softmax-max``: the largest of them; ``mean`` and ``max``: of the raw logits."""


def rank(scores: torch.Tensor, counts: torch.Tensor, vote: str) -> torch.Tensor:
    """Ranks groups of tokens: the larger, the sooner attended to.

    Args:
        scores: [num_kv_heads, group, num_groups] fp32, a logit for each query head.
        counts: [num_kv_heads, num_groups] int64, tokens of each group.
        vote: One of ``VOTES``.

    Returns:
        [num_kv_heads, num_groups] fp32; -inf for a group without tokens.
    """
    if vote == "mean":
        ranks = scores.mean(1)
    elif vote == "max":
        ranks = scores.amax(1)
    elif vote == "softmax":
        ranks = torch.vmap(reference.rank_weights)(scores, counts)
    elif vote == "softmax-max":
        # A group of one: the weights of that query head alone.
        ranks = torch.stack(
            [
                torch.stack([reference.rank_weights(row[None], head) for row in rows])
                for rows, head in zip(scores, counts, strict=True)
            ]
        ).amax(1)
    else:
        raise ValueError(f"vote must be one of {VOTES}, got {vote!r}")
    return ranks.masked_fill(counts == 0, float("-inf"))
