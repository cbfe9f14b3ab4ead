"""Protein sequences as ESM-2 reads them, cropped and masked by a byte table and numpy.

Every sample is a function of (sequences, seed, sample number) alone: its place in the order, its crop and its masks.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from recipe_error import RecipeError
from sample_order import SampleOrder, spread
from torch import Tensor

if TYPE_CHECKING:
    from prepared_data import ProteinFile

# ESM-2's vocabulary in its order (fair-esm, Alphabet "ESM-1b").
ESM_VOCABULARY = (
    *("<cls>", "<pad>", "<eos>", "<unk>"),
    *"LAGVSERTIDPKQNFYMHWCXBUZO.-",
    *("<null_1>", "<mask>"),
)
CLS, PAD, EOS, MASK = (ESM_VOCABULARY.index(word) for word in ("<cls>", "<pad>", "<eos>", "<mask>"))
STANDARD = np.array([ESM_VOCABULARY.index(residue) for residue in "LAGVSERTIDPKQNFYMHWC"], dtype=np.int64)
MASKED, REPLACED = 0.8, 0.1  # of the positions drawn; the rest are kept as they are
IGNORED = -100
EVALUATION_SEED = 20140101  # fixed: evaluation crops and masks must not change with a run's seed

BAD_LETTER = 255
RESIDUE_OF_BYTE = np.full(256, BAD_LETTER, dtype=np.uint8)
for _letter in "LAGVSERTIDPKQNFYMHWCXBUZO":
    RESIDUE_OF_BYTE[[ord(_letter), ord(_letter.lower())]] = ESM_VOCABULARY.index(_letter)
# IUPAC's J, leucine or isoleucine, has no word in ESM's vocabulary: it is read as X, any residue.
RESIDUE_OF_BYTE[[ord("J"), ord("j")]] = ESM_VOCABULARY.index("X")


def encode_residues(sequence: str, place: str = "sequence") -> np.ndarray:
    """Return a sequence's (length,) uint8 words in ESM-2's vocabulary, without ``<cls>`` and ``<eos>``.

    Lower case counts as upper case; one ``*`` (stop) at the end is left out; J is read as X.

    Raises:
        RecipeError: naming ``place``, the first letter that is no residue, and its position from 1.
    """
    letters = np.frombuffer(sequence.removesuffix("*").encode("ascii", "replace"), dtype=np.uint8)
    residues = RESIDUE_OF_BYTE[letters]
    if (bad := residues == BAD_LETTER).any():
        position = int(bad.argmax())
        raise RecipeError(
            f"{place}: {sequence[position]!r} at position {position + 1} is no amino acid; sequences are one-letter "
            "codes (A-Z), unaligned"
        )
    return residues


def mask_sequence(
    residues: np.ndarray, max_length: int, rng: np.random.Generator, mask_fraction: float
) -> dict[str, np.ndarray]:
    """Crop, frame, pad and mask one sequence.

    About ``mask_fraction`` of the residues, at least one, are to be predicted: of these 80 % become ``<mask>``, 10 % a
    random one of the 20 standard residues, 10 % stay. ``<cls>``, ``<eos>`` and ``<pad>`` are never drawn.

    Returns:
        input_ids, attention_mask, labels: (max_length,) int64; labels are -100 where nothing is to be predicted.
    """
    length = min(len(residues), max_length - 2)
    start = int(rng.integers(len(residues) - length + 1))
    # int64 first: numpy 2 would wrap -100 into the uint8 of the file
    cropped = residues[start : start + length].astype(np.int64)
    count = max(1, int(mask_fraction * length + rng.random()))
    drawn = rng.permutation(length)[:count]
    fate = rng.random(count)
    changed = cropped.copy()
    changed[drawn[fate < MASKED]] = MASK
    replaced = drawn[(fate >= MASKED) & (fate < MASKED + REPLACED)]
    changed[replaced] = STANDARD[rng.integers(len(STANDARD), size=len(replaced))]

    input_ids = np.full(max_length, PAD, dtype=np.int64)
    input_ids[0] = CLS
    input_ids[1 : length + 1] = changed
    input_ids[length + 1] = EOS
    labels = np.full(max_length, IGNORED, dtype=np.int64)
    labels[drawn + 1] = cropped[drawn]
    attention_mask = np.zeros(max_length, dtype=np.int64)
    attention_mask[: length + 2] = 1
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}


class MaskedProteins(torch.utils.data.Dataset[dict[str, np.ndarray]]):
    """Masked sequences, all of one shape.

    Args:
        sequences: of at least one residue each.
        max_length: of a sample, with ``<cls>`` and ``<eos>``; at least 3.
        seed: of the order, crops and masks; None for evaluation, whose order, crops and masks are fixed for good.
        length: samples of a whole run (steps x sequences a step), which pass over the sequences as often as needed.
            For evaluation the number of sequences, drawn once, or None for all.
        mask_fraction: of the residues, in (0, 1).

    Raises:
        RecipeError: if there is no sequence, or a value is out of range.
    """

    def __init__(
        self,
        sequences: "ProteinFile",
        max_length: int = 512,
        *,
        seed: int | None,
        length: int | None,
        mask_fraction: float = 0.15,
    ) -> None:
        check_masking(max_length, mask_fraction)
        self.sequences = sequences
        self.max_length = max_length
        self.seed = seed
        self.mask_fraction = mask_fraction
        if seed is None:
            self.order: SampleOrder | np.ndarray = spread(len(sequences), length)
        else:
            assert length is not None
            self.order = SampleOrder(len(sequences), seed, length)

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        chosen = int(self.order[index])
        # evaluation masks belong to the sequence, training masks to the sample
        rng = np.random.default_rng([EVALUATION_SEED, chosen] if self.seed is None else [self.seed, index])
        return mask_sequence(self.sequences[chosen], self.max_length, rng, self.mask_fraction)


def check_masking(max_length: int, mask_fraction: float) -> None:
    """Refuse values out of range.

    Raises:
        RecipeError: naming the value.
    """
    if max_length < 3:
        raise RecipeError(f"--block_size is {max_length}; a protein with <cls> and <eos> needs at least 3")
    if not 0 < mask_fraction < 1:
        raise RecipeError(f"the mask fraction is {mask_fraction}; it must be in (0, 1)")


def collate_proteins(samples: Sequence[Mapping[str, np.ndarray]]) -> dict[str, Tensor]:
    """Stack samples into input_ids, attention_mask and labels, each (batch, max_length) int64."""
    keys = ("input_ids", "attention_mask", "labels")
    return {key: torch.from_numpy(np.stack([sample[key] for sample in samples])) for key in keys}
