# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_clusterkv project
"""Runs a Hugging Face model whose decode attends to what a method selects.

Prefill is the model's own dense attention. Decode takes one token at a time and every
layer attends to its method's selection, by an attention function registered with
transformers; no model code is copied. A prompt's prefill is computed once and shared
by all methods and budgets, so loop over prompts outside and over runners inside:

    model = HFModel("DIR", device="cuda", dtype=torch.bfloat16)
    runners = [HFRunner(model, make_method(spec), 512) for spec in METHODS]
    for prompt in prompts:
        answers = [runner.generate([prompt], 64) for runner in runners]

As in serving, the first token of an answer comes from dense prefill.

Along given tokens nothing comes to the host before the last step, so that a GPU never
waits for Python.
"""

import copy
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from transformers import AttentionInterface, AutoModelForCausalLM, DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from benchmarks.quality.engine_child import Generated
from benchmarks.quality.fidelity_math import Scored
from benchmarks.quality.methods import METHODS, Index, Method, make_method
from benchmarks.quality.methods.attention import attend, exact_logits

__all__ = ["METHODS", "HFModel", "HFRunner", "make_method"]

# Of one layer and request: (layer, query [num_heads, q_len, head_size],
# keys and values [num_kv_heads, seq_len, head_size], scale).
LayerHook = Callable[
    [int, torch.Tensor, torch.Tensor, torch.Tensor, float], torch.Tensor | None
]

_ATTENTION = "clusterkv_quality"


def _attention(
    module, query, key, value, attention_mask, scaling, layer_hook=None, **kwargs
):
    """transformers' attention function: sdpa, unless a hook has its own output.

    ``layer_hook`` comes from the keyword arguments of the model's call. Without a mask,
    which transformers makes only for names it knows, sdpa is causal for prompts and
    sees everything for single tokens: all that is needed here.
    """
    if layer_hook is not None:
        output = layer_hook(module.layer_idx, query[0], key[0], value[0], scaling)
        if output is not None:  # [num_heads, head_size] of one token
            return output[None, None].to(query.dtype), None
    return sdpa_attention_forward(
        module, query, key, value, attention_mask, scaling=scaling, **kwargs
    )


AttentionInterface.register(_ATTENTION, _attention)


