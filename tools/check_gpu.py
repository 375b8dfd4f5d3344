#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_clusterkv project
"""Whether this Python has what the GPU targets of the Makefile need; says what lacks.

check_gpu.py [PROGRAM ...]    programs that must be on the PATH, too
"""

import importlib.util
import shutil
import sys


def missing(programs: list[str]) -> str | None:
    """What is missing, as a sentence; None if nothing is."""
    for package in ("torch", "vllm", "pytest"):
        if importlib.util.find_spec(package) is None:
            return (
                f"{sys.executable} has no package {package}: set PYTHON to one with it"
            )
    import torch

    if torch.version.cuda is None:
        return f"torch {torch.__version__} of {sys.executable} is not built for CUDA"
    if not torch.cuda.is_available():
        return "torch finds no CUDA device on this machine"
    for program in programs:
        if shutil.which(program) is None:
            return f"{program} is not on the PATH; it comes with the CUDA toolkit"
    return None


if __name__ == "__main__":
    if reason := missing(sys.argv[1:]):
        sys.exit(f"The GPU targets cannot run here: {reason}.")
