# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_clusterkv project
"""The ops of ``ops.py`` in naive fp32 PyTorch: the definition of correct.

Same names and arguments. Loops over rows, pages and heads; nothing here is fast.
"""

import torch

from vllm_clusterkv import short_means
from vllm_clusterkv.page_layout import (
    INDEX_UNIT,
    LINE_ROWS,
    LINES_PER_PAGE,
    MASS_EVERY,
    MASS_UNIT,
    IndexFields,
)

SPREAD_WEIGHT, SPREAD_MOST = 0.75, 4.0
"""Of ``spread_score``; docs/quality.md has how they were chosen."""


def index_pages(
    kv_cache,
    index,
    block_ids,
    num_sink_tokens,
    num_iters,
) -> None:
    """See ``ops.index_pages``."""
    fields = _fields(index, kv_cache)
    num_clusters, head_size = fields.num_clusters, kv_cache.shape[3] // 2
    for block, sinks in zip(block_ids.tolist(), num_sink_tokens.tolist(), strict=True):
        if block < 0:
            continue
        for head in range(kv_cache.shape[1]):
            rows = kv_cache[block, head, sinks:].float()  # [num_rows, 2 * head_size]
            keys = rows[:, :head_size]
            labels = cluster_keys(keys, num_clusters, num_iters)
            members = torch.nn.functional.one_hot(labels, num_clusters).T.float()
            counts = torch.bincount(labels, minlength=num_clusters)
            means = members @ rows / counts.clamp(min=1)[:, None]
            own = fields[block, head]
            own.write_means(means[:, :head_size], means[:, head_size:], counts)
            own.profile[:], own.radii[:] = key_spread(keys, labels, num_clusters)
            own.cluster_ends[:] = sinks + counts.cumsum(0)
            # Last: in fp32, rows and keys are views of the cache.
            order = torch.argsort(labels, stable=True)
            kv_cache[block, head, sinks:] = kv_cache[block, head, sinks:][order]


def cluster_keys(keys, num_clusters, num_iters) -> torch.Tensor:
    """Labels of spherical k-means: [num_rows, head_size] fp32 -> [num_rows] int64."""
    means = keys[spread_rows(keys, num_clusters)]  # [num_clusters, head_size]
    labels = torch.zeros(keys.shape[0], dtype=torch.int64, device=keys.device)
    for _ in range(num_iters):
        norms = means.norm(dim=1, keepdim=True)
        directions = torch.where(norms > 0, means / norms, 0)
        labels = first_argmax(keys @ directions.T)
        means = torch.stack(
            [
                keys[labels == c].mean(0) if (labels == c).any() else means[c]
                for c in range(num_clusters)
            ]
        )
    return labels


def key_spread(keys, labels, num_clusters) -> tuple[torch.Tensor, torch.Tensor]:
    """How keys spread around the means of their clusters.

    Args:
        keys: [num_rows, head_size] fp32.
        labels: [num_rows] int64.

    Returns:
        profile: [head_size] fp32. The keys' variance in each dimension, over its mean
            over the dimensions.
        radii: [num_clusters] fp32. Of each cluster the root of its variance's mean over
            the dimensions, 0 if it is empty.
    """
    members = torch.nn.functional.one_hot(labels, num_clusters).T.float()
    counts = members.sum(1, keepdim=True).clamp(min=1)
    squares = (keys - (members @ keys / counts)[labels]) ** 2
    variances = squares.mean(0)
    profile = torch.where(variances.mean() > 0, variances / variances.mean(), 0)
    return profile, (members @ squares / counts).mean(1).sqrt()


def query_squares(query) -> torch.Tensor:
    """Squares in the query's dtype, as tensor cores take them, in fp32.

    fp16 has no room for those of more than 255: there the query is first divided by
    16, and cut at 255.
    """
    if query.dtype != torch.float16:
        return (query**2).float()
    return 256 * ((query / 16).clamp(-255, 255) ** 2).float()


