"""The kinds of training, by the name that a preset gives."""

from causal_language_modeling import CausalLanguageModeling
from image_classification import ImageClassification
from masked_language_modeling import MaskedLanguageModeling
from task import Task

TASK_CLASSES: dict[str, type[Task]] = {
    "causal_lm": CausalLanguageModeling,
    "masked_lm": MaskedLanguageModeling,
    "image_classification": ImageClassification,
}
