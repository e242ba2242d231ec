"""`evaluate`: any network on the test split of any data set, with pictures."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

from torch import nn

from repnet.callbacks import Pictures
from repnet.complexity import count_parameters
from repnet.training.assembly import build_trainer
from repnet.training.classifier import Classifier
from repnet.training.loggers import build_loggers, close_loggers


def evaluate(
    model: nn.Module, data: Any, config: dict[str, Any], directory: str | Path
) -> dict[str, Any]:
    """Return metrics, recall of each class and speed; write pictures and tables to `directory`.

    Args:
        model: of either form.
        data: an `ImageDataModule` whose `num_classes` are the model's.
        config: its `trainer`, `logger` and `channels_last` are used.
        directory: made if it is not there.

    Raises:
        InputError: the trainer cannot be set up.
    """
    trainer_options = dict(config["trainer"])
    trainer_options.pop("sync_batchnorm", None)  # nothing is trained
    loggers = build_loggers(config.get("logger"))
    trainer = build_trainer(
        trainer_options,
        callbacks=[Pictures(directory)],
        logger=loggers,
        default_root_dir=directory,
        enable_checkpointing=False,
        enable_progress_bar=sys.stdout.isatty(),
    )
    classifier = Classifier(
        model.eval(), data.num_classes, channels_last=config.get("channels_last", False)
    )
    started = time.perf_counter()
    try:
        tested = trainer.test(classifier, data, verbose=False)[0]
    finally:
        close_loggers(loggers)
    seconds = time.perf_counter() - started
    samples = len(data.splits[2])
    return {
        "test": {key.removeprefix("test/"): round(value, 6) for key, value in tested.items()},
        "recall": dict(zip(data.class_names, classifier.recall_of_classes, strict=False)),
        "samples": samples,
        "classes": data.num_classes,
        "parameters": count_parameters(model),
        "images_per_second": samples / seconds,
        "device": str(trainer.strategy.root_device),
        "precision": str(trainer.precision),
    }
