"""The forms in which a network can be run, and how each is made."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from copy import deepcopy
from importlib import import_module
from pathlib import Path

import torch
from torch import Tensor, nn

from repnet.bench.recipe import Form, Recipe, reason_of
from repnet.bench.subjects import Exported, Subject
from repnet.bench.worker import InPrecision
from repnet.deploy.formats import Format, format_named
from repnet.errors import InputError
from repnet.spec import unknown_name
from repnet.weights import convert_weights

CALIBRATION = 32  # random images for the ranges of int8, where only the speed matters

# Largest difference to the deploy form in float64, relative to its largest output. A network with
# other weights is at 1 or above; repvgg_a0 and mobileone_s0 with random weights are at 1e-6
# (float32), 6e-3 and 1e-2 (bf16). Convolutions of GPUs are in TF32 unless told otherwise.
TOLERANCES = {"fp32": 1e-3, "tf32": 1e-2, "fp16": 1e-2, "bf16": 5e-2, "int8": 0.3}
# Where rounding matters more, as many times the difference of PyTorch's own bf16 are allowed.
_TIMES_BF16 = {"fp16": 1, "bf16": 4, "int8": 16}


class Skip(Exception):
    """A form that cannot be made here; the message says why."""


_CPU, _GPU, _GRAPHS = ("cpu",), ("cuda",), "reduce-overhead"
FORMS = {
    "train": Form("train form, eager PyTorch", "train"),
    "train_compiled": Form("train form, torch.compile", "train", compile="default"),
    "deploy": Form("deploy form, eager PyTorch"),
    "channels_last": Form("the same, channels last", channels_last=True),
    "bf16": Form("the same, bf16 and channels last", precision="bf16", channels_last=True),
    "fp16": Form("the same, fp16", precision="fp16", channels_last=True, devices=_GPU),
    "compiled": Form("deploy form, torch.compile", compile="default"),
    "compiled_bf16": Form("the same, bf16", precision="bf16", compile="default"),
    "compiled_fp16": Form(
        "the same, fp16", precision="fp16", channels_last=True, compile="default", devices=_GPU
    ),
    "cudagraphs": Form("deploy form, torch.compile, CUDA graphs", compile=_GRAPHS, devices=_GPU),
    "cudagraphs_bf16": Form(
        "the same, bf16", precision="bf16", channels_last=True, compile=_GRAPHS, devices=_GPU
    ),
    "cudagraphs_fp16": Form(
        "the same, fp16", precision="fp16", channels_last=True, compile=_GRAPHS, devices=_GPU
    ),
    "onnx": Form("ONNX Runtime", runtime="onnx"),
    "onnx_fp16": Form("ONNX Runtime, fp16", precision="fp16", runtime="onnx"),
    "onnx_int8": Form("ONNX Runtime, int8", precision="int8", runtime="onnx"),
    "openvino_fp32": Form("OpenVINO", runtime="openvino", devices=_CPU),
    "openvino_fp16": Form("OpenVINO, fp16", precision="fp16", runtime="openvino", devices=_CPU),
    "openvino_bf16": Form("OpenVINO, bf16", precision="bf16", runtime="openvino", devices=_CPU),
    "openvino_int8": Form("OpenVINO, int8", precision="int8", runtime="openvino", devices=_CPU),
    "torch_export": Form("torch.export", runtime="torch_export"),
    "aot": Form("AOTInductor", runtime="aot_inductor"),
    "aot_bf16": Form("AOTInductor, bf16", precision="bf16", runtime="aot_inductor"),
    "executorch": Form("ExecuTorch", runtime="executorch", devices=_CPU),
    "tensorrt": Form("TensorRT", runtime="tensorrt", devices=_GPU),
    "tensorrt_fp16": Form("TensorRT, fp16", precision="fp16", runtime="tensorrt", devices=_GPU),
    "timm": Form("timm's model, folded by timm, eager", "timm"),
    "timm_compiled": Form("the same, torch.compile", "timm", compile="default"),
}
DEFAULTS = {
    "cpu": (
        "train", "deploy", "channels_last", "bf16", "compiled", "compiled_bf16", "onnx",
        "openvino_fp32", "openvino_bf16", "openvino_int8", "aot", "aot_bf16",
    ),
    "cuda": (
        "train", "deploy", "channels_last", "bf16", "fp16", "compiled", "compiled_fp16",
        "cudagraphs", "cudagraphs_fp16", "aot", "onnx", "tensorrt", "tensorrt_fp16",
    ),
}  # fmt: skip


def check_names(names: Sequence[str]) -> list[str]:
    """Return the names of forms, `all` of them if that is asked for.

    Raises:
        InputError: there is no such form.
    """
    for name in names:
        if name != "all" and name not in FORMS:
            raise InputError(unknown_name("form", name, ["all", *FORMS]))
    return list(FORMS) if "all" in names else list(dict.fromkeys(names))


def forms_of(subject: Subject, names: Sequence[str], device: str) -> dict[str, Form]:
    """Return the forms to measure by name.

    Args:
        subject: the network.
        names: of `check_names`; empty for those that suit the subject and the device.
        device: `cpu` or `cuda`.
    """
    if names:
        return {name: FORMS[name] for name in names}
    forms = {name: FORMS[name] for name in DEFAULTS[device]}
    if subject.is_artifact:  # its own files, and nothing that would be exported
        forms = {name: form for name, form in forms.items() if form.runtime is None}
        forms |= dict(_form_of(export) for export in subject.exports)
    return forms


def _form_of(export: Exported) -> tuple[str, Form]:
    for name, form in FORMS.items():
        if (form.runtime, form.precision) == (export.format, export.precision):
            return name, form
    name = f"{export.format}_{export.precision}"
    return name, Form(name, precision=export.precision, runtime=export.format)


class Kitchen:
    """Makes the forms of one subject, as files in one directory.

    Args:
        subject: the network.
        directory: that exists.
        device: `cpu` or `cuda`.
    """

    def __init__(self, subject: Subject, directory: Path, device: str) -> None:
        self.subject, self.directory, self.device = subject, directory, device

    def make(self, form: Form) -> Recipe:
        """Return how to run a form.

        Raises:
            Skip: it cannot be made here.
        """
        if self.device not in form.devices:
            raise Skip(f"only with --device {form.devices[0]}")
        if form.runtime is None:
            return Recipe(self._network(form.network), self.device, form)
        chosen = self._format(form)
        if self.subject.is_artifact:
            export = self.subject.export_of(form.runtime, form.precision)
            if export is None:
                code = "; a file that is code needs --trust native" if chosen.native else ""
                raise Skip(f"not among the files of this artefact{code}")
            return Recipe(export.path, self.device, form, export.preprocess)
        try:
            return Recipe(self._exported(chosen, form.precision), self.device, form)
        except Exception as error:  # what other packages raise
            raise Skip(reason_of(error)) from error

    def _format(self, form: Form) -> Format:
        assert form.runtime is not None
        chosen = format_named(form.runtime)
        if reason := chosen.skip_reason():
            raise Skip(reason)
        try:
            chosen.require()
        except InputError as error:
            raise Skip(str(error)) from error
        if self.device == "cuda" and chosen.name == "onnx":
            providers = import_module("onnxruntime").get_available_providers()
            if "CUDAExecutionProvider" not in providers:
                raise Skip("this onnxruntime has no CUDA: pip install onnxruntime-gpu")
        if form.precision not in (*chosen.precisions, "int8"):
            raise Skip(f"{chosen.name} has no {form.precision}")
        return chosen

    def _network(self, network: str) -> Path:
        path = self.directory / f"{network}.pt"
        if not path.exists():
            make = {
                "train": lambda: self.subject.train_form,
                "deploy": lambda: self.subject.deploy_form,
                "timm": self._timm_twin,
            }
            torch.save(make[network](), path)
        return path

    def _timm_twin(self) -> nn.Module:
        """Return timm's model with the weights of the train form, folded by timm."""
        try:
            timm = import_module("timm")
        except ImportError as error:
            raise Skip('needs timm: pip install "repnet[timm]"') from error
        name = self.subject.name
        if name not in timm.list_models():
            raise Skip(f"timm has no model '{name}'")
        model = timm.create_model(name)
        try:
            model.load_state_dict(convert_weights(self.subject.train_form.state_dict(), to="timm"))
        except (InputError, RuntimeError) as error:
            raise Skip(f"timm's model cannot have the same weights: {reason_of(error)}") from error
        folded: nn.Module = import_module("timm.utils.model").reparameterize_model(model.eval())
        return folded

    def _exported(self, chosen: Format, precision: str) -> Path:
        path = self.directory / chosen.file_name(precision)
        if path.exists():
            return path
        shape = self.subject.input_shape
        if precision == "int8":
            from repnet.deploy.int8 import quantize

            images = torch.randn(CALIBRATION, *shape, generator=torch.Generator().manual_seed(1))
            quantize(chosen.name, self._exported(chosen, "fp32"), path, images)
            return path
        model, example = self.subject.deploy_form, torch.zeros(2, *shape)
        if self.device == "cuda" and chosen.name == "aot_inductor":  # compiled for what it is on
            model, example = deepcopy(model).cuda(), example.cuda()
        chosen.export(model, example, path, precision=precision)
        return path


