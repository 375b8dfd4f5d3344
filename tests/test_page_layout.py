# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_clusterkv project
"""Where a page keeps its index: the bytes add up and no two fields share one."""

import pytest
import torch

from tests.support.cases import BF16, DTYPES, FP16
from tests.support.inputs import Pages
from vllm_clusterkv.page_layout import (
    BLOCK_SIZE,
    CLUSTERS,
    IndexFields,
    PageLayout,
)

LLAMA = PageLayout(num_kv_heads=8, head_size=128, num_clusters=32, dtype=BF16)
SMALL = PageLayout(num_kv_heads=2, head_size=64, num_clusters=16, dtype=BF16)


def test_bytes_of_the_docstring():
    assert LLAMA.kv_bytes == 1_048_576
    assert LLAMA.index_bytes == 5_120
    assert LLAMA.page_bytes == 1_089_536
    assert LLAMA.overhead == pytest.approx(0.039, abs=5e-4)


def test_stride_of_a_small_page():
    pages = Pages.poisoned(SMALL, 3)
    assert SMALL.page_bytes == 134_144
    assert pages.kv_cache.stride() == (67_072, 256 * 128, 128, 1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_clusters", CLUSTERS)
@pytest.mark.parametrize(("num_kv_heads", "head_size"), [(1, 64), (3, 80), (2, 256)])
def test_fields_are_apart(num_kv_heads, head_size, num_clusters, dtype):
    """Counts every byte of a buffer through the views: none is claimed twice."""
    layout = PageLayout(num_kv_heads, head_size, num_clusters, dtype)
    pages = Pages.poisoned(layout, 2)
    pages.buffer.zero_()
    fields = vars(pages.fields).values()
    for field in (pages.kv_cache, pages.index, *fields):
        assert field.untyped_storage().data_ptr() == pages.buffer.data_ptr()
        byte_view(pages, field).add_(1)
    index_bytes = num_kv_heads * layout.index_bytes
    assert layout.index_bytes % 16 == 0  # as kernels load
    used = layout.used_bytes
    expected = torch.tensor([1, 2, 0], dtype=torch.int8).repeat_interleave(
        torch.tensor([layout.kv_bytes, index_bytes, layout.page_bytes - used])
    )
    assert layout.page_bytes % 512 == 0 and layout.page_bytes - used < 512
    for block in pages.bytes_of_blocks():
        assert torch.equal(block, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_fields_keep_what_is_written(dtype):
    """Each its own values, in the indexes of a cache's pages; the page stays."""
    pages = Pages.poisoned(PageLayout(2, 80, 32, dtype), 3)
    before = pages.kv_cache.view(torch.uint8).clone()
    for number, field in enumerate(vars(pages.fields).values()):
        field[:] = number
    for number, field in enumerate(vars(pages.fields).values()):
        assert (field == number).all()
    torch.manual_seed(0)
    means = torch.randn(2, 3, 2, 32, 80)
    pages.fields.write_means(*means, torch.ones(3, 2, 32))
    near = pages.fields.mean_keys(), pages.fields.mean_values()
    for written, read in zip(means, near, strict=True):
        assert (read - written).abs().max() < 0.9
        assert (read - written).abs().mean() < 0.15
    for name in ("cluster_ends", "radii", "profile"):
        field = getattr(pages.fields, name)
        assert (field == list(vars(pages.fields)).index(name)).all()
    assert torch.equal(pages.kv_cache.view(torch.uint8), before)


def test_indexes_of_no_layout_are_rejected():
    with pytest.raises(ValueError, match="index must have .* bytes a head, got 77"):
        IndexFields.of(torch.zeros(2, 77, dtype=torch.uint8), 64, BF16)


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
    SMALL.index_view(kv_cache)[1] = 5
    start = 2 * (offset + stride) + SMALL.kv_bytes
    used = 2 * SMALL.index_bytes
    storage = storage.view(torch.uint8)
    assert (storage[start : start + used] == 5).all()
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
        r"layout with pages of at least 134144 bytes, got torch.*float16 of shape "
        rf"\({', '.join(map(str, kv_cache.shape))}\) with strides"
    )
    with pytest.raises(ValueError, match=message):
        SMALL.index_view(kv_cache)
