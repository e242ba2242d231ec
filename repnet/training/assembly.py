"""What a config describes, as objects: the network with what trains it."""

from __future__ import annotations

import inspect
from collections.abc import Collection
from typing import Any

import torch
from pytorch_lightning import Trainer
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from torch import nn

from repnet.errors import InputError, first_line
from repnet.processes import is_main_process
from repnet.spec import build
from repnet.symbolic import evaluating, twin
from repnet.training.activation_checkpointing import checkpoint_activations
from repnet.training.classifier import Classifier
from repnet.training.learning_rate import describe_scaling, scaled_learning_rate
from repnet.training.objectives import based


def build_trainer(options: dict[str, Any], **own: Any) -> Trainer:
    """Return the trainer that a config describes.

    Args:
        options: of the config.
        **own: the arguments that are not the config's.

    Raises:
        InputError: the trainer does not take an option, or not on this machine.
    """
    # The data sets share themselves out, and `train` prints a summary of its own.
    own |= {"use_distributed_sampler": False, "enable_model_summary": False}
    try:
        trainer: Trainer = build({**options, "_partial_": True})(**own)
    except (MisconfigurationException, ValueError, TypeError, RuntimeError) as error:
        missing = options.get("accelerator") in ("gpu", "cuda") and not torch.cuda.is_available()
        # Lightning reports a device that it lacks so, and wrong values as ValueError.
        lacks_gpu = missing and isinstance(error, MisconfigurationException)
        advice = ". Without a GPU, use trainer=cpu" if lacks_gpu else ""
        raise InputError(
            f"the trainer cannot be set up: {str(error).rstrip('!.')}{advice}"
        ) from error
    return trainer


def build_model(config: dict[str, Any], data: Any) -> tuple[dict[str, Any], nn.Module]:
    """Return the config with the whole description of the model, and the model.

    Args:
        config: of `train`.
        data: an `ImageDataModule` after `setup`.

    Raises:
        InputError: the model does not fit the data.
    """
    config = {**config, "model": complete_model(config, data)}
    model = build(config["model"])
    _check_fit(model, data)
    if parts := config.get("checkpoint_activations"):
        checkpoint_activations(model, parts)
    return config, model


def complete_model(config: dict[str, Any], data: Any) -> dict[str, Any]:
    """Return the model's description with what the data and the block group decide.

    `num_classes`, `in_channels` and `block` are added where the model's target takes them by name
    and the config is silent, or where the config says null.

    Args:
        config: with the entries `model` and `block`.
        data: an `ImageDataModule` after `setup`.

    Raises:
        InputError: a block was chosen for a model that takes none.
    """
    spec = dict(config["model"])
    known = {"num_classes": data.num_classes, "in_channels": data.input_shape[0]}
    if config.get("block"):
        if "block" not in _parameters_of(spec):
            raise InputError(f"{spec['_target_']} takes no block; remove the block=... override")
        known["block"] = config["block"]
        spec.pop("block", None)
    return completed(spec, known)


def completed(spec: dict[str, Any], known: dict[str, Any]) -> dict[str, Any]:
    """Return `spec` with those of the known arguments that its target takes and that it lacks."""
    accepted = _parameters_of(spec)
    missing = {k: v for k, v in known.items() if k in accepted or k in spec}
    return {**spec, **{k: v for k, v in missing.items() if spec.get(k) is None}}


def _parameters_of(spec: dict[str, Any]) -> Collection[str]:
    target = build({"_target_": spec["_target_"], "_partial_": True}).func
    return inspect.signature(target).parameters


def build_classifier(config: dict[str, Any], model: nn.Module, data: Any, batch: int) -> Classifier:
    """Return the LightningModule that a config describes.

    Args:
        config: of `train`.
        model: to train.
        data: an `ImageDataModule` after `setup`.
        batch: images of an optimizer step, for the learning rate.
    """
    known = {"num_classes": data.num_classes, "input_shape": list(data.input_shape)}

    def made(key: str, *, partial: bool = False) -> Any:
        spec = config.get(key)
        if not spec:
            return None
        if spec.get("class_weights") is None:  # which a loss of one's own need not take
            spec = {k: v for k, v in spec.items() if k != "class_weights"}
        counts = {"class_counts": data.class_counts()} if "class_weights" in spec else {}
        spec = completed(spec, known | counts)
        return build({**spec, "_partial_": True} if partial else spec)

    objective = made("objective", partial=True)
    if objective is not None:
        objective = based(objective, made("loss"), model=model, **known)
    optimizer = build({**config["optimizer"], **_learning_rate(config, batch), "_partial_": True})
    try:
        optimizer([nn.Parameter(torch.zeros(1))])
    except (ValueError, TypeError, RuntimeError) as error:
        raise InputError(f"optimizer: {first_line(error)}") from error
    groups = {"parameter_groups": made("parameter_groups", partial=True)}
    return Classifier(
        model,
        data.num_classes,
        optimizer=optimizer,
        scheduler=made("scheduler", partial=True),
        loss=made("loss"),
        objective=objective,
        mix=made("mix"),
        channels_last=config["channels_last"],
        freeze=config.get("freeze") or (),
        **{key: value for key, value in groups.items() if value is not None},
    )


def images_per_step(trainer: Trainer, data: Any) -> int:
    """Return the images of one optimizer step, on all devices."""
    return int(data.batch_size * trainer.world_size * trainer.accumulate_grad_batches)


def _learning_rate(config: dict[str, Any], batch: int) -> dict[str, float]:
    """Return the learning rate for this batch, if it is to be scaled, and say so."""
    rule = config.get("lr_scaling")
    if not rule:
        return {}
    base = config["optimizer"]["lr"]
    if is_main_process():
        print(describe_scaling(base, batch=batch, **rule), flush=True)
    return {"lr": scaled_learning_rate(base, batch=batch, **rule)}


def _check_fit(model: nn.Module, data: Any) -> None:
    """Raise unless the model returns logits of the data's classes for an image of its size."""
    shape = tuple(data.input_shape)
    size = "x".join(str(side) for side in shape)
    name = type(model).__name__
    try:
        with torch.no_grad(), evaluating(model):
            logits = twin(model, device="meta")(torch.zeros(1, *shape, device="meta"))
    except Exception:  # a network of one's own may need values
        try:
            with torch.no_grad(), evaluating(model):
                logits = model(torch.zeros(1, *shape))
        except Exception as error:
            raise InputError(
                f"{name} does not run on an image of {size}: {error}. Choose another image size "
                "or other strides of the model"
            ) from error
    if isinstance(logits, torch.Tensor) and logits.shape[1:] != (data.num_classes,):
        raise InputError(
            f"{name} returns {'x'.join(map(str, logits.shape[1:]))} values for an image, the data "
            f"has {data.num_classes} classes; leave out model.num_classes, which the data decides"
        )
