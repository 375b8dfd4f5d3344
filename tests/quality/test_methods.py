# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_clusterkv project
"""The methods of the quality evaluation choose what they should."""

import copy
from typing import Any

import pytest
import torch

from benchmarks.quality.methods import METHODS, kmeans, make_method
from benchmarks.quality.methods.attention import attend, exact_logits
from benchmarks.quality.methods.groups import take_groups
from benchmarks.quality.methods.votes import rank
from vllm_clusterkv import ops, reference
from vllm_clusterkv.config import ClusterKVConfig
from vllm_clusterkv.page_layout import IndexFields, PageLayout

SCALE = 0.125
CHOOSING = [name for name in METHODS if name != "full"]


def context(seq_len, num_kv_heads=2, group=3, head_size=64, seed=0):
    """Keys with topics in them, values, and a query that asks for one topic."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    topics = 2 * normal(num_kv_heads, 40, head_size)
    topic = torch.randint(40, (seq_len,), generator=generator)
    keys = topics[:, topic] + normal(num_kv_heads, seq_len, head_size)
    query = 0.5 * topics[:, 7].repeat_interleave(group, 0)
    query = query + normal(num_kv_heads * group, head_size)
    return query, keys, normal(num_kv_heads, seq_len, head_size)


def index_of(spec, keys, values) -> Any:
    index = make_method(spec).index(SCALE)
    index.update(keys, values)
    return index


def select(spec, query, keys, values, token_budget):
    return index_of(spec, keys, values).select(query, token_budget)


def mass_of(selection, query, keys):
    weights = exact_logits(query, keys, SCALE).softmax(2)
    return (weights * selection.mask[:, None]).sum(2).mean()


@pytest.mark.parametrize("name", CHOOSING)
def test_sinks_last_page_and_no_more_than_the_budget(name):
    query, keys, values = context(1000)
    selection = select(name, query, keys, values, 128)
    assert selection.mask[:, :16].all() and selection.mask[:, 768:].all()
    chosen = selection.mask[:, 16:768].sum(1)
    # The product may exceed the budget by less than the last cluster.
    most = 128 + 100 if name.startswith("ours") else 128
    assert (chosen >= 128).all() and (chosen <= most).all()


@pytest.mark.parametrize("name", METHODS)
def test_a_covering_budget_is_exact(name):
    query, keys, values = context(600)
    selection = select(name, query, keys, values, 600)
    assert selection.mask.all()
    logits = exact_logits(query, keys, SCALE)
    exact = (logits.softmax(2) @ values).flatten(0, 1)
    torch.testing.assert_close(attend(selection, logits, values), exact)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("seq_len", [1, 16, 40, 256, 257])
def test_short_contexts(name, seq_len):
    query, keys, values = context(seq_len)
    selection = select(name, query, keys, values, 8)
    assert selection.mask.shape == (2, seq_len) and selection.mask[:, -1].all()
    if seq_len <= 256:
        assert selection.mask.all()


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("seed", range(3))
def test_the_oracle_captures_most(name, seed):
    query, keys, values = context(1000, seed=seed)
    selection = select(name, query, keys, values, 64)
    # As many tokens as the method had, which may exceed its budget.
    tokens = int(selection.num_attended.max()) - 16 - 232
    best = select("oracle", query, keys, values, tokens)
    assert mass_of(best, query, keys) >= mass_of(selection, query, keys) - 1e-6


# Of those that do not cluster the prompt as a whole.
GROWING = [name for name in METHODS if not make_method(name).depends_on_prompt]


@pytest.mark.parametrize("name", GROWING)
def test_one_token_at_a_time_is_as_at_once(name):
    query, keys, values = context(1100)
    grown = make_method(name).index(SCALE)
    for seq_len in range(500, 1101):
        grown.update(keys[:, :seq_len], values[:, :seq_len])
    actual = grown.select(query, 128)
    expected = select(name, query, keys, values, 128)
    assert torch.equal(actual.mask, expected.mask)
    assert actual.index_bytes == expected.index_bytes
    if expected.extra_logits is not None:
        torch.testing.assert_close(actual.extra_logits, expected.extra_logits)
        torch.testing.assert_close(actual.extra_values, expected.extra_values)


@pytest.mark.parametrize("name", METHODS)
def test_a_copy_grows_on_its_own(name):
    query, keys, values = context(1400)
    index = make_method(name).index(SCALE)
    index.update(keys[:, :800], values[:, :800])
    before = index.select(query, 128)
    copy.copy(index).update(keys, values)
    assert torch.equal(index.select(query, 128).mask, before.mask)


def test_window_takes_the_most_recent():
    query, keys, values = context(1000)
    selection = select("window", query, keys, values, 100)
    chosen = selection.mask[0].nonzero()[:, 0].tolist()
    assert chosen == [*range(16), *range(668, 1000)]


def hidden_key(position, strength=8.0):
    """Keys of noise, but for one that the query asks for."""
    query, keys, values = context(1000, num_kv_heads=1, group=1)
    keys = 0.1 * torch.randn(keys.shape, generator=torch.Generator().manual_seed(1))
    query = torch.nn.functional.normalize(query, dim=1)
    keys[0, position] = strength * query[0]
    return 8 * query, keys, values


@pytest.mark.parametrize("name", [name for name in CHOOSING if name != "window"])
def test_a_single_key_is_found(name):
    query, keys, values = hidden_key(300)
    assert select(name, query, keys, values, 80).mask[0, 300]


def test_small_pages_are_taken_whole():
    query, keys, values = hidden_key(300)
    for name in ("quest", "page-mean", "page-mean-std"):
        mask = select(name, query, keys, values, 16).mask
        chosen = mask[0, 16:768].nonzero()[:, 0] + 16
        assert chosen.tolist() == list(range(288, 304))


def test_quest_is_a_bound():
    query, keys, values = context(1000)
    index = index_of("quest", keys, values)
    bound = index._scores(query.unflatten(0, (2, 3)))  # [2, 3, 48]
    highest = exact_logits(query, keys, SCALE)[..., :768].unflatten(2, (48, 16)).amax(3)
    assert (bound >= highest - 1e-4).all()


def test_page_mean_std_of_equal_keys_is_page_mean():
    query, keys, values = context(1000)
    keys = keys[:, torch.arange(1000) // 16 * 16]
    deviations = index_of("page-mean-std", keys, values)
    means = index_of("page-mean", keys, values)
    grouped = query.unflatten(0, (2, 3))
    torch.testing.assert_close(deviations._scores(grouped), means._scores(grouped))


def test_clusterkv_clusters_windows_of_generated_tokens():
    query, keys, values = context(2000)
    index = index_of("clusterkv-published", keys[:, :976], values[:, :976])
    assert index.mean_keys.shape[1] == 960 // 80
    index.update(keys[:, :1295], values[:, :1295])
    assert index.labels.shape[1] == 976  # 319 wait, and are attended to
    assert index.select(query, 64).mask[:, 976:].all()
    index.update(keys[:, :1296], values[:, :1296])
    assert index.labels.shape[1] == 1296 and index.mean_keys.shape[1] == 12 + 4
    index.update(keys, values)
    assert index.labels.shape[1] == 1936 and index.mean_keys.shape[1] == 12 + 12
    chosen = index.select(query, 64).mask
    assert (chosen[:, 16:1792].sum(1) == 64).all() and chosen[:, 1792:].all()


def test_clusterkv_cuts_the_last_cluster_in_token_order():
    labels = torch.tensor([[-1, 0, 1, 0, 1, 1, 2]])
    counts = torch.tensor([[2, 3, 1]])
    ranks = torch.tensor([[5.0, 4, 3]])
    cut = take_groups(ranks, labels, counts, 3, trim=True)
    assert cut.int().tolist() == [[1, 1, 1, 1, 0, 0, 0]]
    whole = take_groups(ranks, labels, counts, 3, trim=False)
    assert whole.int().tolist() == [[1, 1, 1, 1, 1, 1, 0]]
    fits = take_groups(ranks, labels, counts, 2, trim=False)
    assert fits.int().tolist() == [[1, 1, 0, 1, 0, 0, 0]]


def product(tokens_per_cluster, tail, query, keys, values, token_budget):
    """The product's reference over pages: mask by position, and output."""
    num_kv_heads, seq_len, head_size = keys.shape
    num_heads, num_clusters = len(query), 256 // tokens_per_cluster
    num_pages = (seq_len - 1) // 256
    max_clusters = (num_pages + 1) * num_clusters
    cache = torch.zeros(num_pages + 1, num_kv_heads, 256, 2 * head_size)
    rows = torch.cat([keys, values], 2)
    # A last element of the values, which nothing looks at: the row's position.
    rows[..., -1] = torch.arange(seq_len)
    padding = (0, 0, 0, (num_pages + 1) * 256 - seq_len)
    rows = torch.nn.functional.pad(rows, padding)
    cache.copy_(rows.unflatten(1, (-1, 256)).transpose(0, 1))
    layout = PageLayout(num_kv_heads, head_size, num_clusters, torch.float32)
    shape = (num_pages + 1, num_kv_heads, layout.index_bytes)
    index = torch.zeros(shape, dtype=torch.uint8)
    blocks = torch.arange(num_pages + 1, dtype=torch.int32)
    sinks = torch.zeros(num_pages, dtype=torch.int32)
    sinks[:1] = 16
    num_iters = ClusterKVConfig().num_iters
    reference.index_pages(cache, index, blocks[:-1], sinks, num_iters)
    ends = IndexFields.of(index, head_size, torch.float32).cluster_ends
    scores = torch.zeros(1, num_heads, max_clusters)
    sums = torch.zeros(1, num_heads, 3, 2)
    selected = torch.zeros(1, num_kv_heads, max_clusters, dtype=torch.uint8)
    attended = torch.zeros(1, num_kv_heads, dtype=torch.int32)
    pages = (cache, index, blocks[None])
    row = (torch.tensor([seq_len], dtype=torch.int32), torch.zeros(1).int())
    query = query[None]
    reference.score_clusters(query, *pages, *row, SCALE, 16, scores, sums)
    choice = (token_budget, selected, attended)
    reference.select_clusters(scores, sums, *pages, *row, 16, *choice)
    output = torch.zeros_like(query)
    rest = (scores, selected, SCALE, 16, tail, torch.empty(0), output)
    reference.sparse_decode(query, *pages, *row, *rest)
    mask = torch.ones(num_kv_heads, seq_len, dtype=torch.bool)
    for head in range(num_kv_heads):
        for page in range(num_pages):
            start = 16 if page == 0 else 0
            for c in range(num_clusters):
                end = int(ends[page, head, c])
                positions = cache[page, head, start:end, -1].long()
                mask[head, positions] = bool(selected[0, head, page * num_clusters + c])
                start = end
    return mask, attended[0], output[0]


