# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_clusterkv project
"""Attention over a selection, and over everything: what selections are judged by."""

import torch

from benchmarks.quality.methods.base import Selection


def exact_logits(query, keys, scale: float) -> torch.Tensor:
    """Logits of every token: [num_kv_heads, group, seq_len] fp32.

    Args:
        query: [num_heads, head_size].
        keys: [num_kv_heads, seq_len, head_size].
        scale: Softmax scale.
    """
    grouped = query.float().unflatten(0, (keys.shape[0], -1))
    return scale * grouped @ keys.float().mT


def attend(selection: Selection, logits, values) -> torch.Tensor:
    """One softmax over the tokens selected and the rows that stand in for the rest.

    Args:
        selection: What to attend to.
        logits: From ``exact_logits``.
        values: [num_kv_heads, seq_len, head_size].

    Returns:
        [num_heads, head_size] fp32.
    """
    logits = logits.masked_fill(~selection.mask[:, None], float("-inf"))
    values = values.float()
    if selection.extra_logits is not None and selection.extra_values is not None:
        logits = torch.cat([logits, selection.extra_logits], 2)
        values = torch.cat([values, selection.extra_values.float()], 1)
    return (logits.softmax(2) @ values).flatten(0, 1)
