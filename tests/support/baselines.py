# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_clusterkv project
"""Attention in plain PyTorch: dense, and sparse in the dtype under test."""

import torch
import torch.nn.functional as F

from tests.support.inputs import DecodeInputs
from vllm_clusterkv.page_layout import BLOCK_SIZE
from vllm_clusterkv.reference import cluster_sizes


def dense_attention(inputs: DecodeInputs) -> torch.Tensor:
    """``scaled_dot_product_attention`` over every token, in fp32."""
    output = torch.zeros_like(inputs.query, dtype=torch.float32)
    for req, rows in _rows_of_requests(inputs):
        group = inputs.query.shape[1] // len(rows)
        keys, values = rows.float().repeat_interleave(group, 0).chunk(2, -1)
        query = inputs.query[req, :, None].float()
        attended = F.scaled_dot_product_attention(
            query, keys, values, scale=inputs.scale
        )
        output[req] = attended[:, 0]
    return output


def sparse_attention(
    inputs: DecodeInputs,
    scores: torch.Tensor,
    selected: torch.Tensor,
    tail_estimate: bool,
) -> torch.Tensor:
    """``sparse_decode`` with every step rounded to the dtype of the cache."""
    dtype, sinks = inputs.query.dtype, inputs.num_sink_tokens
    head_size = inputs.query.shape[2]
    output = torch.zeros_like(inputs.query)
    for req, rows in _rows_of_requests(inputs):
        group = inputs.query.shape[1] // len(rows)
        num_indexed, num_live = inputs.num_indexed(req), inputs.num_live(req)
        blocks = inputs.block_table[req, :num_indexed]
        for kv_head, tokens in enumerate(rows):
            sizes = cluster_sizes(inputs.pages.cluster_ends[blocks, kv_head], sinks)
            chosen = selected[req, kv_head, :num_live].bool()
            keep = torch.ones(len(tokens), dtype=torch.bool)
            if num_indexed:
                clustered = slice(sinks, num_indexed * BLOCK_SIZE)
                keep[clustered] = chosen.repeat_interleave(sizes)
            left_out = ~chosen & (sizes > 0) & tail_estimate
            mean_values = inputs.pages.fields[blocks, kv_head].mean_values()
            mean_values = mean_values.flatten(0, 1).to(dtype)
            heads = slice(kv_head * group, (kv_head + 1) * group)
            of_means = scores[req, heads, :num_live][:, left_out]
            of_means = of_means + torch.log(sizes[left_out])
            keys, values = tokens[keep].split(head_size, dim=1)
            logits = inputs.scale * (inputs.query[req, heads] @ keys.T)
            weights = torch.cat([logits, of_means.to(dtype)], 1).softmax(1)
            output[req, heads] = weights @ torch.cat([values, mean_values[left_out]])
    return output


def _rows_of_requests(inputs: DecodeInputs):
    """Yields each live row and its tokens: [num_kv_heads, seq_len, 2 * head_size]."""
    kv_cache = inputs.pages.kv_cache
    for req, seq_len in enumerate(inputs.seq_lens.tolist()):
        if seq_len:
            blocks = inputs.block_table[req, : inputs.num_pages(req)]
            pages = kv_cache[blocks].transpose(0, 1)  # [heads, pages, rows, row]
            yield req, pages.flatten(1, 2)[:, :seq_len]
