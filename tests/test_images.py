"""Images of the convnet recipe: a sample is a function of the seed and its number; and the network's first layer."""

import numpy as np
import pytest
import torch
from convnet import ConvNetConfig, ConvNetForImageClassification
from datasets import ClassLabel, Dataset, Features, Image
from image_data import (
    EvaluationImages,
    Images,
    TrainingImages,
    collate_images,
    load_digits,
    load_hub_images,
    normalised,
)
from PIL import Image as PilImage
from recipe_error import RecipeError


def some_images(count: int = 10) -> Images:
    pixels = np.arange(count * 36, dtype=np.float32).reshape(count, 1, 6, 6)
    return Images(pixels, np.arange(count))


def test_samples_are_a_function_of_seed_and_number() -> None:
    samples = TrainingImages(some_images(), seed=3, length=25, shift=1, mirror=True)
    once = [samples[index] for index in range(25)]
    again = TrainingImages(some_images(), seed=3, length=25, shift=1, mirror=True)
    for index in (24, 3, 11):
        assert np.array_equal(again[index]["pixel_values"], once[index]["pixel_values"])
    assert sorted(sample["labels"] for sample in once[:10]) == sorted(sample["labels"] for sample in once[10:20])
    other = TrainingImages(some_images(), seed=4, length=25, shift=1, mirror=True)
    assert any(not np.array_equal(other[i]["pixel_values"], once[i]["pixel_values"]) for i in range(5))
    with pytest.raises(IndexError):
        samples[25]


def test_images_are_shifted_and_mirrored() -> None:
    images = some_images(1)
    samples = TrainingImages(images, seed=0, length=400, shift=1, mirror=True)
    seen = {samples[index]["pixel_values"].tobytes() for index in range(400)}
    assert len(seen) == 9 * 2
    padded = np.pad(images.pixels[0, 0], 1, mode="reflect")
    moved = [padded[down : down + 6, right : right + 6] for down in range(3) for right in range(3)]
    assert seen == {np.ascontiguousarray(view).tobytes() for each in moved for view in (each, each[:, ::-1])}
    still = TrainingImages(images, seed=0, length=5, shift=0, mirror=False)
    assert np.array_equal(still[4]["pixel_values"], images.pixels[0])


def test_digits_are_split_by_their_own_hash_and_normalised() -> None:
    split, larger = load_digits(0.1), load_digits(0.3)
    assert split.validation is not None
    assert larger.validation is not None
    assert len(split.train.labels) + len(split.validation.labels) == 1797
    assert 120 < len(split.validation.labels) < 240 < len(larger.validation.labels)
    assert split.fingerprint != larger.fingerprint
    assert split.train.pixels.mean() == pytest.approx(0, abs=1e-5)
    assert split.train.pixels.std() == pytest.approx(1, abs=1e-5)
    assert load_digits(0.0).validation is None
    batch = collate_images([EvaluationImages(split.validation, 7)[index] for index in range(7)])
    assert batch["pixel_values"].shape == (7, 1, 8, 8)
    assert batch["labels"].dtype == torch.int64


def test_a_data_set_of_images_is_read_as_it_is_on_the_hub(tmp_path) -> None:
    rng = np.random.default_rng(0)
    arrays = rng.integers(256, size=(12, 6, 6, 3), dtype=np.uint8)
    features = Features({"img": Image(), "label": ClassLabel(names=["a", "b", "c"])})

    def rows(part: slice) -> Dataset:
        pictures = [PilImage.fromarray(array) for array in arrays[part]]
        labels = [index % 3 for index in range(12)][part]
        return Dataset.from_dict({"img": pictures, "label": labels}, features=features)

    (tmp_path / "hub").mkdir()
    for side, part in (("train", slice(0, 9)), ("test", slice(9, 12))):
        rows(part).to_parquet(tmp_path / "hub" / f"{side}-00000-of-00001.parquet")
    split = load_hub_images(str(tmp_path / "hub"), None, None)
    pixels = arrays.transpose(0, 3, 1, 2)
    wanted = normalised((pixels[:9], np.arange(9) % 3), (pixels[9:], np.arange(9, 12) % 3), 3)
    assert split.num_labels == 3
    assert split.validation is not None
    assert np.array_equal(split.train.pixels, wanted.train.pixels)
    assert split.validation.labels.tolist() == [0, 1, 2]
    assert split.fingerprint == wanted.fingerprint
    with pytest.raises(RecipeError, match="--dataset_split valid"):
        load_hub_images(str(tmp_path / "hub"), None, "valid")
    with pytest.raises(RecipeError, match="cannot be loaded"):
        load_hub_images(str(tmp_path / "nothing"), None, None)


def test_the_first_layer_whitens_patches() -> None:
    split = load_digits(0.1)
    model = ConvNetForImageClassification(ConvNetConfig(image_size=8, channels=1, widths=[16, 32]))
    model.set_whitening(split.train.pixels)
    with torch.no_grad():
        patches = model.whitening(torch.from_numpy(split.train.pixels))
    half = patches[:, :4].transpose(0, 1).flatten(1)
    covariance = half @ half.T / half.shape[1]
    torch.testing.assert_close(covariance, torch.eye(4), atol=0.05, rtol=0)
    assert torch.equal(patches[:, :4], -patches[:, 4:])
    assert not model.whitening.weight.requires_grad


def test_the_network_has_the_speedruns_size() -> None:
    with torch.device("meta"):
        model = ConvNetForImageClassification(ConvNetConfig())
    convolutions = 9 * (24 * 64 + 64 * 64 + 64 * 256 + 3 * 256 * 256)
    biases = 24 + 2 * 64 + 4 * 256
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert trained == convolutions + biases + 256 * 10
