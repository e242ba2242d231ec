"""`build`: what plain data may describe, and that a refused description runs nothing."""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from repnet.blocks import RepVGGBlock
from repnet.errors import InputError
from repnet.layers import Scale, Sum
from repnet.models import RepVGG
from repnet.spec import (
    MODEL_PACKAGES,
    build,
    choices,
    is_plain,
    load_choice,
    unknown_name,
)

TINY = {"_target_": "repnet.models.RepVGG", "depths": [1, 1, 1, 1], "widths": [0.25] * 4}


@pytest.fixture
def outsider(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Put a package `outsider` on the path; return the file in which it notes what ran."""
    notes = tmp_path / "notes"
    source = [
        "import os, pathlib, torch",
        f"notes = pathlib.Path({str(notes)!r})",
        "def note(word): notes.write_text((notes.read_text() if notes.exists() else '') + word)",
        "note('imported ')",
        *(f"def make{i}(): note('called ')" for i in range(20)),
        "class Widget:",
        "    def __init__(self, size=1): self.size = size",
        "    def method(self): pass",
        "    @staticmethod",
        "    def static(): pass",
        "    class Inner: pass",
        "class _Hidden: pass",
        "def decorated(): pass",
        "decorated.__wrapped__ = os.system",
        "shell = os.system",
        "constant = 3",
        "instance = Widget()",
    ]
    (tmp_path / "outsider.py").write_text("\n".join(source) + "\n", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    yield notes
    sys.modules.pop("outsider", None)


def notes_of(outsider: Path) -> str:
    return outsider.read_text(encoding="utf-8") if outsider.exists() else ""


def at(target: Any) -> dict[str, Any]:
    return {"_target_": target}


@pytest.mark.parametrize(
    "target",
    [
        "os.system",
        "builtins.eval",
        "builtins.exec",
        "torch.load",
        "torch.nn.Conv2d",
        "subprocess.Popen",
        "repnet.checkpoint.load_checkpoint",
        "repnet.spec.build",
        # Objects that allowed modules have imported:
        "repnet.layers.torch.load",
        "repnet.layers.torch.os.system",
        "repnet.layers.nn.Module",
        "repnet.layers.functional.relu",
        "repnet.layers.OrderedDict",
        "repnet.models.build",
        "repnet.models.load_choice",
        "repnet.models.import_module",
        "repnet.models.repvgg.SqueezeExcitation",
        # Not public, or neither class nor function:
        "repnet.models.repvgg._squeeze",
        "repnet.layers.Sum.forward",
        "repnet.layers.Sum.append",
        "repnet.layers.Sum.__init__.__globals__",
        "repnet.layers.conv.__globals__",
        "repnet.layers.__builtins__",
        "repnet.layers.Sum.__class__",
        "repnet.models.repvgg.BASE_CHANNELS",
        "repnet.layers.Size",
        "repnet.blocks.block",
        # Names that only begin like an allowed package:
        "repnet.modelsx.RepVGG",
        "repnet.models_evil.RepVGG",
        # No dotted names:
        "RepVGG",
        "repnet",
        "",
        "repnet.models.",
        ".models.RepVGG",
        "repnet..models.RepVGG",
        "repnet.models.RepVGG()",
        "repnet.models.RepVGG ",
        "repnet.models.RepVGG\n",
        "repnet/models/RepVGG",
        "${x}",
        "${oc.env:HOME}",
        "repnet.models.${x}",
        "repnet.models.RepVGG.${x}",
        None,
        3,
        ["repnet.models.RepVGG"],
    ],
)
def test_a_file_cannot_name_anything_else(target: Any) -> None:
    for spec in (
        at(target),
        {**TINY, "block": at(target)},
        [{"deep": [{**TINY, "x": at(target)}]}],
    ):
        with pytest.raises(InputError):
            build(spec, allowed=MODEL_PACKAGES)


@pytest.mark.parametrize(
    ("spec", "kind"),
    [
        (TINY, RepVGG),
        ({**TINY, "_target_": "repnet.models.repvgg.RepVGG"}, RepVGG),
        ({"_target_": "repnet.models.create_model", "name": "repvgg_tiny"}, RepVGG),
        ({"_target_": "repnet.blocks.RepVGGBlock", "_args_": [4, 8]}, RepVGGBlock),
        ({"_target_": "repnet.layers.Scale", "value": 2.0}, Scale),
    ],
)
def test_a_file_can_name_public_classes_and_functions(spec: dict[str, Any], kind: type) -> None:
    assert type(build(spec, allowed=MODEL_PACKAGES)) is kind


def test_a_refusal_says_what_to_do() -> None:
    with pytest.raises(InputError, match=r"'mypackage\.Net' may not be .*trust=\[mypackage\]"):
        build(at("mypackage.Net"), allowed=MODEL_PACKAGES)
    with pytest.raises(InputError) as caught:
        build(at("os.system"), allowed=MODEL_PACKAGES)
    assert "trust" not in str(caught.value)


def test_what_is_not_trusted_is_not_imported(outsider: Path) -> None:
    for spec in (at("outsider.make0"), [at("repnet.layers.Sum"), at("outsider.make0")]):
        with pytest.raises(InputError, match="outsider"):
            build(spec, allowed=MODEL_PACKAGES)
    assert not outsider.exists()


def test_trust_is_for_the_package_that_is_named(outsider: Path) -> None:
    for trust in ("out", "outsiders", "repnet"):
        with pytest.raises(InputError):
            build(at("outsider.make0"), allowed=(*MODEL_PACKAGES, trust))
    assert not outsider.exists()
    for trust in ("outsider.make", "outsider.make00"):
        with pytest.raises(InputError):
            build(at("outsider.make0"), allowed=(*MODEL_PACKAGES, trust))
    assert "called" not in notes_of(outsider)


def test_a_name_is_not_trusted_for_its_beginning() -> None:
    for allowed in ("repnet.model", "repnet.models.rep", "rep"):
        with pytest.raises(InputError):
            build(TINY, allowed=[allowed])


def test_a_trusted_package_is_built(outsider: Path) -> None:
    spec = [at("outsider.make0"), {**at("outsider.Widget"), "size": 3}]
    nothing, widget = build(spec, allowed=(*MODEL_PACKAGES, "outsider"))
    assert nothing is None
    assert widget.size == 3
    assert notes_of(outsider) == "imported called "


@pytest.mark.parametrize(
    "name",
    [
        "Widget.method",
        "Widget.static",
        "Widget.Inner",
        "_Hidden",
        "decorated.__wrapped__",
        "shell",
        "os.system",
        "torch.load",
        "constant",
        "instance",
        "missing",
        "__loader__",
    ],
)
def test_trust_does_not_extend_to_what_a_package_imports(name: str, outsider: Path) -> None:
    with pytest.raises(InputError):
        build(at(f"outsider.{name}"), allowed=(*MODEL_PACKAGES, "outsider"))


@pytest.mark.parametrize("refused", ["os.system", "outsider.missing", "outsider.shell"])
def test_nothing_is_called_before_every_target_is_checked(refused: str, outsider: Path) -> None:
    spec = [*(at(f"outsider.make{i}") for i in range(20)), {"last": [at(refused)]}]
    with pytest.raises(InputError):
        build(spec, allowed=(*MODEL_PACKAGES, "outsider"))
    assert "called" not in notes_of(outsider)


def test_nothing_is_imported_where_a_name_alone_is_refused(outsider: Path) -> None:
    spec = [*(at(f"outsider.make{i}") for i in range(20)), {"last": [at("os.system")]}]
    with pytest.raises(InputError, match=r"os\.system"):
        build(spec, allowed=(*MODEL_PACKAGES, "outsider"))
    assert not outsider.exists()


def test_the_own_config_may_name_anything(outsider: Path) -> None:
    assert type(build({**at("torch.nn.Conv2d"), "_args_": [3, 4, 1]})) is nn.Conv2d
    assert build({**at("outsider.Widget"), "size": 2}).size == 2


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({**TINY, "width": 3}, r"repnet\.models\.RepVGG: .*'width'"),
        (at("repnet.models.RepVGG"), r"repnet\.models\.RepVGG: missing .*'depths'"),
        (at("repnet.models.RepVGGG"), r"has no 'RepVGGG'; did you mean 'RepVGG'\?"),
        (at("repnet.blocks.RepVGBlock"), r"did you mean 'RepVGGBlock'\?"),
        (at("repnet.nothing.Net"), "repnet"),
        (at("nosuchpackage.Net"), "there is no module 'nosuchpackage'"),
        ({**TINY, "_call_": True}, r"unknown key '_call_'"),
        ({**TINY, "_convert_": "all"}, r"unknown key '_convert_'"),
        (at("math.pi"), r"'math\.pi' is not a class or function"),
        ({**TINY, "depths": [1, 1, 1]}, r"repnet\.models\.RepVGG: depths and widths need 4 values"),
        ({**TINY, 1: 2}, r"repnet\.models\.RepVGG"),
        ({**TINY, "_args_": 3}, r"repnet\.models\.RepVGG"),
    ],
)
def test_an_error_names_the_target_and_the_reason(spec: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        build(spec)


def test_the_names_of_arguments_are_checked_where_they_are_bound() -> None:
    with pytest.raises(InputError, match=r"repnet\.layers\.conv_bn: .*'kernel'"):
        build({**at("repnet.layers.conv_bn"), "_partial_": True, "kernel": 2})


def test_an_unknown_option_of_a_block_is_bad_input_too() -> None:
    block = {**at("repnet.blocks.RepVGGBlock"), "_partial_": True, "dilations": 2}
    with pytest.raises(InputError, match="dilations"):
        build({**TINY, "block": block})


def test_a_module_that_cannot_be_imported_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "needy.py").write_text("import nosuchdependency\n", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(InputError, match="cannot import 'needy': .*nosuchdependency"):
        build(at("needy.Net"))


def test_partial_binds_and_does_not_call() -> None:
    made = build({"_target_": "repnet.blocks.RepVGGBlock", "_partial_": True, "activation": None})
    assert isinstance(made, functools.partial)
    assert made.func is RepVGGBlock
    assert made.keywords == {"activation": None}


def test_positional_arguments_may_be_targets_too() -> None:
    branch = {"_target_": "repnet.layers.conv", "_args_": [4, 4, 1]}
    built = build({"_target_": "repnet.layers.Sum", "_args_": [branch, None, branch]})
    assert type(built) is Sum
    assert [type(child) for child in built] == [nn.Conv2d] * 2


@pytest.mark.parametrize(
    "data", [3, "text", "${x}", None, [1, [2.5]], {"a": {"b": [True]}}, {}, []]
)
def test_data_without_targets_stays_data(data: Any) -> None:
    assert build(data, allowed=MODEL_PACKAGES) == data


def test_a_model_remembers_the_data_it_was_built_from() -> None:
    assert build(TINY).architecture == TINY
    assert not hasattr(build({**TINY, "block": RepVGGBlock}), "architecture")


@pytest.mark.parametrize("data", [1, 1.5, "a", None, True, [1, "b"], (1, 2), {"a": [{"b": None}]}])
def test_plain_data(data: Any) -> None:
    assert is_plain(data)


@pytest.mark.parametrize(
    "data", [len, nn.ReLU, {1: 2}, {"a": {1}}, [object()], b"bytes", 1j, Path(), {"a": [nn.ReLU()]}]
)
def test_what_is_not_plain_data(data: Any) -> None:
    assert not is_plain(data)


def test_all_packages_that_need_trust_are_named_at_once() -> None:
    spec = {**TINY, "block": at("mine.blocks.A"), "x": [at("torch.nn.ReLU"), at("other.B")]}
    with pytest.raises(InputError, match=r"add trust=\[mine,other\]$"):
        build(spec, allowed=MODEL_PACKAGES)


def test_choices_are_files_and_an_unknown_one_is_an_error() -> None:
    assert "repvgg" in choices("block")
    assert load_choice("block", "repvgg")["_target_"] == "repnet.blocks.RepVGGBlock"
    for name in ("repvg", "../block/repvgg", "repvgg.yaml", ""):
        with pytest.raises(InputError, match="Choose one of: ac, composed, .*repvgg"):
            load_choice("block", name)


@pytest.mark.parametrize(
    ("name", "names", "message"),
    [
        (
            "adm",
            ["adam", "sgd"],
            "unknown kind 'adm'; did you mean 'adam'? Choose one of: adam, sgd",
        ),
        ("zzz", ["adam", "sgd"], "unknown kind 'zzz'. Choose one of: adam, sgd"),
        ("zzz", [], "unknown kind 'zzz'. Choose one of: (none)"),
    ],
)
def test_the_message_for_an_unknown_name(name: str, names: list[str], message: str) -> None:
    assert unknown_name("kind", name, names) == message
