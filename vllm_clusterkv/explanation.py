# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_clusterkv project
"""What ``explain`` found out, as data, text and JSON."""

import dataclasses
import json
from dataclasses import dataclass
from statistics import fmean as mean
from typing import Any

from vllm_clusterkv.attention_probe import Cluster, HeadAttention
from vllm_clusterkv.config import ClusterKVConfig
from vllm_clusterkv.page_layout import BLOCK_SIZE

_NUM_CLUSTERS_SHOWN = 8
_NUM_EXCERPTS = 3
_EXCERPT_CHARS = 28


@dataclass
class Explanation:
    """What the decode steps of one prompt attended to.

    Attributes:
        model: Name or path.
        config: The backend's settings.
        tokens: Text of each token of the prompt and of what was generated. Joined
            they are the text.
        num_prompt_tokens: How many of them are the prompt's.
        heads: The measurements, by step, layer and KV head.
    """

    model: str
    config: ClusterKVConfig
    tokens: list[str]
    num_prompt_tokens: int
    heads: list[HeadAttention]

    def worst(
        self, layer: int | None = None, kv_head: int | None = None
    ) -> HeadAttention:
        """The measurement with the largest error, mean over its query heads.

        Args:
            layer: Only of this layer; None for any.
            kv_head: Only of this KV head; None for any.

        Raises:
            ValueError: There is no such layer or KV head.
        """
        for name, given in {"layer": layer, "kv_head": kv_head}.items():
            last = max(getattr(head, name) for head in self.heads)
            if given is not None and not 0 <= given <= last:
                raise ValueError(f"{name} must be 0 to {last}, got {given}")
        return max(
            (
                head
                for head in self.heads
                if layer in (None, head.layer) and kv_head in (None, head.kv_head)
            ),
            key=lambda head: mean(head.error),
        )

    def summary(self, layer: int | None = None, kv_head: int | None = None) -> str:
        """A table of the layers, and the clusters of one layer and KV head.

        Args:
            layer: The layer to show clusters of; None for the one with the largest
                error.
            kv_head: Its KV head; None for the one with the largest error.

        Raises:
            ValueError: There is no such layer or KV head.
        """
        shown = self.worst(layer, kv_head)
        title = "Largest error" if layer is None and kv_head is None else "Chosen"
        lines = [*self._headline(), "", *self._table(), ""]
        nothing_clustered = not any(head.clusters for head in self.heads)
        if nothing_clustered and self.heads[-1].context > BLOCK_SIZE:
            lines.append(
                "Nothing was selected: contexts shorter than min_sparse_len are "
                "attended to densely."
            )
        elif nothing_clustered:
            lines.append(
                f"Nothing was selected: a prompt is clustered by pages of {BLOCK_SIZE} "
                f"tokens, and this one has {self.num_prompt_tokens}. All of it is "
                "attended to exactly."
            )
        elif all(cluster.selected for head in self.heads for cluster in head.clusters):
            lines.append(
                f"The budget of {self.config.token_budget} tokens covers the context: "
                "everything was selected and attended to exactly."
            )
        else:
            lines += self._clusters(shown, title)
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        """Everything in JSON's types, under the attributes' names."""
        heads = []
        for head in self.heads:
            fields = {
                **vars(head),
                "clusters": [vars(cluster) for cluster in head.clusters],
                "token_mass": [round(mass, 6) for mass in head.token_mass.tolist()],
            }
            del fields["positions"]  # the clusters list theirs
            heads.append(fields)
        return {**vars(self), "config": dataclasses.asdict(self.config), "heads": heads}

    def _headline(self) -> list[str]:
        config = self.config
        num_layers = len({head.layer for head in self.heads})
        num_kv_heads = len({head.kv_head for head in self.heads})
        group = len(self.heads[0].error)
        num_steps = self.heads[-1].step + 1
        generated = "".join(self.tokens[self.num_prompt_tokens :])
        tail = "estimated" if config.tail_estimate else "dropped"
        model = (
            f"model: {self.model}, {num_layers} layers, {num_kv_heads} KV heads of "
            f"{group} query head{'s' * (group > 1)}"
        )
        settings = (
            f"settings: budget {config.token_budget} tokens, "
            f"{config.tokens_per_cluster} tokens a cluster, clusters left out {tail}"
        )
        prompt = (
            f"prompt: {self.num_prompt_tokens} tokens, then {_quote(generated)}; "
            f"decode steps: {num_steps}"
        )
        return [model, settings, prompt]

    def _table(self) -> list[str]:
        lines = [
            "          tokens  share of the attention mass             output",
            "layer   attended  captured   best  left out  estimated     error  worst",
        ]
        for layer in sorted({head.layer for head in self.heads}):
            heads = [head for head in self.heads if head.layer == layer]
            worst = self.worst(layer)
            where = f"KV head {worst.kv_head} ({mean(worst.error):.3f})"
            lines.append(f"{layer:5} {_averages(heads)}  {where}")
        return [*lines, f" mean {_averages(self.heads)}"]

    def _clusters(self, head: HeadAttention, title: str) -> list[str]:
        captured, always = mean(head.captured), mean(head.always)
        current = _quote(self.tokens[head.context - 1])
        where = (
            f"{title}: layer {head.layer}, KV head {head.kv_head}, step {head.step} "
            f"(current token {current})"
        )
        tokens = (
            f"attended to {head.attended} of {head.context} tokens, output error "
            f"{mean(head.error):.3f}"
        )
        mass = (
            f"mass: sinks and page being filled {always:.3f}, selected "
            f"{captured - always:.3f}, left out {1 - captured:.3f} (estimated "
            f"{mean(head.estimated):.3f})"
        )
        lines = [where, tokens, mass]
        for kind, selected in {"Selected": True, "Left out": False}.items():
            clusters = [c for c in head.clusters if c.selected == selected]
            clusters.sort(key=lambda cluster: cluster.mass, reverse=True)
            shown = clusters[:_NUM_CLUSTERS_SHOWN]
            lines += [
                "",
                f"{kind}, {len(shown)} of {len(clusters)} clusters by mass:",
                " page  cluster  tokens   weight    mass  where the mass is",
            ]
            lines += [
                f"{c.page:5} {c.index:8} {len(c.positions):7} {c.weight:8.4f} "
                f"{c.mass:7.4f}  {self._excerpts(c, head)}"
                for c in shown
            ]
        return lines

    def _excerpts(self, cluster: Cluster, head: HeadAttention) -> str:
        """The runs of neighbouring tokens with most mass, by position."""
        runs: list[list[int]] = []
        for position in cluster.positions:
            if runs and position == runs[-1][-1] + 1:
                runs[-1].append(position)
            else:
                runs.append([position])
        runs.sort(key=lambda run: float(head.token_mass[run].sum()), reverse=True)
        texts = []
        for run in sorted(runs[:_NUM_EXCERPTS]):
            where = f"{run[0]}" if len(run) == 1 else f"{run[0]}-{run[-1]}"
            texts.append(f"{where} {_quote(''.join(self.tokens[i] for i in run))}")
        hidden = len(runs) - len(texts)
        return "  ".join(texts) + (f"  +{hidden} more" if hidden else "")


def _averages(heads: list[HeadAttention]) -> str:
    captured = mean(mean(head.captured) for head in heads)
    return (
        f"{mean(head.attended for head in heads):10.1f} {captured:9.3f} "
        f"{mean(head.best for head in heads):6.3f} {1 - captured:9.3f} "
        f"{mean(mean(head.estimated) for head in heads):10.3f} "
        f"{mean(mean(head.error) for head in heads):9.3f}"
    )


def _quote(text: str) -> str:
    if len(text) > _EXCERPT_CHARS:
        text = f"{text[: _EXCERPT_CHARS // 2]} ... {text[-_EXCERPT_CHARS // 2 :]}"
    return json.dumps(text, ensure_ascii=False)
