# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_clusterkv project
"""Builds the two extension modules; metadata lives in pyproject.toml.

``_C`` (schemas and CPU kernels) is always built, by torch's own means. ``_C_cuda``
(CUDA kernels) is built by calling nvcc, when nvcc is found and torch is a CUDA
build. It binds through the stable ABI alone, so a CPU build of torch has all that
compiling it needs: CLUSTERKV_BUILD_CUDA=1 cross-compiles.

Environment:
    CLUSTERKV_CPU_ARCH: value of the compiler's -march, default "native". Set it
        (x86-64-v3, say) when the build machine is not the one that serves.
    CLUSTERKV_BUILD_CUDA: 1 builds _C_cuda whatever torch is, 0 never does.
    CLUSTERKV_CUDA_ARCHS: compute capabilities to build for, default those below.
    CUDA_HOME: the CUDA toolkit; default the one whose nvcc is in PATH, or
        /usr/local/cuda.
    MAX_JOBS: files that nvcc compiles at once, default the number of CPUs.
"""

import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from glob import glob
from pathlib import Path

from setuptools import Extension, setup

# pip hides the environment's packages from an isolated build. The extension must
# be built against the torch that will load it, not against a fresh download.
sys.path.append(sysconfig.get_paths()["platlib"])
try:
    import torch
    from torch.utils import cpp_extension
except ImportError as error:
    raise SystemExit(
        "vllm_clusterkv is built against the torch of the environment it is "
        "installed into, and none was found. Install vLLM first; with a build "
        "front end other than pip, use its --no-build-isolation."
    ) from error

STABLE_ABI = ["-DTORCH_TARGET_VERSION=0x020b000000000000"]  # torch 2.11
PYTHON_ABI = "cp311"
CUDA_ARCHS = "8.0 8.6 8.9 9.0 10.0 12.0+PTX"


def cpu_extension():
    arch = os.environ.get("CLUSTERKV_CPU_ARCH", "native")
    flags = [
        "-O3",
        "-std=c++17",
        "-fopenmp-simd",
        "-ffp-contract=fast",
        "-fno-math-errno",  # or square roots are calls
        "-fvisibility=hidden",
    ]
    if platform.machine() == "x86_64":
        flags += [f"-march={arch}", "-mprefer-vector-width=512"]
    else:
        flags += [f"-mcpu={arch}"]
    return cpp_extension.CppExtension(
        "vllm_clusterkv._C",
        [
            "csrc/torch_bindings.cpp",
            "csrc/cpu/index_pages.cpp",
            "csrc/cpu/recall.cpp",
            "csrc/cpu/score_clusters.cpp",
            "csrc/cpu/select_clusters.cpp",
            "csrc/cpu/sparse_decode.cpp",
        ],
        depends=[
            "csrc/params.h",
            "csrc/checks.h",
            "csrc/cpu/cluster_tokens.h",
            "csrc/cpu/dispatch.h",
            "csrc/cpu/short_means.h",
            "csrc/cpu/vec.h",
        ],
        extra_compile_args=STABLE_ABI + flags,
        py_limited_api=True,
    )


def find_nvcc():
    home = os.environ.get("CUDA_HOME")
    if home:
        return shutil.which("nvcc", path=f"{home}/bin")
    return shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")


