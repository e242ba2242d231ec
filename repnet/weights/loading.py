"""`load_weights`: weights of any origin into a model, all of them or none."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from repnet.errors import InputError
from repnet.weights.architecture import WIDE_STEM, guess_name
from repnet.weights.identify import (
    Weights,
    form_of,
    keys_text,
    read_weights,
)
from repnet.weights.own import neutral_keys, own_keys
from repnet.weights.reading import Source, without_counters


@dataclass(frozen=True)
class LoadReport:
    """What `load_weights` did.

    Args:
        source: the file, or "the state dict".
        format: whose names the keys had.
        form: `train`, `deploy`, or `mixed` where only some blocks are folded.
        ema: whether the weights are an average over training.
        entry: where in the file they were, empty for the file itself.
        unused: another set of weights in the file that was not taken.
        tensors: how many were loaded.
        created: counters of batches that the file lacks, set to 0.
        left: keys of the model's classifier, where it was left as it is.
        adapted: keys of convolutions that were fitted to the model's number of input channels.
        casts: pairs of the file's and the model's dtype, where they differ.
    """

    source: str
    format: str
    form: str
    ema: bool
    entry: str
    unused: str | None
    tensors: int
    created: int
    left: tuple[str, ...]
    adapted: tuple[str, ...]
    casts: tuple[tuple[str, str], ...]

    def __str__(self) -> str:
        kind = "EMA weights" if self.ema else "weights"
        place = f" in '{self.entry}'" if self.entry else ""
        lines = [
            f"{self.tensors} tensors loaded and compared: {kind}{place} of {self.source}, "
            f"format {self.format}, {self.form} form"
        ]
        if self.unused is not None:
            other = f" in '{self.unused}'" if self.unused else ""
            kind = "trained weights" if self.ema else "EMA weights"
            lines.append(f"not used: the {kind}{other}; ema={not self.ema} takes them")
        if self.created:
            lines.append(f"{self.created} counters of batches (num_batches_tracked) set to 0")
        if self.left:
            lines.append(f"new, not taken from {self.source}: {', '.join(self.left)}")
        if self.adapted:
            lines.append(f"fitted to the image's channels: {', '.join(self.adapted)}")
        lines += [f"converted: {theirs} to {ours}" for theirs, ours in self.casts]
        return "\n".join(lines)


@dataclass(frozen=True)
class Misfit:
    """Keys of the model that the weights lack, keys that it lacks, and keys of other shapes."""

    missing: Sequence[str]
    unexpected: Sequence[str]
    shapes: Sequence[str]


def load_weights(
    model: nn.Module,
    source: Source,
    *,
    ema: bool | None = None,
    head: bool = True,
    adapt_input: bool = False,
    source_format: str | None = None,
    prefix: str | None = None,
) -> LoadReport:
    """Load weights of repnet or another library into `model`, strictly, and compare every tensor.

    Whose names the keys have, and whether they are of the train or the deploy form, is found from
    the keys. If anything does not fit, nothing is loaded.

    Args:
        model: changed in place.
        source: path of a torch file (tensors and plain data only) or a safetensors file, or the
            contents of one; wrappers such as `state_dict` and `module.` are removed.
        ema: True for the average over training, False for the weights that were trained, None for
            the average where the file has one. The report says which it was.
        head: False leaves the classifier, the model's last linear layer, as it is.
        adapt_input: fit the convolutions that read the image to the model's number of channels:
            further channels get the mean of the file's, fewer ones all get it, and the sum stays,
            so that an image whose channels are equal gives the same output.
        source_format: one of `repnet.weights.FORMATS`; None to detect it.
        prefix: take only the keys that begin with it, and remove it: `backbone.` of a detector.

    Raises:
        InputError: the file cannot be read, or its weights are not exactly those of `model`.

    Example:
        >>> load_weights(repnet.create_model("repvgg_a0"), "RepVGG-A0-train.pth")
    """
    target = model.state_dict()
    if any(value.is_meta for value in target.values()):
        raise InputError("the model has no memory (device 'meta'); model.to_empty(device='cpu')")
    weights = read_weights(
        source, ema=ema, source_format=source_format, prefix=prefix, like=target.keys()
    )
    names = {new: key for key, new in own_keys(weights.tensors, like=target).items()}
    state = {key: weights.tensors[neutral] for key, neutral in names.items()}
    classifier = _classifier(model)
    left = () if head else tuple(key for key in target if _is_in(key, classifier))
    if not head:
        state = {key: value for key, value in state.items() if not _is_in(key, classifier)}
        state |= {key: target[key] for key in left}
    adapted = _adapt_input(model, state) if adapt_input else {}
    state |= adapted
    for key in state.keys() - target.keys():
        if not without_counters([key]) and f"{key.rpartition('.')[0]}.running_mean" in target:
            del state[key]  # this model's norms do not count batches
    wrong = Misfit(
        missing=[key for key in target if key not in state],
        unexpected=[key for key in state if key not in target],
        shapes=[key for key in state if key in target and state[key].shape != target[key].shape],
    )
    if wrong.missing or wrong.unexpected or wrong.shapes:
        raise InputError(_explain(weights, names, target, wrong, classifier))
    complete = OrderedDict(state)
    # Versions of the modules: without them torch adds counters itself, also where there are none.
    vars(complete)["_metadata"] = getattr(target, "_metadata", None)
    model.load_state_dict(complete, strict=True)
    _compare(state, model.state_dict(), weights.name)
    casts = {
        (str(state[key].dtype), str(target[key].dtype))
        for key in state
        if state[key].dtype != target[key].dtype
    }
    return LoadReport(
        source=weights.name,
        format=weights.format,
        form=weights.form,
        ema=weights.chosen.ema,
        entry=weights.chosen.entry,
        unused=weights.chosen.unused,
        tensors=len(state) - len(left),
        created=sum(names[key] not in weights.origins for key in state.keys() & names.keys()),
        left=left,
        adapted=tuple(adapted),
        casts=tuple(sorted(casts)),
    )


def _classifier(model: nn.Module) -> str | None:
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    return linear[-1] if linear else None


def _is_in(key: str, module: str | None) -> bool:
    return key.startswith("head." if module is None else f"{module}.")


def _adapt_input(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the convolutions of the image whose weights in `state` have other input channels.

    They are those with as many input channels as the first one. A layer further inside whose
    weights differ in this way has other groups, and belongs to another network.
    """
    adapted = {}
    convs = {name: m for name, m in model.named_modules() if isinstance(m, nn.Conv2d)}
    channels = next((conv.in_channels for conv in convs.values()), None)
    for name, conv in convs.items():
        key = f"{name}.weight"
        if conv.in_channels == channels and conv.groups == 1 and key in state:
            old, wanted = state[key], conv.weight.shape
            if old.ndim == len(wanted) and old.shape[1] != wanted[1]:
                adapted[key] = fit_channels(old, wanted[1])
    return adapted


