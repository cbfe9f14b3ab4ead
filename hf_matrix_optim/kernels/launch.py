"""Launch Triton kernels with less work of the host: what a kernel was compiled for is looked up by one key.

Triton's own launch binds the arguments, describes each of them and turns all options into a string, in every call.
Small models and models in shards wait for it.
"""

from typing import Any

from torch import Tensor

#: Compiled kernels and the values of their constants in the order of the signature, by all that Triton compiles for.
_compiled: dict[tuple[Any, ...], tuple[Any, tuple[Any, ...]]] = {}


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Tensor | int | float, **constants: Any) -> None:
    """Launch a kernel on the current device and stream.

    Args:
        kernel: a ``triton.jit`` function whose constants are its last parameters.
        grid: programs along up to three axes.
        arguments: all that are no constants, a tensor on the current device first.
        constants: values of ``tl.constexpr`` parameters, and options such as ``num_warps``.
    """
    first = arguments[0]
    assert isinstance(first, Tensor)
    # Of an integer Triton looks at the value (1, multiples of 16, the range), of a tensor at dtype and alignment.
    forms = [
        (a.dtype, a.data_ptr() % 16) if isinstance(a, Tensor) else a if type(a) is int else float for a in arguments
    ]
    key = (id(kernel), first.device, *forms, *constants.items())
    known = _compiled.get(key)
    if known is None:
        found = kernel[grid](*arguments, **constants)
        if hasattr(found, "packed_metadata"):  # a compiled kernel, not the interpreter's None
            names = kernel.arg_names[len(arguments) :]
            _compiled[key] = found, tuple(constants[name] for name in names)
        return
    compiled, values = known
    compiled[(*grid, 1, 1)[:3]](*arguments, *values)
