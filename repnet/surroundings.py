"""What stands around the layers of a model: compilation, hooks, quantization."""

from __future__ import annotations

import sys
from itertools import chain
from typing import Any

from torch import Tensor, nn
from torch.jit import ScriptModule
from torch.nn.parameter import UninitializedTensorMixin  # type: ignore[attr-defined]

from repnet.kernel import NotFoldableError
from repnet.symbolic import twin


def prepared(model: nn.Module) -> nn.Module:
    """Return the model without compilation, after a look at what cannot be folded.

    Args:
        model: not changed; a copy that shares its tensors is returned if a part is compiled.

    Raises:
        NotFoldableError: a part is quantized, scripted or has no shape yet.
    """
    model = _uncompiled(model)
    for name, module in model.named_modules():
        where = f"'{name or type(module).__name__}'"
        kind = f"{type(module).__module__}.{type(module).__qualname__}"
        if "FloatFunctional" in kind:  # of torchvision's float models: adds, and nothing else
            continue
        if ".quantized." in f".{kind}" or ".qat." in kind or "fake_quantize" in kind:
            raise NotFoldableError(f"{where} is quantized ({kind}); fold first, then quantize")
        if isinstance(module, ScriptModule):
            raise NotFoldableError(f"{where} is a ScriptModule; fold first, then script")
        for key, tensor in chain(module._parameters.items(), module._buffers.items()):
            if isinstance(tensor, UninitializedTensorMixin):
                raise NotFoldableError(f"{where} has no shape yet; run the model once")
            if tensor is not None and _is_packed(tensor):
                raise NotFoldableError(
                    f"'{key}' of {where} is a {type(tensor.data).__name__}, which is no plain "
                    "tensor; fold first, then quantize or distribute"
                )
    return model


def has_hooks(module: nn.Module) -> bool:
    """Return whether a module has hooks of its own that a run or a gradient calls."""
    return any(
        (
            module._forward_hooks,
            module._forward_pre_hooks,
            module._backward_hooks,
            module._backward_pre_hooks,
        )
    )


def _is_packed(tensor: Tensor) -> bool:
    return tensor.is_quantized or type(tensor.data) is not Tensor


def _uncompiled(model: nn.Module) -> nn.Module:
    """Return the model with compiled modules in the place of their wrappers."""
    dynamo: Any = sys.modules.get("torch._dynamo.eval_frame")
    if dynamo is None:  # nothing was compiled in this process
        return model
    wrappers = [m for m in model.modules() if isinstance(m, dynamo.OptimizedModule)]
    if model in wrappers:
        return _uncompiled(model._orig_mod)  # type: ignore[arg-type]
    replaced: dict[int, Any] = {}
    for wrapper in reversed(wrappers):  # the innermost first
        replaced[id(wrapper)] = twin(wrapper._orig_mod, replaced=replaced)
    compiled = any(m._compiled_call_impl is not None for m in model.modules())
    return twin(model, replaced=replaced) if wrappers or compiled else model
