# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_clusterkv project
"""How a small model's answers at small budgets compare with dense attention.

Single facts, each hidden once in a few thousand tokens of the Python language
reference at a known depth, and a question for each through the chat template. One
engine answers all: a first round, not counted, fills its prefix cache, from which
every other round takes the prompts' pages and their index, so that only the budget
differs. "dense" is a budget that covers the context (tests/e2e shows that it is). A
smoke test of quality on one tiny model, not an evaluation.

Writes one row a budget to results/answers_cpu.csv: how many facts the answer held, how
many of the answers equal dense attention's word for word, and the mean tokens attended
to.
"""

import argparse
import csv
import dataclasses
import os
import pydoc_data.topics
from pathlib import Path

REPO = Path(__file__).parents[1]
NUM_ANSWER_TOKENS = 24
# A sentence, and the question that its words answer.
FACTS = [
    (
        "The secret number of the lighthouse is 7421.",
        "What is the secret number of the lighthouse?",
        "7421",
    ),
    (
        "The best thing to do in San Francisco is to eat a sandwich in Dolores Park.",
        "What is the best thing to do in San Francisco?",
        "Dolores Park",
    ),
    (
        "The favourite colour of the mayor of Lisbon is purple.",
        "What is the favourite colour of the mayor of Lisbon?",
        "purple",
    ),
    (
        "The annual fair of Oakville takes place in October.",
        "In which month does the annual fair of Oakville take place?",
        "October",
    ),
    (
        "The captain of the ship keeps his map in a red box.",
        "Where does the captain of the ship keep his map?",
        "red box",
    ),
    (
        "The museum of glass in Turin was opened by a baker.",
        "Who opened the museum of glass in Turin?",
        "baker",
    ),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default=str(REPO / ".models/SmolLM2-135M-Instruct"))
    parser.add_argument("--document-tokens", type=int, default=3000)
    parser.add_argument("--depths", type=float, nargs="+", default=[0.2, 0.5, 0.8])
    parser.add_argument(
        "--token-budgets", type=int, nargs="+", default=[1024, 512, 256, 128, 64]
    )
    parser.add_argument("--out", type=Path, default=REPO / "benchmarks/results")
    args = parser.parse_args()

    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # layers in this process
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "3")  # GiB: holds every prompt
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from vllm import LLM, SamplingParams

    from vllm_clusterkv import observe

    llm = LLM(
        args.model,
        dtype="bfloat16",
        max_model_len=args.document_tokens + 512,
        enforce_eager=True,
        attention_backend="clusterkv",
        additional_config={"clusterkv": {"min_sparse_len": 0}},
    )
    context = llm.llm_engine.vllm_config.compilation_config.static_forward_context
    impls = [layer.impl for layer in context.values() if hasattr(layer, "impl")]
    attended: list[float] = []
    observe.observers.append(
        lambda step: attended.append(step.num_attended.float().mean().item())
    )
    prompts = build_prompts(llm.get_tokenizer(), args.document_tokens, args.depths)
    sampling = SamplingParams(max_tokens=NUM_ANSWER_TOKENS, temperature=0)
    context_len = sum(len(ids) for ids, _ in prompts) / len(prompts)
    print(f"{len(prompts)} questions, {context_len:,.0f} tokens of context on average")

    rows, dense = [], []
    for round_idx, budget in enumerate([2**20, 2**20, *args.token_budgets]):
        for impl in impls:
            impl.config = dataclasses.replace(impl.config, token_budget=budget)
        attended.clear()
        answers = [
            llm.generate([{"prompt_token_ids": ids}], sampling, use_tqdm=False)[0]
            .outputs[0]
            .text
            for ids, _ in prompts
        ]
        if round_idx == 0:
            continue
        dense = dense or answers
        found = sum(
            key in answer for answer, (_, key) in zip(answers, prompts, strict=True)
        )
        same = sum(a == d for a, d in zip(answers, dense, strict=True))
        rows.append(
            {
                "model": Path(args.model).name,
                "context_len": round(context_len),
                "token_budget": "dense" if budget == 2**20 else budget,
                "questions": len(prompts),
                "facts_found": found,
                "answers_equal_dense": same,
                "tokens_attended": round(sum(attended) / len(attended)),
            }
        )
        print(rows[-1], flush=True)
    args.out.mkdir(parents=True, exist_ok=True)
    with (args.out / "answers_cpu.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def build_prompts(tokenizer, num_tokens, depths) -> list[tuple[list[int], str]]:
    """(token ids, expected words) for every fact at every depth."""
    topics = pydoc_data.topics.topics
    text = "\n".join(topics[name] for name in sorted(topics))
    document = tokenizer.encode(text)
    prompts = []
    for i, (fact, question, key) in enumerate(FACTS):
        for j, depth in enumerate(depths):
            # Another part of the text for each, so that prompts share no pages.
            start = (i * len(depths) + j) * num_tokens % (len(document) - num_tokens)
            part = document[start : start + num_tokens]
            at = int(depth * num_tokens)
            before, after = tokenizer.decode(part[:at]), tokenizer.decode(part[at:])
            message = (
                f"Read this document.\n\n{before}\n\n{fact}\n\n{after}\n\n{question}"
            )
            ids = tokenizer.apply_chat_template(
                [{"role": "user", "content": message}],
                add_generation_prompt=True,
                return_dict=False,
            )
            prompts.append((ids, key))
    return prompts


if __name__ == "__main__":
    main()
