"""Convolutional networks that name what is in a picture."""

from typing import Any

import torch
from convnet import ConvNetForImageClassification
from image_data import (
    DIGITS,
    EvaluationImages,
    ImageSplit,
    TrainingImages,
    collate_images,
    load_digits,
    load_hub_images,
)
from model_flops import counted_flops
from recipe_arguments import Preset, RecipeArguments
from recipe_error import RecipeError
from task import Task, TrainingData
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments


class ImageClassification(Task):
    """Name what is in a picture."""

    unit = "images"
    has_perplexity = False

    def load_tokenizer(self, arguments: RecipeArguments) -> None:
        if arguments.tokenizer is not None:
            raise RecipeError("--tokenizer: images have none; leave the flag out")

    def build_config(
        self, preset: Preset, tokenizer: PreTrainedTokenizerBase | None, arguments: RecipeArguments
    ) -> PretrainedConfig:
        if arguments.attention is not None:
            raise RecipeError("--attention: a convolutional network has none; leave the flag out")
        return preset.config_class(**preset.model)

    def new_model(self, config: PretrainedConfig, attention: str | None) -> PreTrainedModel:
        return ConvNetForImageClassification(config)

    def prepare(
        self,
        arguments: RecipeArguments,
        training: TrainingArguments,
        tokenizer: PreTrainedTokenizerBase | None,
        config: PretrainedConfig,
    ) -> TrainingData:
        """Load the images.

        Raises:
            RecipeError: for files, a stream, or images of another size or number of classes than the model's.
        """
        if arguments.train_data is not None or arguments.validation_data is not None or arguments.streaming:
            raise RecipeError(
                f"images are read by --dataset_name: a data set of the Hub, a folder of one, or {DIGITS}"
            )
        name = str(arguments.dataset_name)
        split: ImageSplit = (
            load_digits(arguments.validation_fraction)
            if name == DIGITS
            else load_hub_images(name, arguments.dataset_config, arguments.dataset_split)
        )
        shape = (config.channels, config.image_size, config.image_size)
        if split.train.pixels.shape[1:] != shape or split.num_labels != config.num_labels:
            raise RecipeError(
                f"{name} has images of {split.train.pixels.shape[1:]} in {split.num_labels} classes, the model of "
                f"this preset reads {shape} in {config.num_labels}: give another --preset or data set"
            )
        # a digit is another thing in the mirror
        changes: dict[str, Any] = {"shift": 1, "mirror": False} if name == DIGITS else {"shift": 2, "mirror": True}
        return TrainingData(
            lambda seed, length: TrainingImages(split.train, seed=seed, length=length, **changes),
            None if split.validation is None else EvaluationImages(split.validation, arguments.validation_samples),
            collate_images,
            split.fingerprint,
            len(split.train.labels),
            {"train": {"images": len(split.train.labels)}},
        )

    def flops_per_token(self, config: PretrainedConfig, block_size: int) -> float:
        with torch.device("meta"):
            model = self.new_model(config, None)
            return counted_flops(model, torch.empty(1, config.channels, config.image_size, config.image_size))

    def initialise(self, model: PreTrainedModel, data: TrainingData) -> None:
        """Whiten patches of the first training images."""
        model.set_whitening(data.training(0, 1).images.pixels[:5000])
