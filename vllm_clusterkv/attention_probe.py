# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_clusterkv project
"""Measures what decode attended to against dense attention over the same cache.

Every row of the context is still in its page, so dense attention can be computed
beside the sparse one. Indexing sorts a page's rows by cluster and keeps no record of
where they came from; the probe looks at each page before and after.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch.nn.functional import pad

from vllm_clusterkv import observe, ops, reference
from vllm_clusterkv.page_layout import BLOCK_SIZE, IndexFields


@dataclass
class Cluster:
    """A cluster of one indexed page and KV head, as a decode step saw it.

    Attributes:
        page: Position of its page in the request, from 0.
        index: Its number in the page, from 0.
        selected: Whether its tokens were attended to exactly.
        weight: Share of all clusters' weight by their means: what selection knew.
            Mean over the query heads.
        mass: Exact share of the attention mass. Mean over the query heads.
        positions: Its tokens' positions in the request, ascending.
    """

    page: int
    index: int
    selected: bool
    weight: float
    mass: float
    positions: list[int]


@dataclass
class HeadAttention:
    """What one KV head attended to, in one layer of one decode step.

    Masses are shares of the dense attention's weights. Lists have one entry a query
    head of the KV head.

    Attributes:
        step: Decode step, from 0.
        layer: Layer, from 0.
        kv_head: KV head, from 0.
        context: Tokens including the current one.
        attended: Tokens attended to exactly.
        always: Mass of the tokens attended to in any case: the sinks and the page
            being filled.
        captured: Mass of the tokens attended to exactly.
        estimated: Share that the cluster means received in place of the tokens left
            out, whose mass is ``1 - captured``.
        error: Norm of the attention output's error against dense, relative.
        best: The largest mass that ``attended`` tokens can carry, the same tokens
            for every query head. Mean over the query heads.
        clusters: The clusters that have tokens, by page and number. None if the row
            was attended to densely (setting ``min_sparse_len``).
        token_mass: [context] fp32. Mass of each token by position. Mean over the
            query heads.
        positions: [context] int64. Position of each cache row, page after page.
    """

    step: int
    layer: int
    kv_head: int
    context: int
    attended: int
    always: list[float]
    captured: list[float]
    estimated: list[float]
    error: list[float]
    best: float
    clusters: list[Cluster]
    token_mass: torch.Tensor
    positions: torch.Tensor


class AttentionProbe:
    """Measures the decode steps of one request that run inside a ``with`` block.

    The block must run the request alone, from its first token, with no page from
    the prefix cache.

    Attributes:
        heads: The measurements, by step, layer and KV head.
    """

    def __init__(self, num_prompt_tokens: int) -> None:
        self.heads: list[HeadAttention] = []
        self._num_prompt_tokens = num_prompt_tokens
        # [num_kv_heads, BLOCK_SIZE] of a layer's page, by cache address and block:
        # the row that each sorted row had before.
        self._origins: dict[tuple[int, int], torch.Tensor] = {}

    def __enter__(self) -> "AttentionProbe":
        self._op = ops.index_pages
        ops.index_pages = self._index_pages
        observe.observers.append(self._measure)
        return self

    def __exit__(self, *exc_info) -> None:
        observe.observers.remove(self._measure)
        ops.index_pages = self._op

    def _index_pages(
        self,
        kv_cache,
        index,
        block_ids,
        num_sink_tokens,
        num_iters,
    ) -> None:
        """``ops.index_pages``, and a note of where the rows went."""
        blocks = block_ids[block_ids >= 0].long()
        before = kv_cache[blocks]
        self._op(
            kv_cache,
            index,
            block_ids,
            num_sink_tokens,
            num_iters,
        )
        origins = match_rows(before, kv_cache[blocks])
        for block, origin in zip(blocks.tolist(), origins, strict=True):
            self._origins[kv_cache.data_ptr(), block] = origin

    def _measure(self, step: observe.DecodeStep) -> None:
        context = int(step.seq_lens[0])
        num_kv_heads, head_size = step.index.shape[1], step.query.shape[2]
        fields = IndexFields.of(step.index, head_size, step.kv_cache.dtype)
        num_clusters = fields.num_clusters
        blocks = step.block_table[0, : (context - 1) // BLOCK_SIZE + 1].long()
        is_dense = context < int(step.min_sparse_lens[0])
        indexed = blocks[:0] if is_dense else blocks[:-1]
        fields = fields[indexed]
        labels = _label_rows(step, fields.cluster_ends, context)

        # Dense attention. [num_kv_heads, group, ...], all fp32.
        rows = step.kv_cache[blocks].float().transpose(0, 1).flatten(1, 2)
        key, value = rows[:, :context].chunk(2, dim=-1)
        query = step.query[0].float().unflatten(0, (num_kv_heads, -1))
        logits = step.scale * query @ key.mT
        mass = logits.softmax(-1)
        dense = mass @ value

        # By cluster; one more stands for the rows that are in none.
        num_row_clusters = len(indexed) * num_clusters
        selected = step.selected[0, :, :num_row_clusters].bool()
        taken = pad(selected, (0, 1), value=True).gather(1, labels)[:, None]
        counts = labels.new_zeros((num_kv_heads, num_row_clusters + 1))
        counts = counts.scatter_add(1, labels, torch.ones_like(labels))[:, :-1]
        cluster_mass = mass.new_zeros((*mass.shape[:2], num_row_clusters + 1))
        cluster_mass.scatter_add_(2, labels[:, None].expand_as(mass), mass)

        # Sparse attention, as ``reference.sparse_decode`` defines it.
        scores = step.scores[0, :, :num_row_clusters].unflatten(0, (num_kv_heads, -1))
        estimates = scores + counts.log()[:, None]
        if not step.config.tail_estimate:
            estimates = torch.full_like(estimates, float("-inf"))
        estimates = estimates.masked_fill(selected[:, None], float("-inf"))
        logits = logits.masked_fill(~taken, float("-inf"))
        weights = torch.cat([logits, estimates], -1).softmax(-1)
        # [num_kv_heads, num_row_clusters, head_size]
        mean_value = fields.mean_values().transpose(0, 1).flatten(1, 2)
        sparse = weights @ torch.cat([value, mean_value], 1)

        always = cluster_mass[..., -1]
        captured = (mass * taken).sum(-1)
        estimated = weights[..., context:].sum(-1)
        error = (sparse - dense).norm(dim=-1) / dense.norm(dim=-1)
        positions = self._positions(step, blocks.tolist(), context)
        for head in range(num_kv_heads):
            row_mass = mass[head].mean(0)
            token_mass = torch.empty_like(row_mass)
            token_mass[positions[head]] = row_mass
            attended = int(step.num_attended[0, head])
            rank = reference.rank_weights(scores[head], counts[head]) / len(scores[0])
            by_cluster = positions[head][labels[head].argsort(stable=True)]
            self.heads.append(
                HeadAttention(
                    step=context - 1 - self._num_prompt_tokens,
                    layer=_layer_index(step.layer_name),
                    kv_head=head,
                    context=context,
                    attended=attended,
                    always=always[head].tolist(),
                    captured=captured[head].tolist(),
                    estimated=estimated[head].tolist(),
                    error=error[head].tolist(),
                    best=float(row_mass.topk(attended).values.sum()),
                    clusters=_list_clusters(
                        num_clusters,
                        counts[head].tolist(),
                        selected[head].tolist(),
                        (rank * counts[head]).tolist(),
                        cluster_mass[head, :, :-1].mean(0).tolist(),
                        by_cluster.tolist(),
                    ),
                    token_mass=token_mass.cpu(),
                    positions=positions[head].cpu(),
                )
            )

    def _positions(self, step, blocks: list[int], context: int) -> torch.Tensor:
        """Position of each row of the context: [num_kv_heads, context] int64.

        Every complete page is sorted, also a tail page that this step completed.
        """
        num_kv_heads = step.kv_cache.shape[1]
        positions = torch.arange(context).repeat(num_kv_heads, 1)
        for page, block in enumerate(blocks[: context // BLOCK_SIZE]):
            start = page * BLOCK_SIZE
            origin = self._origins[step.kv_cache.data_ptr(), block]
            positions[:, start : start + BLOCK_SIZE] = start + origin
        return positions.to(step.kv_cache.device)


def match_rows(before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
    """Where the rows of sorted pages were before.

    Rows are compared by their bytes. Equal rows keep their order, since they are of
    one cluster and sorting is stable.

    Args:
        before: [num_pages, num_kv_heads, BLOCK_SIZE, row_size].
        after: As ``before``, each page's rows permuted a KV head.

    Returns:
        [num_pages, num_kv_heads, BLOCK_SIZE] int64, on the CPU.

    Raises:
        RuntimeError: ``after`` does not hold the rows of ``before``.
    """
    old, new = _row_bytes(before), _row_bytes(after)
    old_order = old.argsort(axis=-1, kind="stable")
    new_order = new.argsort(axis=-1, kind="stable")
    origins = np.empty_like(old_order)
    np.put_along_axis(origins, new_order, old_order, axis=-1)
    if (np.take_along_axis(old, origins, axis=-1) != new).any():
        raise RuntimeError("index_pages must permute the rows of a page, but lost some")
    return torch.from_numpy(origins)


def _row_bytes(rows: torch.Tensor) -> np.ndarray:
    """Each row as one opaque item: [..., row_size] to [...]."""
    as_bytes = rows.cpu().contiguous().view(torch.uint8).numpy()
    return as_bytes.view(f"V{as_bytes.shape[-1]}")[..., 0]


def _label_rows(step, cluster_ends: torch.Tensor, context: int) -> torch.Tensor:
    """Cluster of each row of the context: [num_kv_heads, context] int64.

    Rows of no cluster, the sinks and the tail page, have the number behind the last.
    """
    ends = cluster_ends.int().transpose(0, 1).contiguous()
    num_kv_heads, num_pages, num_clusters = ends.shape
    rows = torch.arange(BLOCK_SIZE, dtype=torch.int32, device=ends.device)
    rows = rows.expand(num_kv_heads, num_pages, BLOCK_SIZE).contiguous()
    labels = torch.searchsorted(ends, rows, right=True)
    labels += num_clusters * torch.arange(num_pages, device=ends.device)[:, None]
    num_tail_rows = context - num_pages * BLOCK_SIZE
    no_cluster = num_pages * num_clusters
    labels = pad(labels.flatten(1), (0, num_tail_rows), value=no_cluster)
    labels[:, : step.config.num_sink_tokens] = no_cluster
    return labels


def _list_clusters(
    num_clusters: int,
    counts: list[int],
    selected: list[bool],
    weights: list[float],
    masses: list[float],
    positions: list[int],
) -> list[Cluster]:
    """The clusters of one KV head that have tokens.

    The lists have one entry a cluster of the row, but ``positions``: it has the
    tokens of the first cluster, then those of the second, and so on.
    """
    clusters, start = [], 0
    for i, count in enumerate(counts):
        if count:
            page, index = divmod(i, num_clusters)
            members = sorted(positions[start : start + count])
            clusters.append(
                Cluster(page, index, selected[i], weights[i], masses[i], members)
            )
        start += count
    return clusters


def _layer_index(layer_name: str) -> int:
    """vLLM names a layer by its path: "model.layers.3.self_attn.attn"."""
    return next(int(part) for part in layer_name.split(".") if part.isdigit())