@pytest.mark.parametrize("tokens_per_cluster", [4, 8, 16])
@pytest.mark.parametrize("name", ["ours", "ours-tail"])
def test_ours_is_the_product(name, tokens_per_cluster):
    query, keys, values = context(1300)
    keys[..., ::4] *= 8  # some dimensions differ more, as in models
    values[..., -1] = torch.arange(1300)  # as product() has it
    arguments = (query, keys, values, 100)
    tail = name == "ours-tail"
    mask, attended, output = product(tokens_per_cluster, tail, *arguments)
    spec = f"{name}:tokens_per_cluster={tokens_per_cluster}"
    selection = select(spec, *arguments)
    assert torch.equal(selection.mask, mask)
    assert torch.equal(selection.num_attended, attended.long())
    logits = exact_logits(query, keys, SCALE)
    actual = attend(selection, logits, values)
    torch.testing.assert_close(actual, output, rtol=1e-4, atol=1e-4)


def test_spreads_and_smaller_clusters_come_near_exact_scores():
    query, keys, values = context(1300)
    keys[..., ::4] *= 4  # as in models, some dimensions differ more than others
    grouped = query.unflatten(0, (keys.shape[0], -1))
    weights = exact_logits(query, keys, SCALE).exp()

    def error(spec):
        index = index_of(spec, keys, values)
        scores = index._scores(grouped)
        errors = []
        for head, labels in enumerate(index.labels):
            for cluster in labels[labels >= 0].unique():
                members = weights[head, :, : len(labels)][:, labels == cluster]
                errors.append(scores[head, :, cluster] - members.mean(1).log())
        return torch.stack(errors).abs().mean()

    assert (
        error("ours:tokens_per_cluster=4")
        < error("ours:tokens_per_cluster=8")
        < error("ours:tokens_per_cluster=8,spread=false")
    )


