# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_clusterkv project
"""The host tier: pages of running requests in CPU memory, read from there by decode.

A KV connector that the plugin configures itself (``host_memory_gib``). Its scheduler
half decides which pages leave the GPU and when (``scheduler.py``) and keeps account of
them (``books.py``); its worker half (``worker.py``) copies them and keeps the tables by
which decode finds them; ``messages.py`` is what passes between the two.
``docs/recall.md`` has the life of a page.
"""
