"""Images and their classes: scikit-learn's digits, offline, or a data set of the Hub such as CIFAR-10."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from flag_checks import nearest
from recipe_error import RecipeError
from sample_order import SampleOrder
from torch import Tensor

DIGITS = "digits"
VALIDATION_SPLITS = ("test", "validation")


@dataclass(frozen=True)
class Images:
    """Images of one side of a split.

    Attributes:
        pixels: (N, channels, H, W) float32, each channel with mean 0 and variance 1 over the training images.
        labels: (N,) int64.
    """

    pixels: np.ndarray
    labels: np.ndarray


@dataclass(frozen=True)
class ImageSplit:
    """Training and validation images, the number of classes, and the hash of it all."""

    train: Images
    validation: Images | None
    num_labels: int
    fingerprint: str


def load_digits(validation_fraction: float) -> ImageSplit:
    """Load the 1,797 handwritten digits of 8x8 pixels that come with scikit-learn; a hash of each holds it out."""
    try:
        from sklearn.datasets import load_digits as load
    except ImportError as error:
        raise RecipeError(f"--dataset_name {DIGITS} needs scikit-learn: pip install scikit-learn") from error
    digits = load()
    pixels = digits.images[:, None].astype(np.uint8)
    held_out = np.array(
        [int.from_bytes(hashlib.blake2b(image, digest_size=8).digest(), "big") for image in map(bytes, pixels)],
        dtype=np.uint64,
    ) < np.uint64(validation_fraction * 2**64)
    validation = (pixels[held_out], digits.target[held_out]) if held_out.any() else None
    return normalised((pixels[~held_out], digits.target[~held_out]), validation, 10)


def load_hub_images(name: str, config: str | None, split: str | None) -> ImageSplit:
    """Load a data set with one column of images and one of classes; its test split is for validation.

    Raises:
        RecipeError: if it cannot be loaded or has other columns, or images of several sizes.
    """
    try:
        import datasets
    except ImportError as error:
        raise RecipeError(f"--dataset_name {name} needs the package datasets, or use {DIGITS}") from error
    try:
        loaded = datasets.load_dataset(name, config)
    except Exception as error:  # the Hub's client, fsspec and the builders each have their own
        raise RecipeError(f"--dataset_name {name} cannot be loaded: {error}{nearest(name, [DIGITS])}") from error
    split = split or "train"
    if split not in loaded:
        raise RecipeError(f"--dataset_split {split}: {name} has {', '.join(loaded)}")
    features = loaded[split].features
    image = next((column for column, kind in features.items() if isinstance(kind, datasets.Image)), None)
    label = next((column for column, kind in features.items() if isinstance(kind, datasets.ClassLabel)), None)
    if image is None or label is None:
        raise RecipeError(f"{name} has no column of images with one of classes: {', '.join(features)}")

    def side(rows: Any) -> tuple[np.ndarray, np.ndarray]:
        arrays = [np.asarray(picture.convert("RGB")) for picture in rows[image]]
        if len({array.shape for array in arrays}) != 1:
            raise RecipeError(f"the images of {name} are not all of one size")
        return np.stack(arrays).transpose(0, 3, 1, 2), np.array(rows[label], dtype=np.int64)

    held_out = next((name for name in VALIDATION_SPLITS if name in loaded and name != split), None)
    validation = None if held_out is None else side(loaded[held_out])
    return normalised(side(loaded[split]), validation, features[label].num_classes)


def normalised(
    train: tuple[np.ndarray, np.ndarray], validation: tuple[np.ndarray, np.ndarray] | None, num_labels: int
) -> ImageSplit:
    """Scale both sides by the training images' mean and standard deviation a channel."""
    mean = train[0].mean((0, 2, 3), keepdims=True, dtype=np.float64)
    deviation = train[0].std((0, 2, 3), keepdims=True, dtype=np.float64)
    digest = hashlib.sha256()

    def scaled(side: tuple[np.ndarray, np.ndarray]) -> Images:
        for array in side:
            digest.update(f"{array.dtype} {array.shape}".encode())
            digest.update(np.ascontiguousarray(array).tobytes())
        return Images(((side[0] - mean) / deviation).astype(np.float32), side[1].astype(np.int64))

    sides = scaled(train), None if validation is None else scaled(validation)
    return ImageSplit(*sides, num_labels, digest.hexdigest())


class TrainingImages(torch.utils.data.Dataset[dict[str, Any]]):
    """Shifted, and if told mirrored, images; sample i is a function of (images, seed, i) alone.

    Args:
        images: the training images.
        seed: of the order and the changes.
        length: samples of a whole run.
        shift: most pixels to move an image in each direction; what comes in is reflected.
        mirror: turn each second image, on average, left to right.
    """

    def __init__(self, images: Images, *, seed: int, length: int, shift: int, mirror: bool) -> None:
        self.images = images
        self.seed = seed
        self.shift = shift
        self.mirror = mirror
        self.order = SampleOrder(len(images.labels), seed, length)

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, index: int) -> dict[str, Any]:
        chosen = self.order[index]
        rng = np.random.default_rng([self.seed, index])
        pixels = self.images.pixels[chosen]
        height, width = pixels.shape[1:]
        down, right = rng.integers(2 * self.shift + 1, size=2)
        padded = np.pad(pixels, ((0, 0), (self.shift, self.shift), (self.shift, self.shift)), mode="reflect")
        pixels = padded[:, down : down + height, right : right + width]
        if self.mirror and rng.integers(2):
            pixels = pixels[:, :, ::-1]
        return {"pixel_values": pixels, "labels": self.images.labels[chosen]}


class EvaluationImages(torch.utils.data.Dataset[dict[str, Any]]):
    """Images as they are, in order; the first ``length`` of them if given."""

    def __init__(self, images: Images, length: int | None = None) -> None:
        self.images = images
        self.length = len(images.labels) if length is None else min(length, len(images.labels))

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"pixel_values": self.images.pixels[index], "labels": self.images.labels[index]}


def collate_images(samples: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    """Stack samples into pixel_values (batch, channels, H, W) float32 and labels (batch,) int64."""
    pixels = np.stack([sample["pixel_values"] for sample in samples])
    return {
        "pixel_values": torch.from_numpy(pixels),
        "labels": torch.tensor([int(sample["labels"]) for sample in samples]),
    }
