# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_clusterkv project
"""Builds the two extension modules; metadata lives in pyproject.toml.

``_C`` (schemas and CPU kernels) is always built. ``_C_cuda`` (CUDA kernels) is
built when csrc/cuda has kernels, torch is a CUDA build and nvcc is found.

Environment:
    CLUSTERKV_CPU_ARCH: value of the compiler's -march, default "native". Set it
        (x86-64-v3, say) when the build machine is not the one that serves.
"""

import os
import platform
import sys
import sysconfig

from setuptools import setup

# pip hides the environment's packages from an isolated build. The extension must
# be built against the torch that will load it, not against a fresh download.
sys.path.append(sysconfig.get_paths()["platlib"])
try:
    from torch.utils.cpp_extension import BuildExtension, CppExtension
except ImportError as error:
    raise SystemExit(
        "vllm_clusterkv is built against the torch of the environment it is "
        "installed into, and none was found. Install vLLM first; with a build "
        "front end other than pip, use its --no-build-isolation."
    ) from error

STABLE_ABI = ["-DTORCH_TARGET_VERSION=0x020b000000000000"]  # torch 2.11
PYTHON_ABI = "cp311"


def cpu_extension():
    arch = os.environ.get("CLUSTERKV_CPU_ARCH", "native")
    flags = [
        "-O3",
        "-std=c++17",
        "-fopenmp-simd",
        "-ffp-contract=fast",
        "-fvisibility=hidden",
    ]
    if platform.machine() == "x86_64":
        flags += [f"-march={arch}", "-mprefer-vector-width=512"]
    else:
        flags += [f"-mcpu={arch}"]
    return CppExtension(
        "vllm_clusterkv._C",
        [
            "csrc/torch_bindings.cpp",
            "csrc/cpu/index_pages.cpp",
            "csrc/cpu/score_clusters.cpp",
            "csrc/cpu/select_clusters.cpp",
            "csrc/cpu/sparse_decode.cpp",
        ],
        depends=[
            "csrc/params.h",
            "csrc/checks.h",
            "csrc/cpu/dispatch.h",
            "csrc/cpu/vec.h",
        ],
        extra_compile_args=STABLE_ABI + flags,
        py_limited_api=True,
    )


setup(
    ext_modules=[cpu_extension()],
    cmdclass={"build_ext": BuildExtension.with_options(use_ninja=False)},
    options={"bdist_wheel": {"py_limited_api": PYTHON_ABI}},
)
