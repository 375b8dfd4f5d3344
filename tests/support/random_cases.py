# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_clusterkv project
"""Batches drawn at random: every setting of the ops, and rows that share pages."""

import random
from dataclasses import dataclass

import torch

from tests.support import cases
from tests.support.inputs import DecodeInputs, Pages, with_gaps
from vllm_clusterkv.page_layout import BLOCK_SIZE, PageLayout

MAX_CONTEXT = 3000
_CPU_HEAD_SIZES = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256)
_MAX_PAGE_ELEMENTS = 16384  # rows * pages * KV heads * head size, which costs the time


@dataclass(frozen=True)
class RandomCase(cases.DecodeCase):
    """A ``DecodeCase`` and what the named cases leave alone.

    Attributes:
        num_shared_pages: Complete pages that all rows have in common, if they have
            that many.
        spread: Multiplies the softmax scale: the larger, the fewer tokens matter.
        has_gaps: Whether query and block table are strided views.
        key_noise: Length of a key's noise beside the direction of its topic.
    """

    num_iters: int = 8
    tail_estimate: bool = True
    num_shared_pages: int = 0
    spread: float = 1.0
    has_gaps: bool = True
    key_noise: float = 1.0

    __str__ = object.__str__


def draw_case(seed: int, device: str) -> RandomCase:
    """The case of a seed; it depends on the device's kernels, too."""
    rng = random.Random(seed)
    on_cpu = device == "cpu"
    head_size = rng.choice(_CPU_HEAD_SIZES if on_cpu else cases.CUDA_HEAD_SIZES)
    num_kv_heads = rng.choice([1, 2, 2, 3, 4])
    num_pages = _MAX_PAGE_ELEMENTS // (head_size * num_kv_heads)
    seq_lens = [_draw_length(rng) for _ in range(rng.choice([0, 1, 1, 2, 3, 4, 6]))]
    while seq_lens and len(seq_lens) * (max(seq_lens) // BLOCK_SIZE + 2) > num_pages:
        seq_lens.pop()
    num_sink_tokens = rng.choice([0, 1, 16, 16, rng.randrange(BLOCK_SIZE)])
    clustered = [
        max(num_tokens - 1, 0) // BLOCK_SIZE * BLOCK_SIZE - num_sink_tokens
        for num_tokens in seq_lens
    ]
    exact = max([1, *clustered])
    return RandomCase(
        seq_lens=tuple(seq_lens),
        dtype=rng.choice(cases.DTYPES if on_cpu else cases.CUDA_DTYPES),
        head_size=head_size,
        num_kv_heads=num_kv_heads,
        group=rng.randint(1, cases.CUDA_MAX_GROUP),
        tokens_per_cluster=rng.choice([4, 8, 16]),
        num_sink_tokens=num_sink_tokens,
        token_budget=rng.choice(
            [1, rng.randint(1, 300), rng.randint(1, MAX_CONTEXT), exact, 2**30]
        ),
        num_splits=rng.choice([1, 2, 3, 8, rng.randint(1, 20)]),
        min_sparse_lens=tuple(
            rng.choice([0, 0, 0, num_tokens, num_tokens + 1, cases.INT_MAX])
            for num_tokens in seq_lens
        ),
        num_iters=rng.randint(1, 8),
        tail_estimate=rng.random() < 0.7,
        num_shared_pages=rng.choice([0, 0, 1, 3]),
        spread=rng.choice([1.0, 1.0, 3.0, 10.0]),
        has_gaps=rng.random() < 0.5,
        key_noise=rng.choice([0.3, 1.0, 3.0]),
        num_parts=rng.choice([1, 2, 3, 16, MAX_CONTEXT]),
    )


def _draw_length(rng: random.Random) -> int:
    at_a_boundary = BLOCK_SIZE * rng.randint(1, MAX_CONTEXT // BLOCK_SIZE)
    return rng.choice(
        [
            0,
            rng.randint(1, BLOCK_SIZE),
            at_a_boundary + rng.randint(-1, 1),
            rng.randint(1, MAX_CONTEXT),
            rng.randint(1, MAX_CONTEXT),
        ]
    )


def make_random_inputs(
    case: RandomCase, seed: int, device: str
) -> tuple[DecodeInputs, torch.Tensor, torch.Tensor]:
    """A batch whose pages are not indexed yet, made on the device.

    The first value of a cached row is its number in its page, so that a permutation
    can be read off.

    Returns:
        The inputs; then, as ``index_pages`` takes them, the pages that the sparse rows
        need indexed, with -1 among them, and their sinks.
    """
    rng = random.Random(seed)
    generator = torch.Generator(device).manual_seed(seed)
    layout = PageLayout(
        case.num_kv_heads,
        case.head_size,
        BLOCK_SIZE // case.tokens_per_cluster,
        case.dtype,
    )
    table, filled, indexed = _draw_block_table(case, rng)
    num_blocks = 2 + max(filled, default=0)
    pages = Pages.poisoned(layout, num_blocks, device)
    _fill_pages(case, pages, filled, generator)
    with_skips = [*indexed.items(), *[(-1, 0)] * rng.randint(0, 2)]
    rng.shuffle(with_skips)
    to_index = torch.tensor(with_skips, dtype=torch.int32, device=device).view(-1, 2)
    shape = (len(table), case.num_kv_heads * case.group, case.head_size)
    query = torch.randn(shape, generator=generator, device=device).to(case.dtype)
    max_blocks = max(map(len, table), default=0) + 1
    block_table = torch.full((len(table), max_blocks), num_blocks - 1).int()
    for req, blocks in enumerate(table):
        block_table[req, : len(blocks)] = torch.tensor(blocks)
    block_table = block_table.to(device)
    inputs = DecodeInputs(
        pages,
        with_gaps(query) if case.has_gaps else query,
        with_gaps(block_table) if case.has_gaps else block_table,
        torch.tensor(case.seq_lens, dtype=torch.int32, device=device),
        torch.tensor(case.min_sparse_lens, dtype=torch.int32, device=device),
        case.spread * case.head_size**-0.5,
        case.num_sink_tokens,
        num_parts=case.num_parts,
    )
    return inputs, *to_index.T.contiguous()


def _draw_block_table(case: RandomCase, rng: random.Random):
    """Blocks of each row, rows filled of each block, sinks of each indexed block."""
    num_pages = [-(-num_tokens // BLOCK_SIZE) for num_tokens in case.seq_lens]
    free = list(range(case.num_shared_pages + sum(num_pages)))
    rng.shuffle(free)
    shared = [free.pop() for _ in range(case.num_shared_pages)]
    table: list[list[int]] = []
    filled: dict[int, int] = {}
    indexed: dict[int, int] = {}
    for seq_len, least, pages in zip(
        case.seq_lens, case.min_sparse_lens, num_pages, strict=True
    ):
        complete = max(pages - 1, 0)
        blocks = shared[:complete]
        blocks += [free.pop() for _ in range(pages - len(blocks))]
        for page, block in enumerate(blocks):
            filled[block] = min(seq_len - page * BLOCK_SIZE, BLOCK_SIZE)
            if page < complete and seq_len >= least:
                indexed[block] = case.num_sink_tokens if page == 0 else 0
        table.append(blocks)
    return table, filled, indexed


def _fill_pages(case: RandomCase, pages: Pages, filled: dict[int, int], generator):
    """Rows of 16 topics a KV head; behind a page's last token poison stays."""
    heads, size, device = case.num_kv_heads, case.head_size, pages.buffer.device
    options = {"generator": generator, "device": device}
    topics = torch.randn(heads, 16, size, **options)
    shape = (len(filled), heads, BLOCK_SIZE)
    rows = torch.randn(*shape, 2 * size, **options)
    topic = torch.randint(16, shape, **options)
    rows[..., :size] *= case.key_noise
    rows[..., :size] += topics[torch.arange(heads, device=device)[:, None], topic]
    rows[..., size] = torch.arange(BLOCK_SIZE, device=device)  # exact in 16 bits, too
    pages.kv_cache[list(filled)] = rows.to(case.dtype)
    for block, num_rows in filled.items():
        if num_rows < BLOCK_SIZE:
            pages.kv_cache[block, :, num_rows:] = float("nan")