@pytest.mark.parametrize("tokens_per_cluster", [4, 16])
def test_short_means_are_near_and_counted(tokens_per_cluster):
    query, keys, values = context(1000)
    keys[..., ::8] *= 50  # as models have it: must not hide the other dimensions
    num_clusters = 256 // tokens_per_cluster
    spec = f"ours-tail:tokens_per_cluster={tokens_per_cluster}"
    exact = index_of(f"{spec},mean_bits=16", keys, values)
    index = index_of(spec, keys, values)
    assert torch.equal(index.labels, exact.labels)
    for name in ("mean_keys", "mean_values"):
        pages = [
            getattr(i, name).unflatten(1, (-1, num_clusters)) for i in (index, exact)
        ]
        deviations = pages[1].std(2, keepdim=True)
        off = ((pages[0] - pages[1]) / deviations).abs()
        assert off.mean() < 0.15 and off.max() < 1
    chosen = index.select(query, 128)
    # Three pages of 64 dimensions; steps; base, deviations, profile; radii, ends.
    of_keys = num_clusters * (64 / 2 + 2) + 3 * 64 * 2
    assert chosen.index_bytes == 3 * (of_keys + num_clusters * (2 + 2))
    assert chosen.extra_value_bytes == 64 / 2 + 2


def test_short_means_are_the_products_in_16_bits():
    """Also where keys are far from zero, as some models' are by a bias."""
    _, keys, values = context(1300)
    keys[..., :4] += 200
    keys, values = keys.bfloat16(), values.bfloat16()
    ours = index_of("ours-tail", keys, values)
    config = ClusterKVConfig()
    num_kv_heads, _, head_size = keys.shape
    layout = PageLayout(num_kv_heads, head_size, config.num_clusters, keys.dtype)
    rows = torch.cat([keys, values], 2)[:, :1280].unflatten(1, (5, 256))
    cache = rows.transpose(0, 1).contiguous()
    index = torch.zeros(5, num_kv_heads, layout.index_bytes, dtype=torch.uint8)
    sinks = torch.tensor([16, 0, 0, 0, 0], dtype=torch.int32)
    blocks = torch.arange(5, dtype=torch.int32)
    ops.index_pages(cache, index, blocks, sinks, config.num_iters)
    fields = IndexFields.of(index, head_size, keys.dtype)
    for name in ("mean_keys", "mean_values"):
        expected = getattr(fields, name)().transpose(0, 1).flatten(1, 2)
        off = (getattr(ours, name) - expected).abs()
        # Sums in another order may round to the next code, here and there.
        assert (off > 0.01).float().mean() < 0.01 and off.max() < 2


