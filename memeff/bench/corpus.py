"""Real text that every machine with Python has, its standard library, and a vocabulary for it."""

import re
import sysconfig
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import torch

_BYTES = 256
# A piece is a word with at most one space before it, a line break with the indentation that
# follows, a run of digits, a run of one punctuation mark, or a run of blanks.
_PIECE = re.compile(r" ?[^\W\d]+|\n[ \t]*|\d+| ?([^\w\s])\1*|[^\S\n]+")


def standard_library_text(max_bytes: int) -> str:
    """Up to `max_bytes` of the standard library's sources, tests left out, in a fixed order."""
    root = Path(sysconfig.get_paths()["stdlib"])
    skipped = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
    parts: list[str] = []
    size = 0
    for path in sorted(root.rglob("*.py")):
        if skipped.intersection(path.relative_to(root).parts):
            continue
        text = path.read_text(encoding="utf-8", errors="replace")
        parts.append(text)
        size += len(text)
        if size >= max_bytes:
            break
    if not parts:
        raise FileNotFoundError(f"no Python sources under {root}; expected the standard library")
    return "".join(parts)[:max_bytes]


def split_pieces(text: str) -> Iterable[str]:
    """The pieces of `text` in order; joined, they give it back."""
    return (match.group() for match in _PIECE.finditer(text))


class Vocabulary:
    """The `size` - 256 most frequent pieces of a text, and the 256 bytes for all others."""

    def __init__(self, text: str, size: int):
        if size <= _BYTES:
            raise ValueError(f"size is {size}; expected more than {_BYTES}, the single bytes")
        counts = Counter(split_pieces(text))
        # Ties are broken by the piece itself, so that the vocabulary depends on the text alone.
        ranked = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
        self._pieces = [piece for piece, _ in ranked[: size - _BYTES]]
        self._index = {piece: _BYTES + i for i, piece in enumerate(self._pieces)}

    def __len__(self) -> int:
        return _BYTES + len(self._pieces)

    def encode(self, text: str) -> torch.Tensor:
        """Token numbers [T] int64 of `text`."""
        tokens: list[int] = []
        for piece in split_pieces(text):
            index = self._index.get(piece)
            if index is None:
                tokens.extend(piece.encode())
            else:
                tokens.append(index)
        return torch.tensor(tokens)

    def decode(self, tokens: Iterable[int]) -> str:
        """The text that `encode` would turn into `tokens`; incomplete UTF-8 becomes U+FFFD."""
        pieces = [
            bytes([token]) if token < _BYTES else self._pieces[token - _BYTES].encode()
            for token in tokens
        ]
        return b"".join(pieces).decode(errors="replace")
