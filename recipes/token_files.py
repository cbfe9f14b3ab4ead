"""Tokens in files, mapped into memory."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from data_sources import TOKEN_SUFFIX


class Segment(NamedTuple):
    """Tokens ``start`` to ``stop`` of one file, which begin ``offset`` bytes into it."""

    path: Path
    dtype: str
    offset: int
    start: int
    stop: int


class TokenFile:
    """A stream of tokens in one or more mapped files; ``len`` and slices count tokens.

    It can be sent to other processes, which map the files themselves.
    """

    def __init__(self, segments: Sequence[Segment], name: str) -> None:
        self.segments = tuple(segments)
        self.name = name
        self._ends = np.cumsum([segment.stop - segment.start for segment in self.segments])
        self._maps: list[np.ndarray] | None = None

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __str__(self) -> str:
        first, *more = (str(segment.path) for segment in self.segments)
        return f"{first} and {len(more)} more" if more else first

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_maps": None}

    def __getitem__(self, part: slice) -> np.ndarray:
        """Return the tokens of a slice without a step, in the files' dtype."""
        if self._maps is None:
            self._maps = [
                np.memmap(segment.path, dtype=segment.dtype, mode="r", offset=segment.offset)[
                    segment.start : segment.stop
                ]
                for segment in self.segments
            ]
        start, stop, _ = part.indices(len(self))
        if start >= stop:
            return self._maps[0][:0]
        pieces = []
        first = int(np.searchsorted(self._ends, start, side="right"))
        for tokens, end in zip(self._maps[first:], self._ends[first:], strict=True):
            begin = int(end) - len(tokens)
            pieces.append(tokens[max(0, start - begin) : max(0, stop - begin)])
            if end >= stop:
                break
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)

    def part(self, start: int, stop: int, name: str) -> "TokenFile":
        """Return the tokens from ``start`` to ``stop`` as a stream of its own."""
        segments = []
        for segment, end in zip(self.segments, map(int, self._ends), strict=True):
            begin = end - (segment.stop - segment.start)
            if begin < stop and start < end:
                shift = segment.start - begin
                segments.append(segment._replace(start=max(start, begin) + shift, stop=min(stop, end) + shift))
        return TokenFile(segments, name)


class ProteinFile:
    """Sequences in a mapped file; ``len`` counts them, ``[i]`` is the (length,) uint8 residues of one.

    It can be sent to other processes, which map the file themselves.
    """

    def __init__(self, path: Path, name: str) -> None:
        self.path = path
        self.name = name
        self._count = starts_path(path).stat().st_size // 8 - 1
        self._maps: tuple[np.ndarray, np.ndarray] | None = None

    def __len__(self) -> int:
        return self._count

    def __str__(self) -> str:
        return str(self.path)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_maps": None}

    def __getitem__(self, index: int) -> np.ndarray:
        if not 0 <= index < self._count:
            raise IndexError(f"sequence {index} of {self._count}")
        if self._maps is None:
            self._maps = np.memmap(self.path, "uint8", mode="r"), np.memmap(starts_path(self.path), "<u8", mode="r")
        residues, starts = self._maps
        return np.asarray(residues[int(starts[index]) : int(starts[index + 1])])


def starts_path(path: Path) -> Path:
    """Return the file of starts beside a file of proteins."""
    return path.with_suffix(f".starts{TOKEN_SUFFIX}")


def token_dtype(words: int) -> str:
    """Return the type of a token file for a vocabulary of so many words."""
    return "<u2" if words < 2**16 else "<u4"
