"""A small convolutional network in the style of the CIFAR-10 speedrun, as a model of transformers."""

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import ImageClassifierOutput

WHITENING_SIZE = 2
WHITENING_EPS = 5e-4
LOGIT_SCALE = 1 / 9


class ConvNetConfig(PretrainedConfig):
    """Configuration of `ConvNetForImageClassification`.

    Args:
        image_size: height and width in pixels.
        channels: of an image.
        widths: output channels of each group; a group halves height and width.
        num_labels: classes.
    """

    model_type = "matrix_optim_convnet"
    image_size: int = 32
    channels: int = 3
    widths: list[int] | None = None
    num_labels: int = 10

    def __post_init__(self, **kwargs: Any) -> None:
        self.widths = [64, 256, 256] if self.widths is None else list(self.widths)
        super().__post_init__(**kwargs)


class ConvGroup(nn.Module):
    """Two 3x3 convolutions, the first followed by a 2x2 max pool; (N, C, H, W) to (N, out, H // 2, W // 2)."""

    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, out, 3, padding="same", bias=False)
        self.pool = nn.MaxPool2d(2)
        self.norm1 = nn.BatchNorm2d(out, momentum=0.4)
        self.conv2 = nn.Conv2d(out, out, 3, padding="same", bias=False)
        self.norm2 = nn.BatchNorm2d(out, momentum=0.4)
        self.activation = nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        x = self.activation(self.norm1(self.pool(self.conv1(x))))
        x = self.activation(self.norm2(self.conv2(x)))
        return x


class ConvNetForImageClassification(PreTrainedModel):
    """Fixed patch whitening, groups of convolutions, a max over what is left, and a linear head.

    The convolutions start as partial identities, which batch norm and pooling turn into a sensible first network. The
    norms have no weight that is trained, only a bias.

    Source: K. Jordan, 94% on CIFAR-10 in 3.29 seconds on a single GPU (arXiv 2404.00498). Differs: the whitening
    layer's bias is trained throughout, the max pool before the head covers any size, images are changed on the CPU.
    """

    config_class = ConvNetConfig
    main_input_name = "pixel_values"
    base_model_prefix = "groups"
    input_modalities = ("image",)

    def __init__(self, config: ConvNetConfig) -> None:
        super().__init__(config)
        assert config.widths is not None
        whitened = 2 * config.channels * WHITENING_SIZE**2
        self.whitening = nn.Conv2d(config.channels, whitened, WHITENING_SIZE)
        self.activation = nn.GELU()
        inputs = [whitened, *config.widths[:-1]]
        self.groups = nn.Sequential(*(ConvGroup(*sizes) for sizes in zip(inputs, config.widths, strict=True)))
        self.pool = nn.AdaptiveMaxPool2d(1)
        self.classifier = nn.Linear(config.widths[-1], config.num_labels, bias=False)
        self.post_init()
        self.whitening.weight.requires_grad = False
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.requires_grad = False

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_uniform_(module.weight, a=math.sqrt(5))
            if module.bias is not None:
                nn.init.zeros_(module.bias)
            else:
                nn.init.dirac_(module.weight[: module.in_channels])
        elif isinstance(module, nn.Linear):
            nn.init.kaiming_uniform_(module.weight, a=math.sqrt(5))
        elif isinstance(module, nn.BatchNorm2d):
            module.reset_parameters()

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> ImageClassifierOutput:
        """Classify images.

        Args:
            pixel_values: (N, channels, H, W), about mean 0 and variance 1.
            labels: (N,) classes; the loss is their mean cross entropy.

        Returns:
            ``logits`` (N, num_labels), and ``loss`` with labels.
        """
        x = self.activation(self.whitening(pixel_values))
        x = self.pool(self.groups(x)).flatten(1)
        logits = self.classifier(x) * LOGIT_SCALE
        loss = None if labels is None else nn.functional.cross_entropy(logits.float(), labels)
        return ImageClassifierOutput(loss=loss, logits=logits)

    def get_output_embeddings(self) -> None:
        return None

    @torch.no_grad()
    def set_whitening(self, images: np.ndarray) -> None:
        """Set the first layer to the principal directions of the images' patches, over their standard deviations.

        Args:
            images: (N, channels, H, W) float32, as they are trained on.
        """
        patches = torch.from_numpy(images).unfold(2, WHITENING_SIZE, 1).unfold(3, WHITENING_SIZE, 1)
        shape = (-1, images.shape[1], WHITENING_SIZE, WHITENING_SIZE)
        patches = patches.permute(0, 2, 3, 1, 4, 5).reshape(len(images) * patches.shape[2] * patches.shape[3], -1)
        covariance = (patches.double().T @ patches.double()) / len(patches)
        variances, directions = torch.linalg.eigh(covariance)
        # the sign of an eigenvector is the library's choice: make the largest entry positive
        largest = directions.abs().argmax(0)
        directions = directions * directions.gather(0, largest[None]).sign()
        filters = (directions / (variances + WHITENING_EPS).sqrt()).T.flip(0)
        self.whitening.weight.copy_(torch.cat([filters, -filters]).reshape(shape))
