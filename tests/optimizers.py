"""The optimizers by the names that ``--optim`` gives them."""

from collections.abc import Callable
from functools import partial
from typing import Any

from hf_matrix_optim import MUD, AdaMuon, Muon

OPTIMIZERS: dict[str, Callable[..., Any]] = {
    "muon": Muon,
    "adamuon": AdaMuon,
    "adamuon_v1": partial(AdaMuon, variant="v1"),
    "mud": MUD,
}
