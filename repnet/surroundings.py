"""What surrounds the layers of a model: compilation, hooks, quantization."""

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
    """Return the model without compilation, after a search for parts that cannot be folded.

    Args:
        model: not changed; if a part is compiled, a copy that shares its tensors is returned.

    Raises:
        NotFoldableError: a part is quantized, scripted or has no shape yet.
    """
    model = _uncompiled(model)
    for name, module in model.named_modules():
        where = f"'{name or type(module).__name__}'"
        kind = f"{type(module).__module__}.{type(module).__qualname__}"
        if "FloatFunctional" in kind:  # only adds, in torchvision's float models
            continue
        if ".quantized." in f".{kind}" or ".qat." in kind or "fake_quantize" in kind:
            raise NotFoldableError(f"{where} is quantized ({kind}); fold first, then quantize")
        if isinstance(module, ScriptModule):
            raise NotFoldableError(f"{where} is a ScriptModule; fold first, then script")
        for key, tensor in chain(module._parameters.items(), module._buffers.items()):
            if isinstance(tensor, UninitializedTensorMixin):
                raise NotFoldableError(f"{where} has no shape yet; run the model once")
            if tensor is not None and (tensor.is_quantized or type(tensor.data) is not Tensor):
                raise NotFoldableError(
                    f"'{key}' of {where} is a {type(tensor.data).__name__}, which is no plain "
                    "tensor; fold first, then quantize or distribute"
                )
    return model


def has_hooks(module: nn.Module) -> bool:
    """Return whether a module has its own hooks on the forward or backward pass."""
    kinds = ("forward_hooks", "forward_pre_hooks", "backward_hooks", "backward_pre_hooks")
    return any(getattr(module, f"_{kind}") for kind in kinds)


def _uncompiled(model: nn.Module) -> nn.Module:
    """Return the model with the original modules in place of their compiled wrappers."""
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
