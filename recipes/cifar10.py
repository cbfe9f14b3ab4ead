"""Train a small convolutional network on images, in the style of the CIFAR-10 speedrun: matrices from convolutions.

    python recipes/cifar10.py --preset tiny --optim mud
    python recipes/cifar10.py --preset 8-passes --optim muon

``tiny`` reads the 1,797 digits that come with scikit-learn, offline; the others CIFAR-10 from the Hub, for the MUD
paper's 8 and 13 passes. The network is the speedrun's in form (``convnet.py``); its training here has one optimizer of
this package, AdamW's size of update and a cosine instead of the speedrun's settings, so times and accuracies are not
the speedrun's. A token of the flags and the logs is an image.
"""

import sys
from typing import Any

from convnet import ConvNetConfig
from pretrain import main
from recipe_arguments import Preset
from run_defaults import ADAMW_AND_CLIP, LARGE_RUN

import hf_matrix_optim  # noqa: F401  makes --optim muon, adamuon, adamuon_v1 and mud known to TrainingArguments

IMAGES: dict[str, Any] = {
    "block_size": 1,
    "label_smoothing_factor": 0.2,
    "schedule": "cosine",
    "floor": 0.0,
    "warmup_steps": 0.2,
    "weight_decay": 0.02,
}

CIFAR_RUN: dict[str, Any] = {
    **LARGE_RUN,
    **IMAGES,
    "dataset_name": "uoft-cs/cifar10",
    "tokens_per_step": 2000,
    "per_device_train_batch_size": 2000,
    "per_device_eval_batch_size": 2000,
    "learning_rate": 1e-2,
    "logging_steps": 5,
    "eval_strategy": "epoch",
    "save_strategy": "no",
    "dataloader_num_workers": 8,
}

CIFAR_MODEL = {"image_size": 32, "channels": 3, "widths": [64, 256, 256], "num_labels": 10}

PRESETS = {
    "tiny": Preset(
        config_class=ConvNetConfig,
        model={"image_size": 8, "channels": 1, "widths": [16, 32], "num_labels": 10},
        defaults={
            **ADAMW_AND_CLIP,
            **IMAGES,
            "dataset_name": "digits",
            "validation_fraction": 0.2,
            "tokens_per_step": 64,
            "per_device_train_batch_size": 64,
            "per_device_eval_batch_size": 256,
            "num_train_epochs": 10,
            "learning_rate": 1e-2,
            "logging_steps": 10,
            "eval_strategy": "epoch",
            "save_steps": 100,
            "save_total_limit": 2,
        },
        task="image_classification",
    ),
    "8-passes": Preset(
        config_class=ConvNetConfig,
        model=CIFAR_MODEL,
        defaults={**CIFAR_RUN, "num_train_epochs": 8},
        task="image_classification",
    ),
    "13-passes": Preset(
        config_class=ConvNetConfig,
        model=CIFAR_MODEL,
        defaults={**CIFAR_RUN, "num_train_epochs": 13},
        task="image_classification",
    ),
}

if __name__ == "__main__":
    sys.exit(main("cifar10", PRESETS))
