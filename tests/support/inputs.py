# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_clusterkv project
"""Inputs as vLLM makes them, with poison wherever an op has no business reading.

Everything is made on the CPU from a fixed seed and then copied to a device, so a
case is the same case everywhere.
"""

from dataclasses import dataclass, replace

import torch

from vllm_clusterkv import reference
from vllm_clusterkv.page_layout import (
    BLOCK_SIZE,
    INDEX_UNIT,
    IndexFields,
    PageLayout,
)

POISON_BYTE = -1  # bytes of 0xff: NaN in every float dtype, -1 as a cluster end
UNTOUCHED = 77  # fills uint8 outputs
_GAP = 8  # elements between the rows of strided views; 16 bytes in 16 bits


@dataclass
class Pages:
    """One layer's cache: vLLM's flat buffer, and the views of it that ops take."""

    layout: PageLayout
    buffer: torch.Tensor  # [num_blocks * page_bytes] int8
    kv_cache: torch.Tensor  # [num_blocks, num_kv_heads, BLOCK_SIZE, 2 * head_size]
    index: torch.Tensor  # [num_blocks, num_kv_heads, index_bytes] uint8

    @classmethod
    def over(cls, layout: PageLayout, buffer: torch.Tensor) -> "Pages":
        row = 2 * layout.head_size
        kv_cache = buffer.view(layout.dtype).as_strided(
            (len(buffer) // layout.page_bytes, layout.num_kv_heads, BLOCK_SIZE, row),
            (layout.page_bytes // layout.dtype.itemsize, BLOCK_SIZE * row, row, 1),
        )
        return cls(layout, buffer, kv_cache, layout.index_view(kv_cache))

    @classmethod
    def poisoned(
        cls, layout: PageLayout, num_blocks: int, device: str = "cpu"
    ) -> "Pages":
        size = (num_blocks * layout.page_bytes,)
        buffer = torch.full(size, POISON_BYTE, dtype=torch.int8, device=device)
        return cls.over(layout, buffer)

    def to(self, device: str) -> "Pages":
        """A copy on ``device``."""
        return Pages.over(self.layout, self.buffer.to(device, copy=True))

    @property
    def fields(self) -> IndexFields:
        """Views of the indexes' fields."""
        return IndexFields.of(self.index, self.layout.head_size, self.layout.dtype)

    @property
    def cluster_ends(self) -> torch.Tensor:
        """[num_blocks, num_kv_heads, num_clusters] int16, a view."""
        return self.fields.cluster_ends

    def args(self) -> dict:
        """What every op takes."""
        return {"kv_cache": self.kv_cache, "index": self.index}

    def bytes_of_blocks(self) -> torch.Tensor:
        """[num_blocks, page_bytes] int8 on the CPU, padding and all."""
        return self.buffer.view(-1, self.layout.page_bytes).cpu()

    def write_index(self, block: int, labels: torch.Tensor, num_sinks: int) -> None:
        """Stores the index that sorted labels imply.

        Args:
            labels: [num_kv_heads, BLOCK_SIZE - num_sinks], ascending in each head.
        """
        members = torch.nn.functional.one_hot(labels, self.layout.num_clusters)
        counts = members.sum(1)  # [num_kv_heads, num_clusters]
        rows = self.kv_cache[block, :, num_sinks:].float()
        sums = members.transpose(1, 2).float() @ rows
        means = sums / counts.clamp(min=1)[..., None]
        fields = self.fields[block]
        fields.write_means(*means.split(self.layout.head_size, 2), counts)
        fields.cluster_ends[:] = num_sinks + counts.cumsum(1)
        keys = rows[..., : self.layout.head_size]
        for head in range(self.layout.num_kv_heads):
            fields.profile[head], fields.radii[head] = reference.key_spread(
                keys[head], labels[head], self.layout.num_clusters
            )


@dataclass
class DecodeInputs:
    """The inputs of the decode ops for one batch, and how to call each op.

    The methods that run an op take the module that implements it, ``ops`` or
    ``reference``, and return fresh outputs. What is not written stays infinite in
    scores (so that a NaN, which poison gives, shows), NaN in softmax_sums
    (so that one that is read shows), ``UNTOUCHED`` in selections.
    """

    pages: Pages
    query: torch.Tensor  # [num_reqs, num_heads, head_size]
    block_table: torch.Tensor  # [num_reqs, max_blocks] int32
    seq_lens: torch.Tensor  # [num_reqs] int32
    min_sparse_lens: torch.Tensor  # [num_reqs] int32
    scale: float
    num_sink_tokens: int
    index_table: torch.Tensor | None = None  # [num_reqs, max_blocks] int32
    host_cache: torch.Tensor | None = None  # [num_host_pages, ...] as kv_cache
    num_parts: int = 3  # of softmax_sums

    def to(self, device: str) -> "DecodeInputs":
        """A copy on ``device`` whose query and tables are strided views."""
        index_table, host_cache = self.index_table, self.host_cache
        if index_table is not None:
            index_table = with_gaps(index_table.to(device))
        if host_cache is not None and device != "cpu":
            host_cache = host_cache.pin_memory()  # so that kernels can read it
        return DecodeInputs(
            self.pages.to(device),
            with_gaps(self.query.to(device)),
            with_gaps(self.block_table.to(device)),
            self.seq_lens.to(device, copy=True),
            self.min_sparse_lens.to(device, copy=True),
            self.scale,
            self.num_sink_tokens,
            index_table,
            host_cache,
            self.num_parts,
        )

    def only(self, req: int) -> "DecodeInputs":
        """The batch of one row."""
        rows = slice(req, req + 1)
        return DecodeInputs(
            self.pages,
            self.query[rows],
            self.block_table[rows],
            self.seq_lens[rows],
            self.min_sparse_lens[rows],
            self.scale,
            self.num_sink_tokens,
            None if self.index_table is None else self.index_table[rows],
            self.host_cache,
            self.num_parts,
        )

    def spilled(self, seed: int = 0) -> "DecodeInputs":
        """The same batch with some pages on the host, and NaN where they were.

        All that may go: of sparse rows' indexed pages but the first about half.
        """
        generator = torch.Generator().manual_seed(seed)
        layout, num_blocks = self.pages.layout, len(self.pages.kv_cache)
        candidates = [
            (req, page)
            for req in range(len(self.seq_lens))
            for page in range(1, self.num_indexed(req))
            if torch.rand((), generator=generator) < 0.6
        ]
        # Entries in any order, with gaps: of a block's entries every other one.
        per_block = -(-layout.entries_per_block // 2)
        num_new = -(-len(candidates) // per_block)
        pages = Pages.poisoned(layout, num_blocks + num_new)
        pages.buffer[: len(self.pages.buffer)] = self.pages.buffer
        host_shape = (len(candidates) + 1, *pages.kv_cache.shape[1:])
        host_cache = torch.full(host_shape, float("nan"), dtype=layout.dtype)
        host_pages = torch.randperm(len(host_cache), generator=generator).tolist()
        block_table = self.block_table.clone()
        index_table = block_table * (layout.page_bytes // INDEX_UNIT)
        of_blocks = pages.buffer.view(-1, layout.page_bytes)
        for i, (req, page) in enumerate(candidates):
            block = int(block_table[req, page])
            entry_block, entry = num_blocks + i // per_block, i % per_block * 2
            host_cache[host_pages[i]] = pages.kv_cache[block]
            start = entry * layout.entry_bytes
            of_blocks[entry_block, start : start + layout.entry_bytes] = of_blocks[
                block, layout.kv_bytes :
            ]
            of_blocks[block] = POISON_BYTE
            block_table[req, page] = -1 - host_pages[i]
            index_table[req, page] = layout.index_place(
                layout.page_bytes, entry_block, entry
            )
        return replace(
            self,
            pages=pages,
            block_table=block_table,
            index_table=index_table,
            host_cache=host_cache,
        )

    def num_pages(self, req: int) -> int:
        return -(-int(self.seq_lens[req]) // BLOCK_SIZE)

    def is_dense(self, req: int) -> bool:
        return bool(self.seq_lens[req] < self.min_sparse_lens[req])

    def num_indexed(self, req: int) -> int:
        """Pages of a row whose index the ops read: none of a dense row's."""
        return 0 if self.is_dense(req) else max(self.num_pages(req) - 1, 0)

    def num_live(self, req: int) -> int:
        """Clusters of a row's indexed pages: entries beyond stay untouched."""
        return self.num_indexed(req) * self.pages.layout.num_clusters

    def _shared_args(self) -> dict:
        return {**self.pages.args(), **self._row_args()}

    def _row_args(self) -> dict:
        return {
            "block_table": self.block_table,
            "seq_lens": self.seq_lens,
            "min_sparse_lens": self.min_sparse_lens,
        }

    def _per_cluster(self, num_heads: int, fill, dtype) -> torch.Tensor:
        num_reqs, max_blocks = self.block_table.shape
        shape = (num_reqs, num_heads, max_blocks * self.pages.layout.num_clusters)
        return torch.full(shape, fill, dtype=dtype, device=self.query.device)

    def score_args(self) -> dict:
        per_head = self.query.shape[1], float("inf"), torch.float32
        return {
            "query": self.query,
            **self._shared_args(),
            "scale": self.scale,
            "num_sink_tokens": self.num_sink_tokens,
            "scores": self._per_cluster(*per_head),
            "softmax_sums": self._no_sums(),
            **self._index_args(),
        }

    def _index_args(self) -> dict:
        return {} if self.index_table is None else {"index_table": self.index_table}

    def _no_sums(self) -> torch.Tensor:
        """[num_reqs, num_heads, num_parts, 2], all NaN."""
        shape = (*self.query.shape[:2], self.num_parts, 2)
        return torch.full(shape, float("nan"), device=self.query.device)

    def softmax_sums(self, scores: torch.Tensor) -> torch.Tensor:
        """The reference's of these scores; NaN where an op must not write."""
        scores, sums = scores.to(self.query.device), self._no_sums()
        num_kv_heads = self.pages.layout.num_kv_heads
        of_kv_head = scores.unflatten(1, (num_kv_heads, -1))
        for req in range(len(scores)):
            blocks = self.block_table[req, : self.num_indexed(req)].long()
            for head in range(num_kv_heads):
                sizes = reference.cluster_sizes(
                    self.pages.cluster_ends[blocks, head], self.num_sink_tokens
                )
                found = reference.sums_of_parts(
                    of_kv_head[req, head, :, : len(sizes)],
                    sizes,
                    self.num_parts,
                    self.pages.layout.num_clusters,
                )
                heads = sums[req].unflatten(0, (num_kv_heads, -1))[head]
                heads[:, : found.shape[1]] = found
        return sums

    def select_args(
        self,
        scores: torch.Tensor,
        token_budget: int,
        softmax_sums: torch.Tensor | None = None,
    ) -> dict:
        """Without ``softmax_sums``, those of the scores."""
        num_kv_heads = self.pages.layout.num_kv_heads
        if softmax_sums is None:
            softmax_sums = self.softmax_sums(scores)
        return {
            "scores": scores.to(self.query.device),
            "softmax_sums": softmax_sums.to(self.query.device),
            **self._shared_args(),
            "num_sink_tokens": self.num_sink_tokens,
            "token_budget": token_budget,
            "selected": self._per_cluster(num_kv_heads, UNTOUCHED, torch.uint8),
            "num_attended": torch.full(
                (len(self.seq_lens), num_kv_heads),
                -1,
                dtype=torch.int32,
                device=self.query.device,
            ),
            **self._index_args(),
        }

    def decode_args(
        self,
        scores: torch.Tensor,
        selected: torch.Tensor,
        tail_estimate: bool = True,
        num_splits: int = 2,
        out_dtype: torch.dtype | None = None,
    ) -> dict:
        device, poison = self.query.device, float("nan")
        *heads, head_size = self.query.shape
        shape = (*heads, num_splits, head_size + 2)
        output = torch.full_like(self.query, poison, dtype=out_dtype)
        return {
            "query": self.query,
            **self._shared_args(),
            "scores": scores.to(device),
            "selected": selected.to(device),
            "scale": self.scale,
            "num_sink_tokens": self.num_sink_tokens,
            "tail_estimate": tail_estimate,
            "workspace": torch.full(shape, poison, device=device),
            "output": with_gaps(output),
            **self._index_args(),
            **({} if self.host_cache is None else {"host_cache": self.host_cache}),
        }

    def score(self, module) -> torch.Tensor:
        return self.score_all(module)[0]

    def score_all(self, module) -> tuple[torch.Tensor, torch.Tensor]:
        """Scores and softmax_sums."""
        args = self.score_args()
        module.score_clusters(**args)
        return args["scores"], args["softmax_sums"]

    def select(
        self, module, scores, token_budget, softmax_sums=None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        args = self.select_args(scores, token_budget, softmax_sums)
        module.select_clusters(**args)
        return args["selected"], args["num_attended"]

    def decode(self, module, scores, selected, **options) -> torch.Tensor:
        args = self.decode_args(scores, selected, **options)
        module.sparse_decode(**args)
        assert gaps(args["output"]).isnan().all(), "wrote between the output's rows"
        return args["output"]


def make_decode_inputs(case, seed: int = 0) -> DecodeInputs:
    """A batch whose pages carry a correct index, with empty clusters in it.

    The clusters are drawn, not found by ``index_pages``: keys scatter around one
    direction a cluster, so scores differ as they do in practice. Pages of dense rows
    have no index but poison.
    """
    generator = torch.Generator().manual_seed(seed)
    layout = PageLayout(
        case.num_kv_heads,
        case.head_size,
        BLOCK_SIZE // case.tokens_per_cluster,
        case.dtype,
    )
    pages_per_row = [-(-seq_len // BLOCK_SIZE) for seq_len in case.seq_lens]
    min_sparse_lens = case.min_sparse_lens or (0,) * len(case.seq_lens)
    pages = Pages.poisoned(layout, sum(pages_per_row) + 2)
    blocks = torch.randperm(sum(pages_per_row) + 2, generator=generator).tolist()
    unused = blocks.pop()
    num_reqs, max_blocks = len(case.seq_lens), max(pages_per_row, default=0) + 1
    block_table = torch.full((num_reqs, max_blocks), unused, dtype=torch.int32)
    for req, seq_len in enumerate(case.seq_lens):
        for i in range(pages_per_row[req]):
            block = block_table[req, i] = blocks.pop()
            num_rows = min(seq_len - i * BLOCK_SIZE, BLOCK_SIZE)
            is_sparse = seq_len >= min_sparse_lens[req]
            if is_sparse and i < (seq_len - 1) // BLOCK_SIZE:
                sinks = case.num_sink_tokens if i == 0 else 0
                fill_indexed_page(pages, int(block), sinks, generator)
            else:
                shape = (case.num_kv_heads, num_rows, 2 * case.head_size)
                rows = torch.randn(shape, generator=generator)
                pages.kv_cache[block, :, :num_rows] = rows.to(case.dtype)
    shape = (num_reqs, case.num_kv_heads * case.group, case.head_size)
    query = torch.randn(shape, generator=generator).to(case.dtype)
    return DecodeInputs(
        pages,
        query,
        block_table,
        torch.tensor(case.seq_lens, dtype=torch.int32),
        torch.tensor(min_sparse_lens, dtype=torch.int32),
        case.head_size**-0.5,
        case.num_sink_tokens,
        num_parts=case.num_parts,
    )


def fill_indexed_page(pages: Pages, block: int, num_sinks: int, generator) -> None:
    """Fills a page with sorted clusters of uneven sizes, some empty, and its index."""
    layout = pages.layout
    heads, clusters = layout.num_kv_heads, layout.num_clusters
    labels = torch.rand(heads, BLOCK_SIZE - num_sinks, generator=generator) ** 2
    labels = (labels * clusters).long()
    dropped = torch.randint(clusters, (heads, 1), generator=generator)
    labels = torch.where(labels == dropped, (dropped + 1) % clusters, labels)
    labels = labels.sort(1).values
    row = 2 * layout.head_size
    centres = torch.randn(heads, clusters, row, generator=generator)
    rows = torch.randn(heads, BLOCK_SIZE, row, generator=generator)
    rows[:, num_sinks:] += 2 * centres.gather(1, labels[..., None].expand(-1, -1, row))
    pages.kv_cache[block] = rows.to(layout.dtype)
    pages.write_index(block, labels, num_sinks)


def with_gaps(tensor: torch.Tensor) -> torch.Tensor:
    """A copy as a view of a wider tensor: strided rows and heads, poison between."""
    wide = tensor.new_full(
        (*tensor.shape[:-1], tensor.shape[-1] + _GAP),
        float("nan") if tensor.is_floating_point() else -1,
    )
    view = wide[..., : tensor.shape[-1]]
    return view.copy_(tensor)


def gaps(view: torch.Tensor) -> torch.Tensor:
    """What lies between the rows of a ``with_gaps`` view."""
    return view._base[..., view.shape[-1] :]