def reference(subject: Subject, form: Form, images: Tensor, preprocess: bool = False) -> Tensor:
    """Return what a form should answer: the output of the deploy form in float64.

    Args:
        subject: the network.
        form: whose twin is meant.
        images: uint8 with `preprocess`, else float.
        preprocess: whether the form normalizes the images.
    """
    train = form.network == "train"
    model = subject.twin if train and subject.twin is not None else subject.deploy_form
    model = deepcopy(model).double()
    if preprocess:
        from repnet.deploy.preprocess import Preprocessed

        _, height, width = subject.input_shape
        prepared = Preprocessed(nn.Identity(), size=(height, width), **subject.preprocessing)
        images = prepared(images)
    with torch.inference_mode():
        output: Tensor = model(images.double())
    return output


def tolerance(subject: Subject, form: Form, device: str, images: Tensor) -> float:
    """Return the difference above which a form is held to compute something else.

    Args:
        subject: the network.
        form: that is checked.
        device: `cpu` or `cuda`.
        images: float, normalized.
    """
    if form.precision == "fp32":
        return TOLERANCES["tf32" if device == "cuda" else "fp32"]
    if form.precision == "int8" and subject.export_of(form.runtime or "", "int8") is not None:
        return sys.float_info.max  # judged on real images; it was not calibrated for noise
    short = InPrecision(deepcopy(subject.deploy_form), "bf16", channels_last=True).eval()
    with torch.inference_mode():
        rounding = difference(short(images), reference(subject, FORMS["deploy"], images))
    return max(TOLERANCES[form.precision], _TIMES_BF16[form.precision] * rounding)


def difference(output: Tensor, expected: Tensor) -> float:
    """Return the largest difference of an output, relative to the largest value expected.

    Args:
        output: `(batch, classes)`; row i belongs to image i modulo the images.
        expected: `(images, classes)`.
    """
    if output.ndim != 2 or output.shape[1:] != expected.shape[1:]:
        return math.inf
    repeated = expected[torch.arange(len(output)) % len(expected)]
    return ((output.double() - repeated).abs().max() / expected.abs().max()).item()