@dataclass
class Prefill:
    """A prompt after prefill.

    Attributes:
        cache: Keys and values of all layers. To be copied, not grown.
        logits: [vocab_size] fp32, of the token behind the prompt.
        scale: Softmax scale.
        indexes: By method, an index of each layer. To be copied, not grown.
    """

    cache: DynamicCache
    logits: torch.Tensor
    scale: float
    indexes: dict[Method, list[Index]] = field(default_factory=dict)

    @property
    def num_bytes(self) -> int:
        """Bytes of keys and values."""
        return sum(2 * keys.nbytes for keys, _ in self.layers())

    def layers(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Keys and values of each layer: [num_kv_heads, seq_len, head_size]."""
        cached: list[Any] = self.cache.layers
        return [(layer.keys[0], layer.values[0]) for layer in cached]

    def copy_cache(self) -> DynamicCache:
        """A cache that grows on its own; growing makes new tensors."""
        cache = copy.copy(self.cache)
        cache.layers = [copy.copy(layer) for layer in self.cache.layers]
        return cache

    def index(self, method: Method) -> list[Index]:
        """An index of the prompt for each layer, that grows on its own."""
        if method not in self.indexes:
            indexes = []
            for keys, values in self.layers():
                index = method.index(self.scale)
                index.update(keys, values)
                indexes.append(index)
            self.indexes[method] = indexes
        return [copy.copy(index) for index in self.indexes[method]]


class HFModel:
    """A model, and the prompts it has been given.

    Attributes:
        model: The transformers model.
        num_layers: Its layers.
        device: Where it is.
    """

    def __init__(
        self,
        path: str,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
        prefill_bytes: int = 4 << 30,
    ) -> None:
        """Loads a model.

        Args:
            path: Its folder: a Llama or Qwen2, or another with full attention in every
                layer that calls transformers' attention interface.
            device: "cpu" or "cuda".
            dtype: Of weights, activations and cache.
            prefill_bytes: Keys and values of prompts to keep, at most, besides those
                of the last one.

        Raises:
            ValueError: Not all layers have full attention.
        """
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            path, dtype=dtype, attn_implementation=_ATTENTION
        )
        self.model = loaded.to(device).eval()
        # 16-bit logits would put a floor of .001 nats under every divergence.
        self._head = self.model.get_output_embeddings().weight.float()
        config = self.model.config
        kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
        if kinds != {"full_attention"}:
            raise ValueError(f"every layer must have full attention, got {kinds}")
        self.num_layers: int = config.num_hidden_layers
        self.device = torch.device(device)
        self._prefill_bytes = prefill_bytes
        self._prefills: OrderedDict[tuple[int, ...], Prefill] = OrderedDict()

    @property
    def eos_token_ids(self) -> set[int]:
        """Tokens that end an answer."""
        eos = self.model.generation_config.eos_token_id
        if eos is None:
            return set()
        return set(eos) if isinstance(eos, list) else {eos}

    def prefill(self, prompt: Sequence[int]) -> Prefill:
        """The prompt's prefill, computed or remembered."""
        key = tuple(prompt)
        if not key:
            raise ValueError("prompt must hold at least one token, got none")
        if key not in self._prefills:
            scales: set[float] = set()

            def note_scale(layer, query, keys, values, scale):
                scales.add(scale)

            cache = DynamicCache()
            logits = self.forward(prompt, cache, note_scale)
            [scale] = scales
            self._prefills[key] = Prefill(cache, logits, scale)
        self._prefills.move_to_end(key)
        kept = sum(prefill.num_bytes for prefill in self._prefills.values())
        while len(self._prefills) > 1 and kept > self._prefill_bytes:
            _, oldest = self._prefills.popitem(last=False)
            kept -= oldest.num_bytes
        return self._prefills[key]

    @torch.inference_mode()
    def forward(
        self,
        token_ids: Sequence[int] | torch.Tensor,
        cache: DynamicCache,
        layer_hook: LayerHook,
    ) -> torch.Tensor:
        """Runs tokens behind those in the cache, several only if it is empty.

        Args:
            token_ids: The tokens. A tensor on the model's device spares a copy, for
                which the host would wait.
            cache: Grows by them.
            layer_hook: Called in every layer, keys and values with these tokens'. If it
                returns an output, [num_heads, head_size] for a single token, it
                replaces dense attention's.

        Returns:
            [vocab_size] fp32: logits behind the last token.
        """
        ids = torch.as_tensor(token_ids, device=self.device)[None]
        output: Any = self.model.base_model(
            input_ids=ids,
            past_key_values=cache,
            use_cache=True,
            layer_hook=layer_hook,
        )
        return self._head @ output.last_hidden_state[0, -1].float()


class HFRunner:
    """One method at one budget.

    Attributes:
        name: Method and budget.
        mean_attended: Tokens attended to exactly in the last call, mean over its
            requests, decode steps, layers and KV heads; None if nothing was decoded.
    """

    def __init__(
        self,
        model: HFModel,
        method: Method,
        token_budget: int,
        name: str | None = None,
        num_dense_layers: int = 0,
        num_decoded_prompt_tokens: int = 0,
        top_k: int = 100,
    ) -> None:
        """Makes a runner.

        Args:
            model: The model, shared by runners.
            method: What selects.
            token_budget: Tokens a KV head chooses, besides those always attended to.
            name: A name; None for the method's type and the budget.
            num_dense_layers: First layers that attend to everything: none in the
                product, 2 in the papers of Quest and ClusterKV.
            num_decoded_prompt_tokens: Last tokens of each prompt that go through the
                decode path, too, as Quest and ClusterKV feed the question. 0 is what
                serving does. Not those of ``score``.
            top_k: Likeliest tokens that ``score`` gives for each step.
        """
        self.model, self.method, self.token_budget = model, method, token_budget
        self.name = name or f"{type(method).__name__}-{token_budget}"
        self._num_dense_layers = num_dense_layers
        self._num_decoded, self._top_k = num_decoded_prompt_tokens, top_k
        self._attended = _Attended()

    @property
    def mean_attended(self) -> float | None:
        """Tokens a decode step of the last call attended to exactly."""
        return self._attended.mean()

    def generate(self, prompts: list[list[int]], max_tokens: int) -> list[list[int]]:
        """Greedy answers.

        Args:
            prompts: Token ids of each.
            max_tokens: Tokens of an answer, at most.

        Returns:
            Token ids of each answer, with the token that ended it, if one did.
        """
        self._attended = _Attended()
        return [self._generate(prompt, max_tokens) for prompt in prompts]

    def _generate(self, prompt: list[int], max_tokens: int) -> list[int]:
        eos_token_ids, answer = self.model.eos_token_ids, []
        decoder = self._start(prompt, self._num_decoded)
        for _ in range(max_tokens):
            token = int(decoder.logits.argmax())
            answer.append(token)
            if token in eos_token_ids or len(answer) == max_tokens:
                break
            decoder.step(torch.tensor([token], device=self.model.device))
        return answer

    def score(self, prompts: list[list[int]], forced: list[list[int]]) -> Generated:
        """Next-token distributions along given continuations, as ``VllmRunner.score``.

        Prompts are prefilled whole, so that the first distribution is dense in every
        method; each further one is a decode step's.

        Args:
            prompts: Token ids of each.
            forced: The continuation of each.
        """
        self._attended = _Attended()
        scored = [self._score(*pair) for pair in zip(prompts, forced, strict=True)]
        return Generated(forced, self.mean_attended, scored)

    @torch.inference_mode()
    def _score(self, prompt: list[int], forced: list[int]) -> Scored:
        token_ids = self._on_device(forced)
        logprobs, top_ids, top_logprobs = [], [], []
        for i, logits in enumerate(self._along(prompt, token_ids, 0)):
            row = logits.log_softmax(0)
            # Indexing by a tensor without dimensions would wait for its value.
            logprobs.append(row.gather(0, token_ids[i : i + 1]))
            best = row.topk(min(self._top_k, len(row)))
            top_ids.append(best.indices)
            top_logprobs.append(best.values)
        return Scored(
            np.array(forced, np.int32),
            torch.cat(logprobs).cpu().numpy(),
            torch.stack(top_ids).int().cpu().numpy(),
            torch.stack(top_logprobs).cpu().numpy(),
        )

    def logprobs(
        self, prompt_ids: list[int], continuation_ids: list[int]
    ) -> list[float]:
        """Log-probabilities of a given continuation, in nats, one a token.

        The tokens are fed one by one through the decode path, whatever the model would
        have said. The first is judged by dense prefill, unless tokens of the prompt are
        decoded, too.
        """
        rows = self.logits(prompt_ids, continuation_ids).log_softmax(1)
        return rows.gather(1, self._on_device(continuation_ids)[:, None])[:, 0].tolist()

    def logits(
        self, prompt_ids: list[int], continuation_ids: list[int]
    ) -> torch.Tensor:
        """Whole distributions, as ``logprobs``: [num_tokens, vocab_size] fp32."""
        self._attended = _Attended()
        token_ids = self._on_device(continuation_ids)
        return torch.stack([*self._along(prompt_ids, token_ids, self._num_decoded)])

    def _along(
        self, prompt: list[int], token_ids: torch.Tensor, num_decoded: int
    ) -> Iterator[torch.Tensor]:
        """Logits before each of the tokens, which are fed one by one."""
        decoder = self._start(prompt, num_decoded)
        yield decoder.logits
        for token in token_ids[:-1, None]:
            decoder.step(token)
            yield decoder.logits

    def _start(self, prompt: list[int], num_decoded: int) -> "_Decoder":
        num_dense = max(len(prompt) - num_decoded, 1)
        prefill = self.model.prefill(prompt[:num_dense])
        decoder = _Decoder(
            self.model,
            prefill,
            self.method,
            self.token_budget,
            self._num_dense_layers,
            self._attended,
        )
        for token in self._on_device(prompt[num_dense:])[:, None]:
            decoder.step(token)
        return decoder

    def _on_device(self, token_ids: list[int]) -> torch.Tensor:
        return torch.tensor(token_ids, dtype=torch.int64, device=self.model.device)


class _Attended:
    """Tokens attended to exactly, summed where they are counted."""

    def __init__(self) -> None:
        self._sums: torch.Tensor | int = 0
        self._num_layers = 0

    def add(self, num_attended: torch.Tensor) -> None:
        """Counts a layer of a step: [num_kv_heads]."""
        self._sums = self._sums + num_attended
        self._num_layers += 1

    def mean(self) -> float | None:
        """Over all that were added; None if none were."""
        if isinstance(self._sums, int):
            return None
        return float(self._sums.double().mean()) / self._num_layers


class _Decoder:
    """An answer in the making.

    Attributes:
        logits: [vocab_size] fp32, of the next token.
    """

    def __init__(
        self,
        model: HFModel,
        prefill: Prefill,
        method: Method,
        token_budget: int,
        num_dense_layers: int,
        attended: _Attended,
    ) -> None:
        self.logits, self._attended = prefill.logits, attended
        self._model, self._token_budget = model, token_budget
        self._num_dense_layers = num_dense_layers
        self._cache = prefill.copy_cache()
        with torch.inference_mode():
            self._indexes = prefill.index(method)

    def step(self, token: torch.Tensor) -> None:
        """Decodes one token, [1] int64 on the model's device."""
        self.logits = self._model.forward(token, self._cache, self._attend)

    def _attend(self, layer, query, keys, values, scale) -> torch.Tensor | None:
        if layer < self._num_dense_layers:
            num_kv_heads, seq_len, _ = keys.shape
            self._attended.add(torch.full((num_kv_heads,), seq_len, device=keys.device))
            return None
        index = self._indexes[layer]
        index.update(keys, values)
        selection = index.select(query[:, 0], self._token_budget)
        self._attended.add(selection.num_attended)
        return attend(selection, exact_logits(query[:, 0], keys, scale), values)
