# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_clusterkv project
"""Registration: entry point, idempotence, and a member that survives pickling."""

import copy
import pickle
import subprocess
import sys
from importlib.metadata import entry_points

import cloudpickle
from vllm.config.attention import AttentionConfig
from vllm.v1.attention.backends.registry import AttentionBackendEnum

import vllm_clusterkv
from vllm_clusterkv.cpu_backend import ClusterKVCPUBackend


def test_entry_point_registers_the_backend():
    [entry] = entry_points(group="vllm.general_plugins", name="clusterkv")
    entry.load()()
    assert AttentionBackendEnum["CLUSTERKV"].get_class() is ClusterKVCPUBackend


def test_registering_twice_is_harmless():
    vllm_clusterkv.register()
    first = AttentionBackendEnum["CLUSTERKV"]
    vllm_clusterkv.register()
    assert AttentionBackendEnum["CLUSTERKV"] is first


def test_command_line_word_is_case_insensitive():
    vllm_clusterkv.register()
    member = AttentionBackendEnum["CLUSTERKV"]
    assert AttentionConfig(backend="clusterkv").backend is member
    assert AttentionConfig(backend="ClusterKV").backend is member


def test_member_survives_pickling_and_copying():
    vllm_clusterkv.register()
    member = AttentionBackendEnum["CLUSTERKV"]
    for restored in (
        pickle.loads(pickle.dumps(member)),
        cloudpickle.loads(cloudpickle.dumps(member)),
        copy.deepcopy(member),
    ):
        assert restored is member


def test_member_is_restored_in_a_fresh_process():
    # As in a spawned worker: unpickled before any plugin was loaded.
    vllm_clusterkv.register()
    pickled = pickle.dumps(AttentionBackendEnum["CLUSTERKV"])
    code = f"import pickle; print(pickle.loads({pickled!r}).name)"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.splitlines()[-1] == "CLUSTERKV"


def test_importing_the_package_imports_neither_torch_nor_vllm():
    code = (
        "import sys, vllm_clusterkv; "
        "assert not {'torch', 'vllm'} & set(sys.modules), 'heavy import'"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
