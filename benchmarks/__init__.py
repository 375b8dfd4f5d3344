# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_clusterkv project
"""Scripts, run by their paths, and ``benchmarks.quality``, run as a module.

A package, so that none of the same name that is installed hides it.
"""
