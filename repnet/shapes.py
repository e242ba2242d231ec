"""`observe`: what every module of a model receives and returns when the model runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from repnet.convolution import Layer
from repnet.equivalence import Inputs
from repnet.precision import InFloat64
from repnet.symbolic import twin


@dataclass
class Calls:
    """The calls of one module in one run.

    Args:
        inputs: of the first call, as tensors without values.
        output: of the first call, likewise.
        count: of the calls.
        multiplications: of a convolution or linear layer, for the whole batch of one call.
    """

    inputs: Inputs
    output: Any
    count: int = 1
    multiplications: int = 0

    @property
    def shapes(self) -> tuple[torch.Size, torch.Size] | None:
        """The shapes of input and output where both are one tensor."""
        if len(self.inputs.args) == 1 and not self.inputs.kwargs:
            (x,), y = self.inputs.args, self.output
            if isinstance(x, Tensor) and isinstance(y, Tensor) and min(x.ndim, y.ndim) > 1:
                return x.shape, y.shape
        return None


def observe(model: nn.Module, inputs: Inputs) -> dict[str, Calls]:
    """Return the calls of each module by its name; modules that do not run are left out.

    The model is run without values where that is possible, and else in float64.

    Args:
        model: not changed.
        inputs: of `forward`.

    Raises:
        ValueError: the model cannot run on these inputs.
    """
    try:
        shapes = Inputs(*tree_map(without_values, (inputs.args, inputs.kwargs)))
        with torch.device("meta"), _ShapesOnly():
            return _observe(twin(model, device="meta").double(), shapes)
    except Exception:  # forward reads values, or a function is not implemented without them
        pass
    try:
        with InFloat64():
            return _observe(twin(model), inputs)
    except Exception as error:  # forward is anyone's code
        raise ValueError(f"the model cannot run on example_input: {error}") from error


class _ShapesOnly(TorchFunctionMode):
    """Lets batch norm return its input, which without values is the same, and takes no time."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func is functional.batch_norm:
            return args[0].clone()
        return func(*args, **(kwargs or {}))


def without_values(value: Any) -> Any:
    """Return a tensor of the same shape and dtype on the meta device; anything else unchanged."""
    return value.detach().to("meta") if isinstance(value, Tensor) else value


def _observe(model: nn.Module, inputs: Inputs) -> dict[str, Calls]:
    calls: dict[str, Calls] = {}
    names = {module: name for name, module in model.named_modules()}

    def observe_call(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        name = names[module]
        if name in calls:
            calls[name].count += 1
            return
        args, kwargs, output = tree_map(without_values, (args, kwargs, output))
        call = calls[name] = Calls(Inputs(args, kwargs), output)
        if isinstance(module, Layer) and call.shapes is not None:
            before, after = call.shapes
            upsampling = isinstance(
                module, nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d
            )
            shape = before if upsampling else after
            positions = shape.numel() // shape[-1 if isinstance(module, nn.Linear) else 1]
            call.multiplications = positions * module.weight.numel()

    model.eval()
    for module in names:
        module.register_forward_hook(observe_call, with_kwargs=True)
    with torch.no_grad():
        inputs(model)
    return calls
