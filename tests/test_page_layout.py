# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_clusterkv project
"""Where a page keeps its index: the bytes add up and no two fields share one."""

import pytest
import torch

from tests.support.cases import BF16, DTYPES, FP16, FP32
from tests.support.inputs import Pages
from vllm_clusterkv.page_layout import BLOCK_SIZE, PageLayout

LLAMA = PageLayout(num_kv_heads=8, head_size=128, num_clusters=16, dtype=BF16)
SMALL = PageLayout(num_kv_heads=2, head_size=64, num_clusters=16, dtype=BF16)


def test_bytes_of_the_docstring():
    assert LLAMA.kv_bytes == 1_048_576
    assert LLAMA.centroid_bytes == 65_536
    assert LLAMA.spread_bytes == 2_304
    assert LLAMA.ends_bytes == 256
    assert LLAMA.num_kv_heads * LLAMA.code_bytes == 17_408
    assert LLAMA.page_bytes == 1_134_080
    assert LLAMA.overhead == pytest.approx(0.082, abs=5e-4)


def test_stride_of_a_small_page():
    pages = Pages.poisoned(SMALL, 3)
    assert SMALL.page_bytes == 2 * 70_912
    assert pages.kv_cache.stride() == (70_912, 256 * 128, 128, 1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_clusters", [8, 16, 32])
@pytest.mark.parametrize(("num_kv_heads", "head_size"), [(1, 64), (3, 80), (2, 256)])
def test_fields_are_apart_and_in_order(num_kv_heads, head_size, num_clusters, dtype):
    """Numbers every byte of a buffer through the views: none is claimed twice."""
    layout = PageLayout(num_kv_heads, head_size, num_clusters, dtype)
    pages = Pages.poisoned(layout, 2)
    pages.buffer.zero_()
    fields = {
        1: pages.kv_cache,
        2: pages.centroids,
        4: pages.spreads,
        8: pages.cluster_ends,
        16: pages.codes,
    }
    for number, field in fields.items():
        assert field.untyped_storage().data_ptr() == pages.buffer.data_ptr()
        byte_view(pages, field).add_(number)
    ends_bytes = 2 * num_kv_heads * num_clusters
    used = layout.used_bytes
    expected = torch.tensor([1, 2, 4, 8, 16, 0], dtype=torch.int8).repeat_interleave(
        torch.tensor(
            [
                layout.kv_bytes,
                layout.centroid_bytes,
                layout.spread_bytes,
                ends_bytes,
                num_kv_heads * layout.code_bytes,
                layout.page_bytes - used,
            ]
        )
    )
    assert layout.page_bytes % 512 == 0 and layout.page_bytes - used < 512
    for block in pages.bytes_of_blocks():
        assert torch.equal(block, expected)


def byte_view(pages, field):
    """The bytes of a view of the buffer, one more dimension."""
    size = field.element_size()
    return pages.buffer.as_strided(
        (*field.shape, size),
        (*(stride * size for stride in field.stride()), 1),
        field.storage_offset() * size,
    )


def test_wider_pages_and_an_offset():
    """Another page size may rule in a group of layers; another layer may come first."""
    stride, offset = SMALL.page_bytes // 2 + 512, 4096
    storage = torch.zeros(offset + 3 * stride, dtype=BF16)
    kv_cache = storage.as_strided(
        (3, 2, BLOCK_SIZE, 128), (stride, 256 * 128, 128, 1), offset
    )
    centroids, spreads, cluster_ends, codes = SMALL.index_views(kv_cache)
    centroids[1] = 5
    spreads[1] = 6
    cluster_ends[1] = 7
    codes[1] = 8
    start = offset + stride + SMALL.kv_bytes // 2
    middle = start + SMALL.centroid_bytes // 2
    ends = middle + SMALL.spread_bytes // 2
    assert (storage[start:middle] == 5).all()
    assert (storage[middle:ends] == 6).all()
    assert (storage.view(torch.int16)[ends : ends + 32] == 7).all()
    of_codes = storage.view(torch.uint8)[2 * (ends + 32) :][: 2 * SMALL.code_bytes]
    assert (of_codes == 8).all()
    used = 2 * 16 * 128 + 2 * 80 + 32 + SMALL.code_bytes
    assert storage.count_nonzero() == used


@pytest.mark.parametrize(
    "kv_cache",
    [
        pytest.param(torch.zeros(3, 2, 256, 128, dtype=BF16), id="no padding"),
        pytest.param(Pages.poisoned(SMALL, 3).kv_cache[:, :1], id="heads"),
        pytest.param(Pages.poisoned(SMALL, 3).kv_cache[:, :, :128], id="block size"),
        pytest.param(Pages.poisoned(SMALL, 3).kv_cache[..., :64], id="head size"),
        pytest.param(Pages.poisoned(SMALL, 3).kv_cache.view(FP16), id="dtype"),
        pytest.param(
            torch.zeros(3, 256, 2, 192, dtype=BF16)[..., :128].transpose(1, 2),
            id="NHD layout",
        ),
    ],
)
def test_other_layouts_are_rejected(kv_cache):
    message = (
        r"kv_cache must be torch.bfloat16 of shape \(3, 2, 256, 128\) in the LBHNC "
        r"layout with pages of at least 141824 bytes, got torch.*float16 of shape "
        rf"\({', '.join(map(str, kv_cache.shape))}\) with strides"
    )
    with pytest.raises(ValueError, match=message):
        SMALL.index_views(kv_cache)


def test_an_odd_page_size_in_fp32_is_aligned():
    layout = PageLayout(num_kv_heads=1, head_size=1, num_clusters=8, dtype=FP32)
    assert layout.page_bytes == 3_584  # 2048 + 64 + 36 + 16 + 1104, rounded up
