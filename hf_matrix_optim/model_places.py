"""Where each parameter sits in a model: its owner, the way to it, and which parts are embeddings or heads."""

import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass

from torch import Tensor, nn

from hf_matrix_optim.fused_layouts import transformers_class_names

# Direct children that are heads where a model does not say what its base model is. In a submodel "head" may as well be
# the attention pooling of a vision tower, so there only unmistakable names count.
_HEAD_NAME = re.compile(r"(lm|codec)_heads?|score|classifier|qa_outputs")
_OUTERMOST_HEAD_NAME = re.compile(r"(.*_)?heads?|score|classifier|qa_outputs|fc")


@dataclass(frozen=True)
class ParameterPlace:
    """One place of a parameter; a tied parameter has several.

    Attributes:
        parameter: the parameter.
        leaf: its name in its owner.
        path: names of the modules from below the root down to the owner.
        lineage: the modules from the root down to the owner, one more than ``path``.
    """

    parameter: nn.Parameter
    leaf: str
    path: tuple[str, ...]
    lineage: tuple[nn.Module, ...]

    @property
    def name(self) -> str:
        """Its name in ``named_parameters(remove_duplicate=False)``."""
        return ".".join((*self.path, self.leaf))

    @property
    def owner(self) -> nn.Module:
        """The module that holds the parameter."""
        return self.lineage[-1]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the parameter."""
        return tuple(self.parameter.shape)

    def holder(self) -> tuple[nn.Module, str]:
        """Return the module of the model that holds the owner, and the attribute, seen through PEFT's wrappers."""
        depth = len(self.path)
        while depth > 1 and (isinstance(self.lineage[depth - 1], nn.ModuleDict) or _of_peft(self.lineage[depth - 1])):
            depth -= 1
        return (self.lineage[depth - 1], self.path[depth - 1]) if depth else (self.owner, "")

    def adapter(self) -> tuple[nn.Module, str] | None:
        """Return PEFT's layer and the part of it this is ("lora_A", ...); None for a weight of the model itself."""
        for module, part in zip(self.lineage, (*self.path, self.leaf), strict=True):
            if _of_peft(module) and "base_layer" in module._modules and part != "base_layer":
                return module, part
        return None


def _of_peft(module: nn.Module) -> bool:
    return type(module).__module__.startswith("peft.")


def places_of(model: nn.Module) -> Iterator[ParameterPlace]:
    """Yield every place of every parameter of a model."""
    stack: list[tuple[tuple[str, ...], tuple[nn.Module, ...]]] = [((), (model,))]
    while stack:
        path, lineage = stack.pop()
        for leaf, parameter in lineage[-1]._parameters.items():
            if parameter is not None:
                yield ParameterPlace(parameter, leaf, path, lineage)
        for name, child in lineage[-1]._modules.items():
            if child is not None:
                stack.append(((*path, name), (*lineage, child)))


@dataclass(frozen=True)
class Landmarks:
    """Ids of the parameters that their place in the model makes embeddings or heads, tied ones too."""

    input_embeddings: set[int]
    output_embeddings: set[int]
    heads: set[int]

    @classmethod
    def of(cls, model: nn.Module) -> "Landmarks":
        """Ask every transformers model inside ``model`` for its embeddings and its base model."""
        marks = cls(set(), set(), set())
        inner: set[nn.Module] = set()
        for module in model.modules():
            if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
                marks.input_embeddings.update(_ids(module))
            is_submodel = "PreTrainedModel" in transformers_class_names(module)
            head_name = _OUTERMOST_HEAD_NAME if module not in inner else _HEAD_NAME
            if is_submodel:
                inner.update(module.modules())
                # Models of speech and vision may have neither, and say so with these errors.
                with suppress(NotImplementedError, AttributeError):
                    marks.input_embeddings.update(_ids(module.get_input_embeddings()))  # type: ignore[operator]
                with suppress(NotImplementedError, AttributeError):
                    marks.output_embeddings.update(_ids(module.get_output_embeddings()))  # type: ignore[operator]
                base = module.base_model
                if isinstance(base, nn.Module) and base is not module:
                    marks.heads.update(_ids(module) - _ids(base))
                    continue
            if is_submodel or module is model:
                for name, child in module.named_children():
                    if head_name.fullmatch(name):
                        marks.heads.update(_ids(child))
        return marks


def _ids(found: object) -> set[int]:
    """Ids of the parameters in whatever ``get_input_embeddings`` and its like return."""
    if isinstance(found, nn.Module):
        return {id(parameter) for parameter in found.parameters()}
    if isinstance(found, (list, tuple)):
        return set().union(*map(_ids, found))
    return {id(found)} if isinstance(found, Tensor) else set()