class CudaExtension(Extension):
    """``_C_cuda``: every source in csrc/cuda, compiled and linked by nvcc.

    ``sources`` stays empty: torch's BuildExtension would want its own CUDA for them.
    """

    def __init__(self, nvcc):
        super().__init__("vllm_clusterkv._C_cuda", [], py_limited_api=True)
        self.nvcc = nvcc

    def compile_flags(self):
        flags = ["-O3", "-std=c++17", "-lineinfo", "--expt-relaxed-constexpr"]
        flags += ["-Xptxas=--warn-on-spills,--warn-on-local-memory-usage"]
        flags += ["-Xcompiler=-fPIC,-fvisibility=hidden", "-DPy_LIMITED_API=0x030b0000"]
        flags += [*STABLE_ABI, "-DUSE_CUDA"]  # the latter shows torch's CUDA shims
        flags += [f"-isystem={path}" for path in cpp_extension.include_paths()]
        flags += [f"-isystem={sysconfig.get_paths()['include']}"]
        for arch in os.environ.get("CLUSTERKV_CUDA_ARCHS", CUDA_ARCHS).split():
            number = arch.removesuffix("+PTX").replace(".", "")
            codes = [f"sm_{number}"]
            if arch.endswith("+PTX"):
                codes.append(f"compute_{number}")
            flags.append(f"-gencode=arch=compute_{number},code=[{','.join(codes)}]")
        return flags

    def build(self, path, temp):
        """Compiles what is older than its source or any header, and links."""
        temp.mkdir(parents=True, exist_ok=True)
        headers = glob("csrc/*.h") + glob("csrc/cuda/*.h") + glob("csrc/cuda/*.cuh")
        flags = self.compile_flags()
        stamp = temp / "flags"
        if not stamp.exists() or stamp.read_text() != repr(flags):
            stamp.write_text(repr(flags))
        newest = max(os.path.getmtime(file) for file in [*headers, stamp])

        def compile_one(source):
            target = temp / (Path(source).name + ".o")
            needed = max(newest, os.path.getmtime(source))
            if not target.exists() or target.stat().st_mtime < needed:
                self.run(*flags, "-c", source, "-o", str(target))
            return str(target)

        sources = sorted(glob("csrc/cuda/*.cu") + glob("csrc/cuda/*.cpp"))
        with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS", 0)) or None) as pool:
            objects = list(pool.map(compile_one, sources))
        # The module must name the torch libraries that own its symbols. Their names
        # are all it takes; empty stand-ins spare us a CUDA build of torch.
        for name in ("c10", "torch_cpu", "torch_cuda"):
            soname = f"lib{name}.so"
            link = ["-shared", "-Xlinker", f"-soname={soname}", "-x", "c++"]
            self.run(*link, os.devnull, "-o", str(temp / soname))
        libraries = [f"-L{temp}", "-lc10", "-ltorch_cpu", "-ltorch_cuda"]
        os.makedirs(os.path.dirname(path), exist_ok=True)
        link = ["-shared", "-cudart=static", "-Xlinker", "--no-as-needed"]
        self.run(*link, *objects, *libraries, "-o", path)

    def run(self, *args):
        command = [self.nvcc, *args]
        print(" ".join(command), flush=True)
        subprocess.run(command, check=True)


class BuildExtensions(cpp_extension.BuildExtension.with_options(use_ninja=False)):
    def build_extension(self, ext):
        if isinstance(ext, CudaExtension):
            temp = Path(self.build_temp, "csrc", "cuda")
            ext.build(self.get_ext_fullpath(ext.name), temp)
        else:
            super().build_extension(ext)


def extensions():
    found = [cpu_extension()]
    wanted = os.environ.get("CLUSTERKV_BUILD_CUDA", "1" if torch.version.cuda else "0")
    if wanted not in ("0", "1"):
        raise SystemExit(f"CLUSTERKV_BUILD_CUDA must be 0 or 1, got {wanted!r}")
    if wanted == "1":
        nvcc = find_nvcc()
        if nvcc is None:
            raise SystemExit(
                "vllm_clusterkv's CUDA kernels need nvcc, and none was found. Set "
                "CUDA_HOME to a CUDA toolkit, or build for the CPU only with "
                "CLUSTERKV_BUILD_CUDA=0."
            )
        found.append(CudaExtension(nvcc))
    return found


setup(
    ext_modules=extensions(),
    cmdclass={"build_ext": BuildExtensions},
    options={"bdist_wheel": {"py_limited_api": PYTHON_ABI}},
)