def deviating_query(query, deviations) -> torch.Tensor:
    """Products with deviations, rounded to the query's dtype, in fp32.

    In fp16 they end at 65504.
    """
    products = query.float() * deviations.float()
    if query.dtype == torch.float16:
        products = products.clamp(-65504, 65504)
    return products.to(query.dtype).float()


def mean_logits(query, fields, scale) -> torch.Tensor:
    """Logits of the mean keys.

    Args:
        query: [..., group, head_size].
        fields: ``IndexFields``, [..., C] and [..., D].

    Returns:
        [..., group, num_clusters] fp32.
    """
    codes = short_means.unpack(
        fields.key_codes, fields.num_clusters, fields.head_size, of_keys=True
    )
    deviating = deviating_query(query, fields.key_deviations[..., None, :])
    of_codes = deviating @ (codes - short_means.MIDDLE).mT
    of_base = (query.float() * fields.key_base.float()[..., None, :]).sum(-1)
    steps = fields.key_steps.float()[..., None, :]
    return scale * (of_base[..., None] + steps * of_codes)


def spread_score(squares, fields, scale) -> torch.Tensor:
    """What the spread of its keys adds to a cluster's score.

    exp() makes the weights of keys around a mean sum to more than the mean's. Of
    normal logits that is half their variance more in the logarithm, which overshoots,
    since few keys cannot have a normal distribution's tail.

    Args:
        squares: [..., head_size] fp32, ``query_squares``.
        fields: ``IndexFields``, [..., C] and [..., D].

    Returns:
        [..., num_clusters] fp32.
    """
    variances = (squares * fields.profile.float()).sum(-1, keepdim=True)
    variances = variances * (scale * fields.radii.float()) ** 2
    return (SPREAD_WEIGHT * ((1 + variances).sqrt() - 1)).clamp(max=SPREAD_MOST)


def spread_rows(keys, num_clusters) -> torch.Tensor:
    """Rows far from each other: the first, then again and again the one whose largest
    cosine to those chosen is least, ties to the lowest.

    [..., num_rows, head_size] fp32 -> [..., num_clusters] int64. A key that is zero, or
    not finite, has no direction, and is chosen only if it is the first.
    """
    norms = keys.norm(dim=-1, keepdim=True)
    has_direction = (norms > 0) & norms.isfinite()
    directions = torch.where(has_direction, keys / norms, 0)
    rows = [torch.zeros(keys.shape[:-2], dtype=torch.int64, device=keys.device)]
    nearest = torch.where(has_direction[..., 0], float("-inf"), float("inf"))
    for _ in range(num_clusters - 1):
        chosen = directions.take_along_dim(rows[-1][..., None, None], -2)
        nearest = torch.maximum(nearest, (directions @ chosen.mT)[..., 0])
        rows.append(first_argmax(-nearest))
    return torch.stack(rows, -1)


def first_argmax(similarity) -> torch.Tensor:
    """argmax over the last dimension, ties to the lowest index."""
    is_max = similarity == similarity.amax(-1, keepdim=True)
    return is_max.int().argmax(-1)