def test_ours_clusters_alike_with_and_without_the_op(monkeypatch):
    query, keys, values = context(1300)
    expected = index_of("ours", keys, values)
    monkeypatch.setattr(ops, "index_pages", None)
    monkeypatch.setattr("benchmarks.quality.methods.ours.has_kernel", lambda *_: False)
    actual = index_of("ours", keys, values)
    assert torch.equal(actual.labels, expected.labels)


@pytest.mark.parametrize("init", kmeans.INITS)
def test_k_means_finds_clusters_that_are_there(init):
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(4, (64,), generator=generator)
    keys = torch.eye(8)[labels] * (1 + torch.rand(64, 1, generator=generator))
    keys[:4] *= 3  # lengths do not matter
    found = kmeans.cluster_keys(keys[None], 16, 8, init)[0]
    for cluster in found.unique():
        assert len(labels[found == cluster].unique()) == 1


def test_a_key_unlike_the_others_starts_a_cluster():
    keys = torch.randn(256, 64, generator=torch.Generator().manual_seed(0)) + 2
    keys[100] *= -1
    labels = kmeans.cluster_keys(keys[None], 16, 8, "farthest")[0]
    assert (labels == labels[100]).sum() == 1


def test_k_means_is_the_references():
    keys = torch.randn(5, 240, 64, generator=torch.Generator().manual_seed(0))
    actual = kmeans.cluster_keys(keys, 16, 4)
    expected = [reference.cluster_keys(page, 16, 4) for page in keys]
    assert torch.equal(actual, torch.stack(expected))


