# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_clusterkv project
"""Spherical k-means of many sets of keys at once."""

import torch

from vllm_clusterkv.reference import first_argmax, spread_rows

INITS = ("farthest", "spaced", "random")
"""``farthest``: keys far from each other, the product's (``reference.spread_rows``);
``spaced``: evenly spaced keys; ``random``: with replacement, the same positions for all
sets, as ClusterKV's system code."""


def check_init(init: str) -> None:
    """Raises ValueError for what is not one of ``INITS``."""
    if init not in INITS:
        raise ValueError(f"init must be one of {INITS}, got {init!r}")


def cluster_keys(
    keys: torch.Tensor, num_clusters: int, num_iters: int, init: str = "farthest"
) -> torch.Tensor:
    """``vllm_clusterkv.reference.cluster_keys`` of many sets, and other first means.

    Args:
        keys: [num_sets, num_rows, head_size] fp32.
        num_clusters: Clusters a set.
        num_iters: Rounds.
        init: One of ``INITS``.

    Returns:
        Labels: [num_sets, num_rows] int64.
    """
    means = first_means(keys, num_clusters, init)
    labels = keys.new_zeros(keys.shape[:2], dtype=torch.int64)
    for _ in range(num_iters):
        labels = assign(keys, means)
        means = move_means(keys, labels, means)
    return labels


def first_means(keys, num_clusters: int, init: str) -> torch.Tensor:
    """Keys that start the clusters: [num_sets, num_clusters, head_size]."""
    num_rows = keys.shape[1]
    if init == "spaced":
        odd = 2 * torch.arange(num_clusters, device=keys.device) + 1
        return keys[:, odd * num_rows // (2 * num_clusters)]
    if init == "random":
        generator = torch.Generator().manual_seed(0)
        rows = torch.randint(num_rows, (num_clusters,), generator=generator)
        return keys[:, rows.to(keys.device)]
    check_init(init)
    rows = spread_rows(keys, num_clusters)
    return keys.take_along_dim(rows[..., None], 1)


def assign(keys, means) -> torch.Tensor:
    """Label of each key: the mean of largest cosine, ties to the lowest."""
    norms = means.norm(dim=2, keepdim=True)
    directions = torch.where(norms > 0, means / norms, 0)
    return first_argmax(keys @ directions.mT)


def move_means(keys, labels, means) -> torch.Tensor:
    """Means of the keys as they are, not of their directions; an empty one stays."""
    sums = torch.zeros_like(means)
    sums.scatter_add_(1, labels[..., None].expand(keys.shape), keys)
    counts = torch.zeros_like(means[..., :1])
    counts.scatter_add_(1, labels[..., None], torch.ones_like(keys[..., :1]))
    return torch.where(counts > 0, sums / counts.clamp(min=1), means)
