"""The config of a training: the meaning and the range of its keys, and what it may name.

`Training` covers what every run has. A part with a `_target_` is open: it takes the arguments of
what it names, which are checked against the signature there, so that a block, model, data set or
callback is added without a line here.
"""

from __future__ import annotations

import difflib
import functools
import inspect
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal, Self, get_type_hints

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PydanticUserError,
    TypeAdapter,
    ValidationError,
    field_validator,
    model_validator,
)

from repnet.errors import InputError
from repnet.spec import (
    DATA_PACKAGES,
    MODEL_PACKAGES,
    Target,
    described_in,
    home_of,
    is_plain,
    resolve_targets,
    unknown_name,
    within,
)

_TRANSFORMS = ("torchvision.transforms.autoaugment", "torchvision.transforms.v2")
# What the config of a run directory may name when a run is resumed from it.
_FILE_PACKAGES = (
    *MODEL_PACKAGES,
    *DATA_PACKAGES,
    "repnet.training.auxiliary_heads",
    "repnet.training.losses",
    "repnet.training.mix",
    "repnet.training.objectives",
    "repnet.training.parameter_groups",
    "repnet.training.schedules",
    "repnet.training.teacher",
    "torch.optim",
    "torch.nn.modules.loss",
)
# In these parts only: elsewhere a logger could send any file to any server. Lightning's callbacks
# and strategies are listed but for those that write or delete files where a config or a checkpoint
# says (ModelCheckpoint, OnExceptionCheckpoint, prediction writers, DeepSpeed).
_PART_PACKAGES = {
    "model": MODEL_PACKAGES,
    "block": MODEL_PACKAGES,
    "data": (*DATA_PACKAGES, *_TRANSFORMS),
    "trainer": (
        "pytorch_lightning.trainer",
        "pytorch_lightning.strategies.ddp",
        "pytorch_lightning.strategies.fsdp",
        "pytorch_lightning.strategies.model_parallel",
        "pytorch_lightning.strategies.single_device",
    ),
    # No other logger: it could write anywhere, or send files to a service.
    "logger": (
        "pytorch_lightning.loggers.csv_logs",
        "pytorch_lightning.loggers.mlflow",
        "pytorch_lightning.loggers.wandb",
        "pytorch_lightning.loggers.tensorboard",
        "repnet.training.loggers",
    ),
    "callbacks": (
        *_FILE_PACKAGES,
        "repnet.callbacks.ema",
        "repnet.callbacks.frozen_norms",
        "repnet.callbacks.kernel_decay",
        "repnet.callbacks.norm_health",
        "repnet.callbacks.pictures",
        "repnet.callbacks.progressive",
        "repnet.callbacks.prune",
        "repnet.callbacks.quantization_aware",
        "repnet.callbacks.recalibration",
        "repnet.callbacks.weight_decay",
        "pytorch_lightning.callbacks.device_stats_monitor",
        "pytorch_lightning.callbacks.early_stopping",
        "pytorch_lightning.callbacks.gradient_accumulation_scheduler",
        "pytorch_lightning.callbacks.lr_monitor",
        "pytorch_lightning.callbacks.model_summary",
        "pytorch_lightning.callbacks.progress",
        "pytorch_lightning.callbacks.pruning",
        "pytorch_lightning.callbacks.rich_model_summary",
        "pytorch_lightning.callbacks.spike",
        "pytorch_lightning.callbacks.stochastic_weight_avg",
        "pytorch_lightning.callbacks.throughput_monitor",
        "pytorch_lightning.callbacks.timer",
        "pytorch_lightning.callbacks.weight_averaging",
    ),
}