def test_votes():
    scores = torch.tensor([[[0.0, 2.6, 1], [0.0, -9, 1]]])
    counts = torch.tensor([[4, 4, 4]])

    def best(vote, counts=counts):
        return rank(scores, counts, vote).argmax(1).item()

    assert best("max") == 1 and best("mean") == 2
    assert best("softmax") == 2 and best("softmax-max") == 1
    assert best("max", torch.tensor([[4, 0, 4]])) == 2
    with pytest.raises(ValueError, match="vote must be one of"):
        rank(scores, counts, "most")


def test_bytes_moved():
    query, keys, values = context(1000)
    row_bytes = 64 * 2
    full = select("full", query, keys, values, 0)
    assert full.bytes_moved(64) == 1000 * 2 * row_bytes
    quest = select("quest", query, keys, values, 128)
    attended = (16 + 128 + 232) * 2 * row_bytes
    assert quest.bytes_moved(64) == 48 * 2 * row_bytes + attended
    mean = select("page-mean:tail=true", query, keys, values, 128)
    # 47 small pages have tokens beside the sinks; those left out bring a value.
    assert mean.bytes_moved(64) == 48 * row_bytes + attended + (47 - 8) * row_bytes


def test_settings_from_text():
    method: Any = make_method("ours-tail:page_size=512,vote=max,tail=false")
    assert (method.page_size, method.vote, method.tail) == (512, "max", False)
    for wrong, message in {
        "best": "method must be one of",
        "ours:pages=3": "ours has the settings",
        "ours:tail=1": "tail must be true or false",
        "ours:vote=most": "vote must be one of",
        "ours:num_iters=x": "num_iters must be of type int",
        "ours:tokens_per_cluster=24": "tokens_per_cluster must divide",
        "ours:mean_bits=2": "mean_bits must be 4 or 16, got 2",
        "ours:tokens_per_cluster=0": "tokens_per_cluster must be at least 1",
        "ours:num_clusters=3": "ours has the settings",
        "ours:num_iters=-1": "num_iters must be at least 1",
        "quest:tokens_per_group=0": "tokens_per_group must be at least 1",
        "window:page_size=0": "page_size must be at least 1",
        "oracle:num_sink_tokens=-1": "num_sink_tokens must be at least 0",
        "clusterkv-published:init=best": "init must be one of",
        "ours:tokens_per_cluster=32": "got 4 with 8 clusters",
    }.items():
        with pytest.raises(ValueError, match=message):
            make_method(wrong)
