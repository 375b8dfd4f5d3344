# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_clusterkv project
"""A pool that does not fit is refused by what limits it."""

from types import SimpleNamespace

import psutil
import pytest

from vllm_clusterkv.recall import host_memory

GIB = 2**30


@pytest.fixture(autouse=True)
def machine(monkeypatch):
    """With 10 GiB available."""
    memory = SimpleNamespace(available=10 * GIB)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)


def limit(folder, version, most, used):
    names = {
        2: ("memory.max", "memory.current"),
        1: ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    }[version]
    for name, value in zip(names, (most, used), strict=True):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(f"{value}\n")


def test_the_machine(tmp_path):
    host_memory.check(9 * GIB, tmp_path)
    message = (
        "host_memory_gib needs 9.6 GiB here, and the machine's available memory is "
        "10.0 GiB, of which 95% may be taken; lower it"
    )
    with pytest.raises(ValueError, match=message):
        host_memory.check(int(9.6 * GIB), tmp_path)


@pytest.mark.parametrize("version", [1, 2])
def test_a_container(tmp_path, version):
    limit(tmp_path, version, 6 * GIB, 2 * GIB)
    host_memory.check(3 * GIB, tmp_path)
    with pytest.raises(ValueError, match=r"limit \(cgroup\) is 4.0 GiB"):
        host_memory.check(5 * GIB, tmp_path)


@pytest.mark.parametrize("most", ["max", 2**63 - 4096])
def test_a_container_without_a_limit(tmp_path, most):
    limit(tmp_path, 2, most, 2 * GIB)
    host_memory.check(9 * GIB, tmp_path)
    with pytest.raises(ValueError, match="available memory"):
        host_memory.check(11 * GIB, tmp_path)