Count = Annotated[int, Field(ge=1)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Share = Annotated[int | float, Field(ge=0)]


LEFT_OUT: Any = None  # in the config: then the object that it describes has its own default


class _Closed(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class Described(BaseModel):
    """An object: the class or function of a dotted name, and its arguments."""

    model_config = ConfigDict(extra="allow", strict=True)

    target: str = Field(alias="_target_", description="dotted name of a class or function")


class Data(Described):
    """The images: any LightningDataModule of repnet.data, or one of your own."""

    root: str = Field(LEFT_OUT, description="directory of the data set")
    image_size: Count = Field(LEFT_OUT, description="pixels, height and width")
    batch_size: Count = Field(LEFT_OUT, description="images of one step on one device")
    num_workers: int = Field(
        LEFT_OUT, ge=0, description="processes that load; 0: the training's own"
    )
    augment: list[Any] | None = Field(None, description="transforms of the training images")
    on_device: bool = Field(LEFT_OUT, description="keep the images in the memory of the GPU")


class Optimizer(Described):
    """The optimizer, any of torch.optim or your own."""

    lr: Positive = Field(LEFT_OUT, description="learning rate at its peak")
    momentum: float = Field(LEFT_OUT, ge=0, lt=1)
    weight_decay: NotNegative = Field(LEFT_OUT, description="of what parameter_groups lets decay")


class Scheduler(Described):
    """How the learning rate changes over the training, step by step."""

    warmup_epochs: NotNegative | None = Field(
        None, description="epochs of a linear rise, trainer.max_epochs at most"
    )


class Callback(Described):
    """A callback of Lightning, of repnet or of your own."""

    monitor: str | None = Field(None, description="metric that the callback watches")


class Trainer(Described):
    """Lightning's Trainer, which takes more arguments than these."""

    max_epochs: Count | Literal[-1] | None = Field(
        None, description="passes over the training images; -1: until trainer.max_steps"
    )
    max_steps: Count | Literal[-1] = Field(LEFT_OUT, description="optimizer steps; -1: no limit")
    accelerator: str = Field(LEFT_OUT, description="auto, cpu, gpu, mps, ...")
    devices: Count | Literal[-1] | str | list[int] = Field(
        LEFT_OUT, description="number of GPUs or processes, a list of GPUs, or auto"
    )
    num_nodes: Count = Field(LEFT_OUT, description="machines")
    precision: int | str | None = Field(None, description="32-true, bf16-mixed, 16-mixed, ...")
    gradient_clip_val: NotNegative | None = Field(
        None, description="largest norm (or value) of gradients; null: not clipped"
    )
    gradient_clip_algorithm: Literal["norm", "value"] | None = None
    accumulate_grad_batches: Count = Field(LEFT_OUT, description="batches of one optimizer step")
    log_every_n_steps: int = Field(LEFT_OUT, ge=0)
    check_val_every_n_epoch: Count | None = Field(None, description="epochs between validations")
    val_check_interval: Share | None = Field(
        None, description="batches between validations, or a share of the epoch"
    )
    num_sanity_val_steps: int = Field(
        LEFT_OUT, ge=-1, description="validation batches before training"
    )
    limit_train_batches: Share | None = Field(None, description="batches, or a share of them")
    limit_val_batches: Share | None = None
    limit_test_batches: Share | None = None
    overfit_batches: Share = Field(LEFT_OUT, description="train on these few batches only")
    detect_anomaly: bool = Field(LEFT_OUT, description="name the operation that makes NaN; slow")
    profiler: Literal["simple", "advanced", "pytorch"] | Described | None = Field(
        None, description="seconds by hook, by function or by operation: writes RUN/profile"
    )


class LearningRateScaling(_Closed):
    """`optimizer.lr` is that of `base_batch` images per step, and scaled to those of the run."""

    rule: Literal["linear", "sqrt"] = Field("linear", description="linear for SGD, sqrt for Adam")
    base_batch: Count = Field(description="images per step that optimizer.lr is known to suit")


class Checkpoint(_Closed):
    """When checkpoints are saved, and which is the best."""

    every_n_steps: Count | None = Field(
        None, description="optimizer steps between saves of last.ckpt, beside every epoch's"
    )
    every_minutes: Positive | None = Field(None, description="the same, by time")
    monitor: str = Field("val/top1", description="best.ckpt has the best value of this metric")
    mode: Literal["max", "min"] = Field("max", description="whether a high or a low value is best")


class Training(_Closed):
    """The config of a training."""

    model: Described = Field(description="the network")
    block: Described | None = Field(None, description="its blocks; null: the model's own")
    data: Data = Field(description="the data set")
    mix: Described | None = Field(None, description="mixing of images: mixup, CutMix")
    loss: Described | None = Field(None, description="loss of logits and labels")
    objective: Described | None = Field(None, description="what is minimized: the loss, and more")
    optimizer: Optimizer = Field(description="the optimizer")
    parameter_groups: Described | None = Field(None, description="which parameters decay")
    scheduler: Scheduler | None = Field(None, description="the learning rate over time")
    callbacks: dict[str, Callback | None] = Field({}, description="callbacks by name")
    trainer: Trainer = Field(description="Lightning's Trainer")
    logger: dict[str, Described | None] | None = Field(
        None, description="TensorBoard, W&B, MLflow, CSV: one, or several by name"
    )
    seed: int = Field(0, ge=0, lt=2**32, description="start of all random numbers")
    channels_last: bool = Field(
        False, description="faster on GPUs and in bfloat16; measure it for each model"
    )
    freeze: list[str] = Field(
        [], description="globs for parts that are not trained: [stem, stages]"
    )
    pretrained: str | None = Field(
        None, description="a run, a checkpoint or a file of weights to start from"
    )
    pretrained_head: bool = Field(False, description="start with the classifier of that file, too")
    lr_find: bool = Field(False, description="look for a learning rate instead of training")
    lr_scaling: LearningRateScaling | None = Field(
        None, description="scale the learning rate with the batch"
    )
    checkpoint_activations: list[str] | str | None = Field(
        None, description="parts that keep only their inputs, to save memory: [stages.*]"
    )
    pictures: bool = Field(False, description="confusion matrix, accuracy by class, worst images")
    on_nan: Literal["stop", "skip"] = Field(
        "stop", description="at a NaN, end the run or leave out the step, at most 20 in a row"
    )
    checkpoint: Checkpoint = Field(
        Checkpoint.model_validate({}), description="saving of checkpoints"
    )
    resume: str | None = Field(None, description="directory of a run to continue")
    eval: str | None = Field(
        None, description="checkpoint, run or deploy directory to test instead of training"
    )
    trust: list[str] = Field([], description="packages that the config of a run may name")

    @field_validator("logger", mode="before")
    @classmethod
    def _by_name(cls, logger: Any) -> Any:
        return {"logger": logger} if isinstance(logger, dict) and "_target_" in logger else logger

    @model_validator(mode="after")
    def _fit_together(self) -> Self:
        warmup, epochs = self.scheduler and self.scheduler.warmup_epochs, self.trainer.max_epochs
        trial = type(self.trainer.limit_train_batches) is int  # a few batches of each epoch
        if warmup and epochs and 0 < epochs < warmup and not trial:
            raise ValueError(
                f"scheduler.warmup_epochs={warmup:g} is longer than the training of "
                f"trainer.max_epochs={epochs}; lower it, or train for longer"
            )
        if self.lr_scaling and self.optimizer.lr is None:
            raise ValueError("lr_scaling needs optimizer.lr, which is that of its base_batch")
        return self


def validated(
    config: dict[str, Any], *, trust: Sequence[str] | None = None, parts: Sequence[str] = ()
) -> dict[str, Any]:
    """Return the config with the defaults of what it leaves out.

    Args:
        config: as plain data, resolved.
        trust: packages, for a config that came out of a file, which may name only these and what
            `allowed_in` lists; None for the user's own, which may name anything.
        parts: the keys that matter; all where it is empty. The others must only exist.

    Raises:
        InputError: says all that is wrong: unknown keys, values out of range, targets that are not
            there, are not allowed or do not take their arguments.
    """
    matters = lambda key: not parts or key in parts or key not in Training.model_fields
    chosen = {key: value for key, value in config.items() if matters(key)}
    problems = _problems(chosen, parts)
    if not problems:
        # All names are looked at before the first is imported, which runs code.
        allowed = None if trust is None else functools.partial(allowed_in, trust=trust)
        for target in resolve_targets(chosen, allowed):
            problems += _misfits(target)
    if problems:
        raise InputError("; ".join(problems))
    defaults = {
        name: field.default for name, field in Training.model_fields.items()
        if not field.is_required() and name not in ("resume", "eval", "trust")
    }  # fmt: skip
    checkpoint = Checkpoint.model_validate(config.get("checkpoint", {})).model_dump()
    return {**defaults, **config, "checkpoint": checkpoint}


def allowed_in(part: str, trust: Sequence[str] = ()) -> tuple[str, ...]:
    """Return the packages that a top-level key of a config from a file may name."""
    return (*_PART_PACKAGES.get(part, _FILE_PACKAGES), *trust)


def packages_to_trust(config: Mapping[str, Any]) -> list[str]:
    """Return what `trust` must hold for this config, which is the user's own, to be read again."""
    packages = set()
    for target in resolve_targets(config):
        allowed = allowed_in(target.path.partition(".")[0])
        home = home_of(target.call)
        if not within(home, allowed):
            packages.add(home.partition(".")[0])
        package = target.name.partition(".")[0]
        if not within(package, [name.partition(".")[0] for name in allowed]):
            packages.add(package)
    return sorted(packages)


def unknown_key(key: str, config: Mapping[str, Any]) -> str:
    """Return the message for a key that `config` lacks, with the nearest one that it has."""
    last = key.rpartition(".")[2]

    def likeness(name: str) -> tuple[float, float]:
        whole = difflib.SequenceMatcher(None, key, name).ratio()
        return max(
            whole, difflib.SequenceMatcher(None, last, name.rpartition(".")[2]).ratio()
        ), whole

    names = [n for n in _dotted(config) if n != key and not n.startswith(f"{key}.")]
    nearest = max(names, key=likeness)
    if likeness(nearest)[0] >= 0.7:
        return f"unknown key '{key}'; did you mean '{nearest}'?"
    return f"unknown key '{key}'; the keys are {', '.join(sorted(map(str, config)))}"


def _dotted(config: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in config.items():
        if not str(key).startswith("_"):
            yield f"{prefix}{key}"
            if isinstance(value, Mapping):
                yield from _dotted(value, f"{prefix}{key}.")


def _problems(config: Mapping[str, Any], parts: Sequence[str]) -> list[str]:
    """Return what the schema refuses."""
    try:
        Training.model_validate(config)
    except ValidationError as errors:
        told: dict[str, str] = {}
        for error in errors.errors():
            path, value = _place(config, error)
            if error["type"] != "missing" or not parts or path in parts:
                told.setdefault(path, _sentence(path, value, error, config))
        return list(told.values())
    return []


def _place(config: Any, error: Mapping[str, Any]) -> tuple[str, Any]:
    """Return the dotted key that an error is about and its value, without members of unions."""
    keys: list[str] = []
    for key in error["loc"]:
        inside = key in config if isinstance(config, Mapping) else isinstance(config, list)
        if inside and (isinstance(config, Mapping) or isinstance(key, int)):
            config = config[key]
        elif not isinstance(config, Mapping) or error["type"] != "missing":
            continue
        keys.append(str(key))
    return ".".join(keys), config


_WORDS = {
    "Input should be": "must be",
    "a valid boolean": "true or false",
    "a valid integer": "an integer",
    "a valid number": "a number",
    "a valid string": "text",
    "a valid list": "a list",
    "a valid dictionary": "a group of keys",
    "greater than or equal to 0": "0 or more",
    "greater than or equal to 1": "1 or more",
}


def _sentence(path: str, value: Any, error: Mapping[str, Any], config: Mapping[str, Any]) -> str:
    """Return what is wrong, in plain words."""
    kind, text = error["type"], error["msg"]
    if kind == "value_error":
        return str(error["ctx"]["error"])
    if kind == "missing":
        return f"{path} is required"
    if kind == "extra_forbidden":
        known = {**dict.fromkeys(Training.model_fields), **config}
        return unknown_key(path, {key: known[key] for key in known if key in Training.model_fields})
    if kind == "model_type":
        part = {cls.__name__: cls for cls in (LearningRateScaling, Checkpoint)}
        keys = part.get(error["ctx"]["class_name"], Described).model_fields.items()
        text = f"must be a group of keys ({', '.join(str(f.alias or n) for n, f in keys)})"
    for word, plain in _WORDS.items():
        text = text.replace(word, plain)
    key = path.partition(".")[0]
    return f"{path}={_shown(value)} {text}; --explain {key} says what it takes"


def _misfits(target: Target) -> list[str]:
    """Return what a target does not take, by the names and the types in its signature."""
    try:
        parameters = inspect.signature(target.call).parameters.values()
    except (TypeError, ValueError):  # a builtin without a signature
        return []
    name = target.name.rpartition(".")[2]
    taken = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters)
    hints = _hints(target.call)
    problems = []
    for key, value in target.arguments.items():
        if key not in taken:
            if not open_ended and value is not None:  # null is what the default's YAML left behind
                known = unknown_name(f"argument of {name}", key, taken)
                problems.append(f"{target.path}.{key}: {known}")
        elif key in hints and not _fits(hints[key], value):
            kind = re.sub(r"\b(\w+\.)+", "", inspect.formatannotation(hints[key]))
            problems.append(f"{target.path}.{key}={_shown(value)} must be {kind}")
    return problems


def _hints(call: Callable[..., Any]) -> dict[str, Any]:
    """Return the types of arguments that can be relied upon.

    Other libraries take more than they say: `torchvision.transforms.v2.RandomErasing` declares
    `value: float` and takes a list.
    """
    if not within(home_of(call), ("repnet", "torch.optim")):
        return {}
    try:
        return get_type_hints(call.__init__ if inspect.isclass(call) else call)
    except (NameError, TypeError):
        return {}


def _fits(annotation: Any, value: Any) -> bool:
    """Return whether a value is of a type, where a list may stand for a tuple.

    None means the default, or what the data decide; objects are not described here.
    """
    if value is None or not is_plain(value) or any(described_in(value)):
        return True
    try:
        adapter = TypeAdapter(annotation, config=ConfigDict(arbitrary_types_allowed=True))
    except PydanticUserError:  # no type that can be checked
        return True
    for validate, data in (
        (adapter.validate_python, value),
        (adapter.validate_json, json.dumps(value)),
    ):
        try:
            validate(data, strict=True)
        except ValidationError:
            continue
        return True
    return False


def _shown(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
