"""The schema of a training's config: what it takes, what it refuses, and how it is explained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from repnet.cli.command import quoted
from repnet.config import Training, unknown_key, validated
from repnet.errors import InputError
from repnet.spec import CONFIGS, choices
from repnet.training.run import train
from tests.commands import TINY, run


def composed(*overrides: str, base: list[str] = TINY) -> dict[str, Any]:
    with initialize_config_dir(str(CONFIGS.resolve()), version_base="1.3"):
        config: Any = compose("train", [*base, *overrides])
    # Loggers and `prune` ask for the output directory, which only the command has.
    return {
        str(key): OmegaConf.to_container(value, resolve=key not in ("logger", "callbacks"))
        if OmegaConf.is_config(value) else value
        for key, value in config.items() if key not in ("resume", "trust", "eval")
    }  # fmt: skip


GROUPS = sorted(path.name for path in CONFIGS.iterdir() if path.is_dir())
REQUIRED = {"warmup_step": ["scheduler.milestones=[1]"], "huggingface": ["data.path=x"],
            "imagefolder": ["data.root=x"], "imagenet": ["data.root=x"],
            "webdataset": ["data.root=x"]}  # fmt: skip


@pytest.mark.parametrize("group", [g for g in GROUPS if g not in ("sweep", "export")])
def test_every_choice_of_a_group_is_valid(group: str) -> None:
    names = choices(group)
    assert names
    for name in names:
        value = f"[{name}]" if group == "callbacks" else name
        required = (
            ["++data.root=x"]
            if group == "experiment"
            else REQUIRED.get(name if group in ("data", "scheduler") else "", [])
        )
        size = ["+data.image_size=32"] if group == "augment" else []
        assert validated(composed(f"{group}={value}", *required, *size, base=[]))


def test_what_a_config_leaves_out_has_a_default() -> None:
    config = composed()
    parts = {key: config[key] for key in ("model", "data", "optimizer", "trainer")}
    complete = validated({**parts, "checkpoint": {"monitor": "val/loss"}})
    assert complete["checkpoint"] == {
        "every_n_steps": None, "every_minutes": None, "monitor": "val/loss", "mode": "max",
    }  # fmt: skip
    assert complete["on_nan"] == "stop"
    assert complete["trainer"] == config["trainer"]
    assert not {"resume", "eval", "trust"} & complete.keys()


MINE = "+callbacks.mine={{_target_: {}}}"
STOP = "+callbacks.stop={_target_: pytorch_lightning.callbacks.EarlyStopping, monitor: val_loss}"


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        ("optimizer.lr=abc", "optimizer.lr=abc must be a number; --explain optimizer"),
        ("optimizer.lr=-1", "optimizer.lr=-1 must be greater than 0"),
        ("optimizer.lr=nan", "optimizer.lr=nan must be a finite number"),
        ("optimizer.nesterov=maybe", "optimizer.nesterov=maybe must be bool"),
        ("+optimizer.learnin_rate=1", "optimizer.learnin_rate: unknown argument of SGD"),
        ("optimizer.momentum=0", "optimizer: Nesterov momentum requires a momentum"),
        ("trainer.max_epochs=0", "trainer.max_epochs=0 must be 1 or more"),
        ("trainer.max_epochs=1e1", "trainer.max_epochs=10.0 must be an integer"),
        ("+trainer.max_steps=0", "trainer.max_steps=0 must be 1 or more"),
        ("trainer.accumulate_grad_batches=0", "trainer.accumulate_grad_batches=0 must be 1 or"),
        ("trainer.gradient_clip_val=-1", "trainer.gradient_clip_val=-1 must be 0 or more"),
        ("+trainer.epochs=3", "trainer.epochs: unknown argument of Trainer 'epochs'"),
        ("trainer.profiler=quick", "must be 'simple', 'advanced' or 'pytorch'"),
        ("trainer.devices=99999", "trainer.devices=99999 starts as many processes on the CPU"),
        ("trainer.devices=2.5", "trainer.devices=2.5 must be an integer"),
        ("data.batch_size=2.5", "data.batch_size=2.5 must be an integer"),
        ("data.num_workers=-1", "data.num_workers=-1 must be 0 or more"),
        ("data.image_size=0", "data.image_size=0 must be 1 or more"),
        ("seed=abc", "seed=abc must be an integer"),
        ("seed=true", "seed=True must be an integer"),
        ("pictures=maybe", "pictures=maybe must be true or false"),
        ("on_nan=ignore", "on_nan=ignore must be 'stop' or 'skip'"),
        ("lr_scaling=linear", r"lr_scaling=linear must be a group of keys \(rule, base_batch\)"),
        ("lr_scaling={rule: linear}", "lr_scaling.base_batch is required"),
        ("+checkpoint.moniter=x", "'checkpoint.moniter'; did you mean 'checkpoint.monitor'"),
        ("checkpoint.mode=up", "checkpoint.mode=up must be 'max' or 'min'"),
        ("checkpoint.monitor=val/acc", "checkpoint.monitor: unknown metric 'val/acc'"),
        ("checkpoint.monitor=raw/val/top1", "checkpoint.monitor: unknown metric 'raw/val/top1'"),
        (STOP, "callbacks.stop.monitor: unknown metric 'val_loss'; did you mean 'val/loss'"),
        (MINE.format("torch.nn.ReLU"), "callbacks.mine: torch.nn.ReLU is not a callback"),
        ("+callbacks.mine=3", r"callbacks.mine=3 must be a group of keys \(_target_\)"),
        ("scheduler.warmup_epochs=5", "warmup_epochs=5 is longer than the training of .*=1;"),
        ("scheduler.warmup_epochs=abc", "scheduler.warmup_epochs=abc must be a number"),
        ("model.widths=wide", r"model.widths=wide must be Sequence\[float\]"),
        ("+optimzer={lr: 0.1}", "unknown key 'optimzer'; did you mean 'optimizer'"),
        ("+epochs=3", "unknown key 'epochs'; did you mean 'trainer.max_epochs'"),
        ("+compile=true", "unknown key 'compile'; the keys are block, callbacks, .*trust"),
    ],
)  # fmt: skip
def test_a_config_that_is_wrong_is_one_message_and_leaves_nothing(
    tmp_path: Path, override: str, reason: str
) -> None:
    with pytest.raises(InputError, match=reason) as refused:
        train(composed(override), tmp_path / "run")
    assert "\n" not in str(refused.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "overrides",
    [
        ["callbacks=[ema]", "checkpoint.monitor=raw/val/top1"],
        ["callbacks=[ema]", "callbacks.ema.decay=0", "callbacks.ema.warmup=3"],
        ["scheduler=one_cycle", "scheduler.momentum=[0.8,0.9]"],
        ["optimizer=adam", "optimizer.betas=[0.8,0.9]", "optimizer.lr=1"],
        ["+trainer.max_steps=2", "trainer.max_epochs=-1", "trainer.gradient_clip_val=1"],
    ],
)
def test_a_config_that_is_right_trains(tmp_path: Path, overrides: list[str]) -> None:
    assert train(composed(*overrides), tmp_path / "run")["steps"] > 0


@pytest.mark.parametrize("text", ["plain", "a b", "it's", r"C:\new\1", r"\'", "a,b", "[x]", "ü"])
def test_what_a_command_prints_is_read_as_it_was(text: str) -> None:
    for value in (text, [text, "y"]):
        override = OverridesParser.create().parse_override(f"key={quoted(value)}")
        assert override.value() == value


def test_a_warm_up_may_fill_the_training_and_outlast_a_trial_of_some_batches() -> None:
    fills = ["trainer.max_epochs=5", "scheduler.warmup_epochs=5"]
    assert validated(composed(*fills))
    outlasts = ["trainer.max_epochs=1", "scheduler.warmup_epochs=5"]
    assert validated(composed(*outlasts, "+trainer.limit_train_batches=2"))
    with pytest.raises(InputError, match="is longer than the training"):
        validated(composed(*outlasts, "+trainer.limit_train_batches=0.5"))  # whole epochs


def test_several_mistakes_are_told_together() -> None:
    with pytest.raises(InputError) as refused:
        validated(composed("seed=abc", "optimizer.lr=-1", "+x=1"))
    for part in ("seed=abc must", "optimizer.lr=-1 must", "unknown key 'x'"):
        assert part in str(refused.value)


def test_the_nearest_key_is_found_by_its_whole_name_or_its_last_part() -> None:
    config = {"optimizer": {"lr": 1}, "trainer": {"max_epochs": 2}, "optimzer": {"rate": 3}}
    assert unknown_key("optimzer", config).endswith("did you mean 'optimizer'?")
    assert unknown_key("lr", config).endswith("did you mean 'optimizer.lr'?")
    assert unknown_key("trainer.epochs", config).endswith("did you mean 'trainer.max_epochs'?")


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        ("optimzer.lr=0.1", "unknown key 'optimzer.lr'; did you mean 'optimizer.lr'?\n"),
        ("epochs=3", "unknown key 'epochs'; did you mean 'trainer.max_epochs'?\n"),
        ("callbacks=[emma]", "unknown callbacks 'emma'; did you mean 'ema'?"),
        ("trainer.overfit_batches=1", "is added with +trainer.overfit_batches=..."),
        ("seed=abc", "seed=abc must be an integer"),
        ("trust=3", "trust=3 must be a list, such as trust=[one,other]"),
    ],
)
def test_the_command_answers_a_mistake_with_one_line(
    tmp_path: Path, override: str, reason: str
) -> None:
    refused = run("train.py", override, cwd=tmp_path, code=2)
    assert reason in refused.stderr
    assert refused.stderr.startswith("error: ")
    assert refused.stderr.count("\n") == 1
    assert not list(tmp_path.glob("outputs/train/*"))


def test_every_key_is_explained(tmp_path: Path) -> None:
    for name, field in Training.model_fields.items():
        assert field.description, name
    listed = run("train.py", "--explain", cwd=tmp_path).stdout
    assert all(f"  {name} " in listed for name in Training.model_fields)
    file = yaml.safe_load((CONFIGS / "train.yaml").read_text())
    assert {*file} - {"defaults", "hydra"} <= {*Training.model_fields}


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (
            ["optimizer"],
            ["  adamw ", "torch.optim.SGD", "optimizer.lr=0.1 ", "number > 0: learning rate",
             "+optimizer.NAME=VALUE: dampening"],
        ),
        (["callbacks", "callbacks=[ema]"], ["callbacks.ema.decay=0.9999", "float: of one update"]),
        (["optimizer=adam", "--explain", "optimizer.lr"], ["optimizer is torch.optim.Adam"]),
        (["checkpoint"], ["checkpoint.mode=max", "max | min"]),
        (["seed"], ["It is 0; integer >= 0"]),
    ],
)  # fmt: skip
def test_a_key_is_explained(tmp_path: Path, arguments: list[str], parts: list[str]) -> None:
    flag = [] if "--explain" in arguments else ["--explain"]
    shown = run("train.py", *flag, *arguments, cwd=tmp_path).stdout
    for part in parts:
        assert part in shown
    assert not list(tmp_path.iterdir())


def test_an_unknown_key_is_not_explained(tmp_path: Path) -> None:
    refused = run("train.py", "--explain", "optimzer", cwd=tmp_path, code=2)
    assert "unknown key 'optimzer'; did you mean 'optimizer'?" in refused.stderr
