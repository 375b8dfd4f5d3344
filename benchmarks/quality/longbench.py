# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_clusterkv project
"""Six tasks of LongBench (arXiv 2308.14508), from a folder of its JSONL files."""

import json
from dataclasses import dataclass
from pathlib import Path

from benchmarks.quality.samples import Prompter, Sample

PREFIX = "longbench_"


@dataclass(frozen=True)
class Task:
    """How LongBench asks and scores.

    Attributes:
        template: With {context} and {input}.
        max_tokens: Of the answer.
        metric: Name of a function in ``scoring.METRICS``.
        chat: Whether the model's chat template is used.
    """

    template: str
    max_tokens: int
    metric: str
    chat: bool = True


_CONCISELY = (
    "as concisely as you can, using a single phrase or sentence if possible. If the "
    "question cannot be answered based on the information in the article, write "
    '"unanswerable". If the question is a yes/no question, answer "yes", "no", or '
    '"unanswerable". Do not provide any explanation.'
)
_ONLY = "Only give me the answer and do not output any other words."
_PASSAGES = (
    f"Answer the question based on the given passages. {_ONLY}\n\nThe following are "
    "given passages.\n{context}\n\nAnswer the question based on the given passages. "
    f"{_ONLY}\n\nQuestion: {{input}}\nAnswer:"
)

TASKS = {
    "qasper": Task(
        "You are given a scientific article and a question. Answer the question "
        f"{_CONCISELY}\n\nArticle: {{context}}\n\n Answer the question based on the "
        f"above article {_CONCISELY}\n\nQuestion: {{input}}\n\nAnswer:",
        128,
        "qa_f1",
    ),
    "multifieldqa_en": Task(
        "Read the following text and answer briefly.\n\n{context}\n\nNow, answer the "
        "following question based on the above text, only give me the answer and do "
        "not output any other words.\n\nQuestion: {input}\nAnswer:",
        64,
        "qa_f1",
    ),
    "hotpotqa": Task(_PASSAGES, 32, "qa_f1"),
    "2wikimqa": Task(_PASSAGES, 32, "qa_f1"),
    "passage_retrieval_en": Task(
        "Here are 30 paragraphs from Wikipedia, along with an abstract. Please "
        "determine which paragraph the abstract is from.\n\n{context}\n\nThe following "
        "is an abstract.\n\n{input}\n\nPlease enter the number of the paragraph that "
        'the abstract is from. The answer format must be like "Paragraph 1", '
        '"Paragraph 2", etc.\n\nThe answer is: ',
        32,
        "retrieval",
    ),
    "lcc": Task(
        "Please complete the code given below. \n{context}Next line of code:\n",
        64,
        "code_similarity",
        chat=False,
    ),
}


def make_samples(
    folder: Path,
    prompter: Prompter,
    context_len: int,
    num_samples: int,
    max_answer_tokens: int | None = None,
) -> list[Sample]:
    """The first samples of each task that the folder has.

    Args:
        folder: With ``qasper.jsonl`` and so on.
        prompter: With the model's tokenizer.
        context_len: Tokens of prompt and answer together; of a longer document the
            middle is left out, as in LongBench.
        num_samples: Of each task, at most.
        max_answer_tokens: If less than LongBench's.

    Raises:
        ValueError: The folder has none of the files.
    """
    files = {name: folder / f"{name}.jsonl" for name in TASKS}
    found = {name: file for name, file in files.items() if file.is_file()}
    if not found:
        raise ValueError(
            "--longbench must be a folder with at least one of "
            f"{', '.join(file.name for file in files.values())}; got {folder}"
        )
    for name in files.keys() - found.keys():
        print(f"longbench: no {name}.jsonl in {folder}, left out")
    samples = []
    for name, file in found.items():
        task = TASKS[name]
        max_tokens = min(task.max_tokens, max_answer_tokens or task.max_tokens)
        lines = file.read_text().splitlines()[:num_samples]
        for index, line in enumerate(lines):
            item = json.loads(line)
            samples.append(
                Sample(
                    PREFIX + name,
                    context_len,
                    index,
                    _prompt(prompter, task, item, context_len - max_tokens),
                    item["answers"],
                    max_tokens,
                    task.metric,
                )
            )
    return samples


def _prompt(prompter: Prompter, task: Task, item: dict, max_tokens: int) -> list[int]:
    text = task.template.format(context=item["context"], input=item["input"])
    prompt = prompter.encode(text, chat=task.chat)
    ids = prompter.tokenizer.encode(text, add_special_tokens=False)
    kept = max_tokens
    while len(prompt) > max_tokens:
        half = kept // 2
        begin, end = ids[:half], ids[len(ids) - half :]
        text = prompter.tokenizer.decode(begin) + prompter.tokenizer.decode(end)
        prompt = prompter.encode(text, chat=task.chat)
        # What the chat template adds, and tokens that the cut broke.
        kept -= max(len(prompt) - max_tokens, 2)
    return prompt