def score_clusters(
    query,
    kv_cache,
    index,
    block_table,
    seq_lens,
    min_sparse_lens,
    scale,
    num_sink_tokens,
    scores,
    softmax_sums,
    index_table=None,
) -> None:
    """See ``ops.score_clusters``."""
    num_reqs, num_heads, _ = query.shape
    group = num_heads // kv_cache.shape[1]
    for req in range(num_reqs):
        if seq_lens[req] < min_sparse_lens[req]:
            continue
        num_pages = _num_indexed(seq_lens, req, kv_cache.shape[2])
        fields = _row_fields(index, kv_cache, block_table, index_table, req, num_pages)
        for head in range(num_heads):
            of_head = fields[:, head // group]
            q = query[req, head]
            row = mean_logits(q[None], of_head, scale)[:, 0]  # [pages, num_clusters]
            row = row + spread_score(query_squares(q), of_head, scale)
            counts = cluster_sizes(of_head.cluster_ends, num_sink_tokens)
            scores[req, head, : len(counts)] = row.flatten()
            sums = sums_of_parts(
                row.flatten(), counts, softmax_sums.shape[2], fields.num_clusters
            )
            softmax_sums[req, head, : len(sums)] = sums


def sums_of_parts(scores, counts, num_parts, num_clusters) -> torch.Tensor:
    """Max and sum of the softmax of each part's clusters.

    Args:
        scores: [..., num_row_clusters] fp32.
        counts: [num_row_clusters] int64.
        num_parts: Page ``i`` belongs to part ``i % num_parts``.
        num_clusters: Clusters a page.

    Returns:
        [..., min(num_parts, num_pages), 2] fp32: max of the scores of clusters with
        tokens, and sum of ``count * exp(score - max)``; -inf and 0 where a part has no
        tokens.
    """
    pages = torch.arange(len(counts), device=counts.device) // num_clusters
    logits = torch.where(counts > 0, scores, float("-inf"))
    found = scores.new_empty(
        *scores.shape[:-1], min(num_parts, len(counts) // num_clusters), 2
    )
    for part in range(found.shape[-2]):
        is_own = pages % num_parts == part
        highest = logits[..., is_own].amax(-1)
        origin = torch.where(highest == float("-inf"), 0.0, highest)[..., None]
        terms = counts[is_own] * torch.exp(logits[..., is_own] - origin)
        found[..., part, :] = torch.stack([highest, terms.sum(-1)], -1)
    return found


def select_clusters(
    scores,
    softmax_sums,
    kv_cache,
    index,
    block_table,
    seq_lens,
    min_sparse_lens,
    num_sink_tokens,
    token_budget,
    selected,
    num_attended,
    index_table=None,
) -> None:
    """See ``ops.select_clusters``. Weights come from the scores alone."""
    num_reqs, num_heads, _ = scores.shape
    num_kv_heads, block_size = kv_cache.shape[1:3]
    group = num_heads // num_kv_heads
    for req in range(num_reqs):
        if seq_lens[req] < min_sparse_lens[req]:
            num_attended[req] = seq_lens[req]
            continue
        num_pages = _num_indexed(seq_lens, req, block_size)
        fields = _row_fields(index, kv_cache, block_table, index_table, req, num_pages)
        ends = fields.cluster_ends
        for head in range(num_kv_heads):
            counts = cluster_sizes(ends[:, head], num_sink_tokens)
            clustered = int(counts.sum())
            row = scores[req, head * group : (head + 1) * group, : len(counts)]
            weights = rank_weights(row, counts)
            taken = 0
            chosen = torch.zeros(len(counts), dtype=torch.uint8)
            for cluster in torch.argsort(weights, descending=True, stable=True):
                if taken >= token_budget and clustered > token_budget:
                    break
                chosen[cluster] = 1
                taken += int(counts[cluster])
            if clustered > token_budget:
                chosen[counts.cpu() == 0] = 0
            selected[req, head, : len(counts)] = chosen.to(selected.device)
            always = int(seq_lens[req]) - clustered
            num_attended[req, head] = always + taken


def rank_weights(scores, counts) -> torch.Tensor:
    """Weight a token of each cluster, summed over the group's query heads.

    Args:
        scores: [group, num_row_clusters] fp32.
        counts: [num_row_clusters] int64.

    Returns:
        [num_row_clusters] fp32; -1 for an empty cluster.
    """
    logits = torch.where(counts > 0, scores, float("-inf"))
    exps = torch.exp(logits - logits.amax(1, keepdim=True)) if len(counts) else logits
    weights = (exps / (exps * counts).sum(1, keepdim=True)).sum(0)
    return torch.where(counts > 0, weights, -1.0)


def sparse_decode(
    query,
    kv_cache,
    index,
    block_table,
    seq_lens,
    min_sparse_lens,
    scores,
    selected,
    scale,
    num_sink_tokens,
    tail_estimate,
    workspace,
    output,
    index_table=None,
    host_cache=None,
    line_table=None,
) -> None:
    """See ``ops.sparse_decode``. ``workspace`` is not used."""
    num_reqs, num_heads, head_size = query.shape
    num_kv_heads, block_size = kv_cache.shape[1:3]
    group = num_heads // num_kv_heads
    for req in range(num_reqs):
        seq_len = int(seq_lens[req])
        if seq_len == 0:
            output[req] = 0
            continue
        is_dense = seq_len < int(min_sparse_lens[req])
        num_pages = _num_indexed(seq_lens, req, block_size)
        fields = _row_fields(index, kv_cache, block_table, index_table, req, num_pages)
        num_clusters, ends = fields.num_clusters, fields.cluster_ends
        mean_values = fields.mean_values()
        blocks = block_table[req, : num_pages + 1].tolist()
        for head in range(num_heads):
            kv_head = head // group
            q = query[req, head].float()
            logits: list[torch.Tensor] = []
            values: list[torch.Tensor] = []

            def attend(rows, q=q, logits=logits, values=values):
                logits.append(scale * (rows[:, :head_size].float() @ q))
                values.append(rows[:, head_size:].float())

            for i, block in enumerate(blocks[:-1]):
                page = kv_cache[block] if block >= 0 else host_cache[-1 - block]
                if block < 0 and line_table is not None:
                    page = _with_lines(page, line_table[-1 - block], kv_cache)
                if is_dense:
                    attend(page[kv_head])
                    continue
                start = num_sink_tokens if i == 0 else 0
                attend(page[kv_head, :start])
                for c in range(num_clusters):
                    cluster = i * num_clusters + c
                    end = int(ends[i, kv_head, c])
                    count = end - start
                    if selected[req, kv_head, cluster]:
                        attend(page[kv_head, start:end])
                    elif tail_estimate and count > 0:
                        log_count = torch.log(torch.tensor(float(count)))
                        logits.append(scores[req, head, cluster, None] + log_count)
                        values.append(mean_values[i, kv_head, c, None])
                    start = end
            tail_rows = seq_len - num_pages * block_size
            attend(kv_cache[blocks[-1], kv_head, :tail_rows])
            weights = torch.softmax(torch.cat(logits), 0)  # [num_attended_rows]
            output[req, head] = (weights @ torch.cat(values)).to(output.dtype)


def _with_lines(host_page, lines, kv_cache) -> torch.Tensor:
    """A copy of a host page with the lines that kv_cache has from there."""
    page = host_page.clone()
    for head, line in (lines >= 0).nonzero().tolist():
        rows = slice(line * LINE_ROWS, (line + 1) * LINE_ROWS)
        page[head, rows] = _line(kv_cache, int(lines[head, line]), head)
    return page


def _line(kv_cache, line, head) -> torch.Tensor:
    """[LINE_ROWS, 2 * head_size], a view."""
    block, at = divmod(line, LINES_PER_PAGE)
    return kv_cache[block, head, at * LINE_ROWS : (at + 1) * LINE_ROWS]


def recall(
    selected,
    scores,
    kv_cache,
    index,
    block_table,
    seq_lens,
    min_sparse_lens,
    num_sink_tokens,
    index_table,
    host_cache,
    row_slots,
    hot_blocks,
    line_table,
    hot_lines,
    hot_order,
    counters,
) -> None:
    """See ``ops.recall``."""
    num_reqs, num_kv_heads, _ = selected.shape
    for req in range(num_reqs):
        slot = int(row_slots[req])
        if slot < 0 or seq_lens[req] < min_sparse_lens[req]:
            continue
        num_pages = _num_indexed(seq_lens, req, kv_cache.shape[2])
        fields = _row_fields(index, kv_cache, block_table, index_table, req, num_pages)
        ends = fields.cluster_ends
        blocks = block_table[req].tolist()
        for head in range(num_kv_heads):
            chosen = selected[req, head].view(len(blocks), -1)
            needed = []
            for page in range(num_pages):
                if blocks[page] < 0:
                    sinks = num_sink_tokens if page == 0 else 0
                    lines = _selected_lines(ends[page, head], chosen[page], sinks)
                    needed += [page * LINES_PER_PAGE + line for line in sorted(lines)]

            held, order = hot_lines[slot, head].tolist(), hot_order[slot, head].tolist()
            used = [position for position in order if held[position] in set(needed)]
            others = [position for position in order if position not in set(used)]
            missing = [line for line in needed if line not in set(held)]
            replaced = others[: len(missing)]

            def entry(line, head=head, blocks=blocks):
                page, at = divmod(line, LINES_PER_PAGE)
                return -1 - blocks[page], head, at

            for position, line in zip(replaced, missing):  # noqa: B905
                if held[position] >= 0:
                    line_table[entry(held[position])] = -1
                hot_block, at = divmod(position, LINES_PER_PAGE)
                where = int(hot_blocks[slot, hot_block]) * LINES_PER_PAGE + at
                line_table[entry(line)] = where
                hot_lines[slot, head, position] = line
                host_page, _, first = entry(line)
                rows = slice(first * LINE_ROWS, (first + 1) * LINE_ROWS)
                _line(kv_cache, where, head)[:] = host_cache[host_page, head, rows]
            order = others[len(replaced) :] + used + replaced
            hot_order[slot, head] = torch.tensor(order, dtype=torch.int32)
            num_left = len(missing) - len(replaced)
            counts = [len(used), len(replaced), num_left, 1, 0, 0, 0]
            if seq_lens[req] % MASS_EVERY == 1 and num_pages:
                group = scores.shape[1] // num_kv_heads
                of_heads = scores[req, head * group : (head + 1) * group].float()
                mass = _selected_mass(of_heads, chosen, ends[:, head], num_sink_tokens)
                counts[-2:] = [round(mass / MASS_UNIT), 1]
            counters += torch.tensor(counts, device=counters.device)


def _selected_mass(scores, selected, ends, num_sink_tokens) -> float:
    """Share of the clusters' weight that selected ones have, mean over query heads."""
    counts = cluster_sizes(ends, num_sink_tokens)
    scores = scores[:, : len(counts)].masked_fill(counts == 0, float("-inf"))
    weights = torch.softmax(scores + counts.log(), -1)
    return float((weights * selected.flatten()[: len(counts)]).sum(-1).mean())


def _selected_lines(ends, selected, num_sinks) -> set[int]:
    """Lines of a page that have rows of its selected clusters."""
    lines, start = set(), num_sinks
    for end, is_selected in zip(ends.tolist(), selected.tolist(), strict=True):
        if is_selected and end > start:
            lines |= set(range(start // LINE_ROWS, (end - 1) // LINE_ROWS + 1))
        start = end
    return lines


def cluster_sizes(cluster_ends, num_sink_tokens) -> torch.Tensor:
    """Tokens of each cluster of a row's indexed pages.

    Args:
        cluster_ends: [num_pages, num_clusters] int16, in the row's page order.
        num_sink_tokens: Unclustered rows at the start of the first page.

    Returns:
        [num_pages * num_clusters] int64.
    """
    ends = cluster_ends.long()
    starts = torch.zeros_like(ends)
    starts[:, 1:] = ends[:, :-1]
    if len(ends):
        starts[0, 0] = num_sink_tokens
    return (ends - starts).reshape(-1)


def _num_indexed(seq_lens, req, block_size) -> int:
    return max(int(seq_lens[req]) - 1, 0) // block_size


def _fields(index, kv_cache) -> IndexFields:
    return IndexFields.of(index, kv_cache.shape[3] // 2, kv_cache.dtype)


def _row_fields(
    index, kv_cache, block_table, index_table, req, num_pages
) -> IndexFields:
    """Of the indexes of a row's pages, [num_pages, num_kv_heads, ...]."""
    if index_table is None:
        indexes = index[block_table[req, :num_pages].long()]
    else:
        places = index_table[req, :num_pages].tolist()
        indexes = index.new_empty((num_pages, *index.shape[1:]))
        for own, place in zip(indexes, places, strict=True):
            own.copy_(_index_at(index, place))
    return _fields(indexes, kv_cache)


def _index_at(index, place) -> torch.Tensor:
    """What is ``place`` units behind that of block 0."""
    offset = index.storage_offset() + place * INDEX_UNIT
    return index.as_strided(index.shape[1:], index.stride()[1:], offset)
