"""The order of a run's samples, a function of the seed alone."""

import numpy as np
from recipe_error import RecipeError


class SampleOrder:
    """Pass after pass over ``count`` things, each pass in its own random order.

    Sample i depends on ``count``, ``seed`` and i alone. So every optimizer sees the same batches, whatever the number
    of workers, ranks and accumulation steps, and a resumed run skips to its place without reading what came before.
    """

    def __init__(self, count: int, seed: int, length: int) -> None:
        if count < 1:
            raise RecipeError("there is nothing to train on")
        self.count = count
        self.seed = seed
        self.length = length
        self._pass: tuple[int, np.ndarray] | None = None

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> int:
        if not 0 <= index < self.length:
            raise IndexError(f"sample {index} of a run of {self.length}")
        number, position = divmod(index, self.count)
        if self._pass is None or self._pass[0] != number:
            self._pass = number, np.random.default_rng([self.seed, number]).permutation(self.count)
        return int(self._pass[1][position])


def spread(count: int, length: int | None) -> np.ndarray:
    """Return (min(length, count),) int64 numbers below ``count``, in order and evenly spread; all without ``length``.

    Raises:
        RecipeError: if ``count`` is 0.
    """
    if count < 1:
        raise RecipeError("there is nothing to evaluate on")
    chosen = count if length is None else min(length, count)
    return np.arange(chosen) * count // chosen
