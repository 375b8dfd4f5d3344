# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_clusterkv project
"""Long text without a network: a folder's files, or what comes with Python."""

import hashlib
import pydoc_data.topics
import re
import sysconfig
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

SUFFIXES = (".txt", ".md", ".rst", ".py")
MIN_CHARACTERS = 2_000


@dataclass(frozen=True)
class Texts:
    """Filler text.

    Attributes:
        text: Of all files, one after another.
        sources: For each file its name, SHA-256 and characters.
    """

    text: str
    sources: list[dict]

    @cached_property
    def pieces(self) -> list[str]:
        """Words, each with the white space behind it."""
        return re.findall(r"\S+\s*", self.text)

    @cached_property
    def words(self) -> list[str]:
        """Different lower-case words of 4 to 10 letters, sorted."""
        return sorted(set(re.findall(r"\b[a-z]{4,10}\b", self.text)))

    def excerpt(self, start: int, num_pieces: int) -> list[str]:
        """Pieces from a place on, going round at the end of the text."""
        pieces = self.pieces
        start %= len(pieces)
        taken = pieces[start : start + num_pieces]
        while len(taken) < num_pieces:
            taken += pieces[: num_pieces - len(taken)]
        return taken


def load_texts(folder: Path | None) -> Texts:
    """Reads filler text.

    Args:
        folder: With text files, at any depth, read in the order of their paths. None:
            the Python language reference in ``pydoc_data``, then the sources of the
            standard library.

    Raises:
        ValueError: There is no text.
    """
    if folder is None:
        topics = pydoc_data.topics.topics
        parts = [
            ("pydoc_data.topics", "\n".join(topics[name] for name in sorted(topics)))
        ]
        files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
        parts += [(f"stdlib/{file.name}", _read(file)) for file in files]
    else:
        if not folder.is_dir():
            raise ValueError(f"--texts must be a folder of text files, got {folder}")
        files = sorted(f for f in folder.rglob("*") if f.suffix in SUFFIXES)
        parts = [(str(file.relative_to(folder)), _read(file)) for file in files]
    text = "\n".join(part for _, part in parts)
    if len(text) < MIN_CHARACTERS:
        raise ValueError(
            f"--texts must hold at least {MIN_CHARACTERS} characters in files ending "
            f"in {', '.join(SUFFIXES)}, got {len(text)} in {len(parts)} "
            f"files of {folder}"
        )
    sources = [
        {
            "file": name,
            "sha256": hashlib.sha256(part.encode()).hexdigest(),
            "characters": len(part),
        }
        for name, part in parts
    ]
    return Texts(text, sources)


def _read(file: Path) -> str:
    return file.read_text(encoding="utf-8", errors="replace")
