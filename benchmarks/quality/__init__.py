# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_clusterkv project
"""How good answers are under sparse decoding, next to dense attention.

``python -m benchmarks.quality --help``; README.md says what is measured.
"""

import sys
from pathlib import Path

# The scripts of this folder's parent import each other as top-level modules, and so
# does what is taken from them here. At the end, so that they shadow nothing.
sys.path.append(str(Path(__file__).parents[1]))