def fit_channels(weight: Tensor, channels: int) -> Tensor:
    """Return the kernel of a convolution for images of another number of channels.

    Args:
        weight: `(out, channels of the image, height, width)`.
        channels: of the other images.
    """
    old = weight.shape[1]
    mean = weight.mean(1, keepdim=True)
    kept = weight if channels > old else weight[:, :0]
    further = mean.expand(-1, channels - kept.shape[1], -1, -1)
    return torch.cat([kept, further], 1) * (old / channels)


def _compare(state: Mapping[str, Tensor], loaded: Mapping[str, Tensor], name: str) -> None:
    """Raise unless every tensor arrived, bit by bit."""
    for key, value in state.items():
        expected, found = value.to("cpu", loaded[key].dtype), loaded[key].detach().cpu()
        same = [tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (expected, found)]
        if not torch.equal(*same):
            raise RuntimeError(f"{name}: '{key}' did not arrive; the model overrides its loading")


def _explain(
    weights: Weights,
    names: Mapping[str, str],
    target: Mapping[str, Tensor],
    wrong: Misfit,
    classifier: str | None,
) -> str:
    """Return one message: what does not fit, why, and what to do."""
    model = {new: target[key] for key, new in neutral_keys(target).items()}
    forms = weights.form, form_of(model)
    start = f"{weights.name} does not fit this model"
    if forms == ("train", "deploy"):
        return (
            f"{start}: it is in train form (format {weights.format}; it has "
            f"{_listed(wrong.unexpected, names, weights)}), the model is folded. Load it into the "
            "train form, then fold: repnet.reparameterize(model, example_input)"
        )
    if forms == ("deploy", "train"):
        return (
            f"{start}: it is in deploy form (format {weights.format}; it has "
            f"{_listed(wrong.unexpected, names, weights)}), the model in train form, and a fold "
            "cannot be undone. Load it into repnet.reparameterize(model, example_input)"
        )
    keys = (*wrong.missing, *wrong.unexpected, *wrong.shapes)
    if all(_is_in(key, classifier) for key in keys):
        reason = f"the {'model' if wrong.unexpected else 'file'} has no classifier"
        if wrong.shapes:
            key = wrong.shapes[0]
            classes = len(weights.tensors[names[key]]), len(target[key])
            reason = f"its classifier has {classes[0]} outputs, the model's {classes[1]}"
            if classes[0] == classes[1]:
                reason = "their classifiers have inputs of different sizes"
        return (
            f"{start}: {reason} ({keys_text(keys)}); head=False loads all the rest, "
            "and leaves the model's classifier as it is"
        )
    reasons = []
    if wrong.missing:
        reasons.append(f"it lacks {keys_text(wrong.missing)}")
    if wrong.unexpected:
        reasons.append(f"the model lacks {_listed(wrong.unexpected, names, weights)}")
    if wrong.shapes:
        key = wrong.shapes[0]
        theirs, ours = tuple(weights.tensors[names[key]].shape), tuple(target[key].shape)
        others = f" and {len(wrong.shapes) - 1} more shapes" if len(wrong.shapes) > 1 else ""
        listed = _listed([key], names, weights)
        reasons.append(f"{listed} is {theirs}, the model's is {ours}{others}")
    text = f"{start}: {'; '.join(reasons)}"
    if weights.format == "super-gradients" and any(k.startswith("stem.") for k in wrong.shapes):
        return f"{text}. {WIDE_STEM}"
    found, own = guess_name(weights.tensors), guess_name(model)
    if found is not None and found != own:
        return f"{text}. These are weights of '{found}': repnet.create_model('{found}')"
    return f"{text}. They are of a network with other settings"


def _listed(keys: Sequence[str], names: Mapping[str, str], weights: Weights) -> str:
    """Return keys as the file names them."""
    return keys_text([weights.origins.get(names[key], key) for key in keys])
