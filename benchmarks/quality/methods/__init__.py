# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_clusterkv project
"""Selection methods by name. ``base.py`` says what a method is."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

from benchmarks.quality.methods.base import Index, Method, Selection
from benchmarks.quality.methods.clusterkv_published import ClusterKVPublished
from benchmarks.quality.methods.full import Full
from benchmarks.quality.methods.oracle import Oracle
from benchmarks.quality.methods.ours import Ours
from benchmarks.quality.methods.page_mean import PageMean
from benchmarks.quality.methods.page_mean_std import PageMeanStd
from benchmarks.quality.methods.quest import Quest
from benchmarks.quality.methods.window import Window

__all__ = ["METHODS", "Index", "Method", "Selection", "make_method"]

METHODS: dict[str, Callable[..., Method]] = {
    "full": Full,
    "oracle": Oracle,
    "window": Window,
    "quest": Quest,
    "page-mean": PageMean,
    "page-mean-std": PageMeanStd,
    "clusterkv-published": ClusterKVPublished,
    "ours": partial(Ours, tail=False),
    "ours-tail": partial(Ours, tail=True),
}
"""Factories: keyword arguments are the method's settings."""


def make_method(spec: str) -> Method:
    """A method by name, with settings if others than the defaults are wanted.

    Args:
        spec: ``name`` or ``name:setting=value,...``, as in
            ``ours-tail:page_size=512,vote=max``.

    Raises:
        ValueError: There is no such method or setting, or a value is out of range.
    """
    name, _, settings = spec.partition(":")
    if name not in METHODS:
        raise ValueError(f"method must be one of {list(METHODS)}, got {name!r}")
    default = METHODS[name]()
    known = [known.name for known in dataclasses.fields(default)]
    given: dict[str, Any] = {}
    for item in filter(None, settings.split(",")):
        field, equals, text = item.partition("=")
        if not equals or field not in known:
            raise ValueError(f"{name} has the settings {known}, got {item!r}")
        given[field] = _parse(text, getattr(default, field), field)
    return dataclasses.replace(default, **given)


def _parse(text: str, default: Any, field: str) -> Any:
    if isinstance(default, bool):
        if text not in ("true", "false"):
            raise ValueError(f"{field} must be true or false, got {text!r}")
        return text == "true"
    try:
        return type(default)(text)
    except ValueError as error:
        raise ValueError(
            f"{field} must be of type {type(default).__name__}, got {text!r}"
        ) from error
