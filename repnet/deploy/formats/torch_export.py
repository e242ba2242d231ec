"""`TorchExport`: a `.pt2` file, a graph of torch's operators that runs without the model's code."""

from __future__ import annotations

import ast
import copy
import io
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.export.passes import move_to_device_pass
from torch.export.pt2_archive._package import load_pt2

from repnet.deploy.formats.base import ExportError, Format, Runner
from repnet.deploy.preprocess import Preprocessed
from repnet.errors import InputError, first_line

METADATA = "metadata.json"


class TorchExport(Format):
    """`torch.export.save`; `torch.export.load(path).module()` runs it where torch is installed.

    Such a file may hold pickles, Python expressions and native libraries, all of which
    `torch.export.load` executes. `load` refuses a file with any of them; `export` writes none.
    Where torch cannot read a file, `torch.export.load` tries it as one of an older kind, made of
    pickles. `load` does not.
    """

    name = "torch_export"
    suffix = ".pt2"
    precisions = ("fp32", "bf16")

    def export(
        self,
        model: nn.Module,
        example: Tensor,
        path: Path,
        *,
        precision: str = "fp32",
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        program = exported_program(model, example, precision=precision)
        program.example_inputs = None  # they would be stored, as a pickle
        files = {METADATA: json.dumps(dict(metadata or {}), ensure_ascii=False)}
        torch.export.save(program, path, extra_files=files)

    def load(self, path: Path, *, precision: str = "fp32", device: str = "cpu") -> Runner:
        contents = path.read_bytes()  # once: what is checked is what is loaded
        try:
            refuse_code(contents)
        except ExportError as error:
            raise ExportError(f"'{path}' {error}") from error
        try:
            program = load_pt2(io.BytesIO(contents)).exported_programs["model"]
            if device != "cpu":
                program = move_to_device_pass(program, device)
            takes = ImageSpec.of(program)
            module = program.module()
        except Exception as error:  # a file may be damaged in many ways
            raise ExportError(f"'{path}' cannot be loaded: {error}") from error

        @torch.no_grad()
        def run(images: Tensor) -> Tensor:
            return cast(Tensor, module(takes.check(images).to(device))).cpu()

        return run


@dataclass(frozen=True)
class ImageSpec:
    """What a file takes.

    Args:
        dtype: float32 or uint8.
        shape: `(batch, channels, height, width)`, None for what is free.
    """

    dtype: torch.dtype
    shape: tuple[int | None, ...]

    @classmethod
    def of(cls, program: ExportedProgram) -> ImageSpec:
        """Return that of a program of one input."""
        (name,) = program.graph_signature.user_inputs
        (node,) = (n for n in program.graph.nodes if n.op == "placeholder" and n.name == name)
        value = node.meta["val"]
        return cls(value.dtype, tuple(n if isinstance(n, int) else None for n in value.shape))

    @classmethod
    def loads(cls, text: str) -> ImageSpec:
        """Return what `dumps` wrote."""
        stored = json.loads(text)
        return cls(getattr(torch, stored["dtype"]), tuple(stored["shape"]))

    def dumps(self) -> str:
        return json.dumps({"dtype": str(self.dtype).removeprefix("torch."), "shape": self.shape})

    def check(self, images: Tensor) -> Tensor:
        """Return the images, contiguous; compiled code would read others as if they were.

        Raises:
            InputError: of another dtype or shape.
        """
        fits = images.ndim == len(self.shape) and all(
            size in (None, n) for size, n in zip(self.shape, images.shape, strict=True)
        )
        if not fits or images.dtype != self.dtype:
            shape = ", ".join("any" if size is None else str(size) for size in self.shape)
            raise InputError(
                f"the images are {images.dtype} {tuple(images.shape)}, the file takes {self.dtype} "
                f"({shape})"
            )
        return images.contiguous()


def exported_program(
    model: nn.Module,
    example: Tensor,
    *,
    precision: str = "fp32",
    batch: int | None = None,
) -> ExportedProgram:
    """Return `model` as a graph of torch's own operators, with its weights and nothing else.

    Names of modules and lines of source files are left out.

    Args:
        model: not changed.
        example: of its input, any batch size.
        precision: "bf16" for weights and activations in bfloat16; images and logits stay float32.
        batch: the only size of a batch; None for any.

    Raises:
        ExportError: it branches on values, or uses operators that torch does not have.
    """
    model = copy.deepcopy(model).eval().requires_grad_(False)
    if precision == "bf16":
        model = _in_bfloat16(model)
    # A size of 1 would be taken for a constant.
    images = example[:1].repeat(2 if batch is None else batch, 1, 1, 1)
    sizes = {} if batch is not None else {0: Dim("batch", min=1)}
    if isinstance(model, Preprocessed) and model.resize is not None:
        sizes |= {2: Dim("height", min=1), 3: Dim("width", min=1)}
    try:
        with torch.no_grad():
            program = torch.export.export(model, (images,), dynamic_shapes=(sizes or None,))
    except Exception as error:  # forward is anyone's code
        raise ExportError(f"torch.export cannot take this network: {first_line(error)}") from error
    nodes = list(_nodes(program))
    foreign = {str(n.target) for n in nodes if n.op == "call_function" and not _is_torch(n.target)}
    if foreign:
        raise ExportError(
            f"the network uses {', '.join(sorted(foreign))}, which only runs where the library "
            "that defines it is imported"
        )
    for node in nodes:
        node.meta = {key: node.meta[key] for key in ("val", "tensor_meta") if key in node.meta}
    return program


class InBFloat16(nn.Module):
    """A network with bfloat16 weights and activations; floats in, float32 logits out."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model.bfloat16()

    def forward(self, images: Tensor) -> Tensor:
        return cast(Tensor, self.model(images.bfloat16())).float()


def _in_bfloat16(model: nn.Module) -> nn.Module:
    """Return the network in bfloat16; preprocessing, which is cheap, keeps float32."""
    if isinstance(model, Preprocessed):
        model.model = InBFloat16(model.model)
        return model
    return InBFloat16(model)


def _nodes(program: ExportedProgram) -> Iterator[torch.fx.Node]:
    for module in program.graph_module.modules():
        if isinstance(module, torch.fx.GraphModule):
            yield from module.graph.nodes


def _is_torch(target: Any) -> bool:
    if isinstance(target, torch._ops.OpOverload):
        return target.namespace == "aten"
    return not isinstance(target, torch._ops.OperatorBase)  # arithmetic of sizes


# Everything that `export` writes; whatever else torch.export.load would act upon is refused.
_RECORDS = re.compile(
    r"data/(weights/weight_\d+|constants/tensor_\d+|(weights|constants)/model_\w+_config\.json"
    r"|sample_inputs/model\.pt)|models/model\.json|extra/.*|archive_(format|version)"
    r"|\.data/\w+|byteorder"
)
_TARGETS = re.compile(
    r"torch\.ops\.aten\.\w+\.\w+|torch\.sym_(int|float|max|min|not|sum)"
    r"|_operator\.(add|sub|mul|neg|floordiv|truediv|mod|pow|eq|ne|lt|le|gt|ge|and_|or_|getitem)"
    r"|math\.(ceil|floor|trunc)"
)
_CONTAINERS = (None, "builtins.tuple", "builtins.list", "builtins.dict")
_FORMULA = (
    ast.Expression, ast.BinOp, ast.UnaryOp, ast.BoolOp, ast.Compare, ast.Call, ast.keyword,
    ast.Name, ast.Attribute, ast.Subscript, ast.Constant, ast.operator, ast.unaryop, ast.boolop,
    ast.cmpop, ast.expr_context,
)  # fmt: skip
_FUNCTIONS = {
    "Symbol", "Integer", "Float", "Rational", "Add", "Mul", "Pow", "Mod", "Max", "Min", "FloorDiv",
    "CeilDiv", "CleanDiv", "PythonMod", "ModularIndexing", "Where", "TruncToInt", "FloorToInt",
    "CeilToInt", "IntTrueDiv", "FloatTrueDiv", "FloatPow", "PowByNatural", "RoundToInt", "ToFloat",
    "Eq", "Ne", "Equality", "Unequality", "GreaterThan", "LessThan", "StrictGreaterThan",
    "StrictLessThan", "And", "Or", "Not", "math.ceil", "math.floor", "math.trunc",
    "torch.sym_float", "torch.sym_int", "torch.sym_max", "torch.sym_min", "torch.sym_not",
}  # fmt: skip


def refuse_code(contents: bytes) -> None:
    """Refuse the contents of a `.pt2` file that could execute code when they are loaded.

    Raises:
        ExportError: it holds pickles, libraries, operators or expressions that `TorchExport` does
            not write, or is no such file.
    """
    try:
        reasons = list(_code_in(torch._C.PyTorchFileReader(io.BytesIO(contents))))
    except Exception as error:  # anything may be in the file
        raise ExportError(f"is not a file of torch.export: {error}") from error
    if reasons:
        raise ExportError(
            "could run code when it is loaded, and repnet does not write such files: it holds "
            f"{reasons[0]}"
        )


def _code_in(reader: Any) -> Iterator[str]:
    """Yield what is not plain data."""
    for name in reader.get_all_records():
        if not _RECORDS.fullmatch(name):
            yield f"'{name}'"
    if reader.get_record("data/sample_inputs/model.pt"):
        yield "pickled sample inputs"
    for kind in ("weights", "constants"):
        config = json.loads(reader.get_record(f"data/{kind}/model_{kind}_config.json"))
        for name, entry in config["config"].items():
            if entry["use_pickle"] is not False:
                yield f"the pickle of '{name}'"
    model = json.loads(reader.get_record("models/model.json"))
    for guard in model["guards_code"]:
        if not _is_formula(guard):
            yield f"the condition {guard!r}"
    for key, value in _entries(model):
        if key == "target" and not _TARGETS.fullmatch(value):
            yield f"the operator {value!r}"
        elif key == "expr_str" and not _is_formula(value):
            yield f"the expression {value!r}"
        elif key in ("as_custom_obj", "as_operator", "as_graph") and value is not None:
            yield f"a value of kind {key}"
        elif key in ("in_spec", "out_spec"):
            for inner, kind in _entries(json.loads(value)):
                if inner == "type" and kind not in _CONTAINERS:
                    yield f"the container {kind!r}"
        elif key == "metadata" and value:
            yield "metadata of operators"


def _entries(value: Any) -> Iterator[tuple[str, Any]]:
    """Yield every key with its value, at any depth."""
    if isinstance(value, dict):
        yield from value.items()
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            yield from _entries(item)


def _is_formula(text: Any) -> bool:
    """Return whether `text` is arithmetic of sizes, which torch hands to `eval`."""
    try:
        tree = ast.parse(text, mode="eval")
    except (SyntaxError, TypeError, ValueError, RecursionError, MemoryError):
        return False
    for node in ast.walk(tree):
        if not isinstance(node, _FORMULA):
            return False
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            if name not in _FUNCTIONS and not re.fullmatch(r"L\['\w+'\]\.size", name):
                return False
        value = node.value if isinstance(node, ast.Constant) else None
        if isinstance(value, str | bytes) and not re.fullmatch(r"\w+", str(value)):
            return False
    return True
