"""How much of other people's convnets is folded, and how exactly, beside timm's and torch.fx's.

    python benchmarks/fold_coverage.py --jobs 2 --markdown docs/fold_coverage.md

Each model gets random batch norm statistics, evaluation mode and float64, and is folded by each
method in a process of its own. What is counted is what runs: calls of batch norm on a feature map,
and of convolution and linear layers. A call of batch norm is "foldable" if it alone consumes what a
convolution or linear layer returned; a fold is complete if it leaves no such call. Seconds are
those of the fold, for repnet with its proof, on whatever else the machine does.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import platform
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass
from fnmatch import fnmatch
from importlib import import_module
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import timm
import torch
import torchvision
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from timm.utils.model import reparameterize_model
from torch import Tensor, nn
from torch.fx.experimental.optimization import fuse
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import repnet

# Names by size of the example image in pixels: 64 to 128 unless the model insists on more.
TORCHVISION = {
    64: """
    densenet121 densenet161 densenet169 densenet201 efficientnet_b0 efficientnet_b1
    efficientnet_b2 efficientnet_b3 efficientnet_b4 efficientnet_v2_s googlenet mnasnet0_5
    mnasnet0_75 mnasnet1_0 mnasnet1_3 mobilenet_v2 mobilenet_v3_large mobilenet_v3_small
    regnet_x_1_6gf regnet_x_3_2gf regnet_x_400mf regnet_x_800mf regnet_y_1_6gf regnet_y_3_2gf
    regnet_y_400mf regnet_y_800mf resnet101 resnet152 resnet18 resnet34 resnet50 resnext50_32x4d
    shufflenet_v2_x0_5 shufflenet_v2_x1_0 shufflenet_v2_x1_5 shufflenet_v2_x2_0 vgg11_bn vgg13_bn
    vgg16_bn vgg19_bn wide_resnet50_2 deeplabv3_mobilenet_v3_large deeplabv3_resnet50 fcn_resnet50
    lraspp_mobilenet_v3_large""",
    128: """
    inception_v3 fasterrcnn_mobilenet_v3_large_320_fpn fasterrcnn_mobilenet_v3_large_fpn
    fasterrcnn_resnet50_fpn fasterrcnn_resnet50_fpn_v2 fcos_resnet50_fpn keypointrcnn_resnet50_fpn
    maskrcnn_resnet50_fpn maskrcnn_resnet50_fpn_v2 retinanet_resnet50_fpn
    retinanet_resnet50_fpn_v2""",
    224: "maxvit_t",
    300: "ssd300_vgg16",
    320: "ssdlite320_mobilenet_v3_large",
}
TIMM = {
    64: """
    convmixer_1024_20_ks9_p14 convmixer_768_32 cpubone_nano cs3darknet_focus_s cs3darknet_s
    cspdarknet53 cspnext_tiny cspresnet50 cspresnext50 darknet17 darknet53 darknetaa53 densenet121
    densenetblur121d dla34 dla46x_c dpn48b eca_resnext26ts eca_vovnet39b ecaresnet26t ecaresnetlight
    ecaresnext26t_32x4d efficientnet_b0 efficientnet_es efficientnet_lite0 efficientnetv2_rw_t
    efficientvim_m1 efficientvit_b0 ese_vovnet19b_slim_dw fasternet_t0 fastvit_sa12 fastvit_t8
    fbnetc_100 fbnetv3_b gc_efficientnetv2_rw_t gcresnet33ts gcresnext26ts gernet_s ghostnet_050
    ghostnetv2_100 ghostnetv3_050 hardcorenas_b hgnet_tiny hgnetv2_b0 hrnet_w18_small iformer_t
    inception_next_atto lcnet_035 lcnet_050 lcnetv2_small legacy_seresnet18 legacy_seresnext26_32x4d
    legacy_xception lowformer_b0 mixnet_s mnasnet_small mobilenet_edgetpu_100 mobilenetv2_035
    mobilenetv3_rw mobilenetv3_small_050 mobilenetv4_conv_small mobilenetv4_hybrid_medium
    mobileone_s0 mobileone_s1 mobilevit_xxs mobilevitv2_050 nextvit_small regnetv_040 regnetx_002
    regnety_002 regnetz_005 regnetz_b16 repghostnet_050 repvgg_a0 repvit_m0_9 repvit_m1
    res2net50_14w_8s res2next50 resnest14d resnet10t resnet18 resnet26t resnet32ts resnet50
    resnetaa34d resnetblur18 resnetrs50 resnetv2_18 resnext26ts resnext50_32x4d rexnet_100
    rexnetr_100 sedarknet21 selecsls42 semnasnet_050 seresnet18 seresnet33ts seresnetaa50d
    seresnext26t_32x4d seresnext26ts shvit_s1 skresnet18 skresnext50_32x4d spnasnet_100 starnet_s050
    tf_efficientnet_b0 tf_mixnet_s tf_mobilenetv3_small_075 tf_mobilenetv3_small_minimal_100
    tiny_vit_5m_224 tinynet_e tresnet_m vovnet39a xception41 xception41p""",
    96: "inception_resnet_v2 inception_v3 inception_v4",
    128: "lambda_resnet26t",
    224: """
    coatnet_pico_rw_224 efficientformer_l1 efficientformerv2_s0 efficientvit_m0 haloregnetz_b
    levit_128s levit_conv_128s swiftformer_xs visformer_tiny vit_base_mci_224
    vit_small_resnet50d_s16_224 xcit_nano_12_p8_224""",
    256: """
    bat_resnext26ts botnet26t_256 eca_botnext26ts_256 halo2botnet50ts_256 halonet_h1
    lamhalobotnet50ts_256 maxvit_pico_rw_256 sebotnet33ts_256 sehalonet33ts""",
}
METHODS = ("modules", "graph", "timm", "fx")
TITLES = {
    "modules": "repnet.reparameterize",
    "graph": "repnet.reparameterize_graph",
    "timm": "timm reparameterize_model",
    "fx": "torch.fx fuse",
}
WRONG = 1e-6  # relative error in float64 that no rounding explains
LAYERS = {"aten::convolution", "aten::_convolution", "aten::linear", "aten::addmm", "aten::mm"}
VIEWS = {
    "aten::_unsafe_view",
    "aten::alias",
    "aten::detach",
    "aten::reshape",
    "aten::squeeze",
    "aten::unsqueeze",
    "aten::view",
}
Row = dict[str, Any]


def models() -> dict[str, int]:
    """Return the size of the example image by `library/name`."""
    return {
        f"{library}/{name}": size
        for library, sizes in (("torchvision", TORCHVISION), ("timm", TIMM))
        for size, names in sizes.items()
        for name in names.split()
    }


def build(name: str, size: int) -> tuple[nn.Module, Any]:
    """Return the model with random batch norms, in evaluation, in float64, and its input."""
    torch.manual_seed(0)
    library, _, builder = name.partition("/")
    image = torch.randn(1, 3, size, size, dtype=torch.float64)
    inputs: Any = image
    if library == "timm":
        model = timm.create_model(builder, pretrained=False)
    else:
        options: dict[str, Any] = {}
        if "rcnn" in builder or builder.startswith(("retinanet", "fcos", "ssd")):
            # Random weights give scores near 1 / classes: without a threshold there are boxes.
            options = {"weights_backbone": None}
            options["box_score_thresh" if "rcnn" in builder else "score_thresh"] = 0.0
            if not builder.startswith("ssd"):
                options |= {"min_size": size, "max_size": size}
            inputs = ([image[0].sigmoid()],)
        elif builder.startswith(("fcn", "deeplabv3", "lraspp")):
            options = {"weights_backbone": None}
        elif builder in ("googlenet", "inception_v3"):
            options = {"init_weights": False}
        model = torchvision.models.get_model(builder, weights=None, **options)
        if builder.startswith("ssdlite"):  # its own initial weights are so small that scores tie
            for module in model.modules():
                if isinstance(module, nn.Conv2d):
                    nn.init.kaiming_normal_(module.weight)
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            for tensor, low, high in ((module.running_var, 0.5, 1.5), (module.weight, 0.5, 1.5)):
                if tensor is not None:
                    nn.init.uniform_(tensor, low, high)
            for tensor in (module.running_mean, module.bias):
                if tensor is not None:
                    nn.init.normal_(tensor, std=0.1)
    return model.eval().double(), inputs


class Calls(TorchDispatchMode):
    """Counts what runs, and follows the tensors that layers return to their consumers.

    Args:
        model: what will run, whose modules give the calls their names.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.layers = 0
        self.norms = 0
        self.consumers: Counter[int] = Counter()  # of what layer call n returned
        self.origins: dict[int, int] = {}  # layer call by id of what it returned, or a view of it
        self.after: list[tuple[int, str, str]] = []  # layer call, its module, the norm's module
        self.kept: list[Any] = []  # as long as a tensor lives, its id is its own
        self.where: list[str] = []
        self.names: dict[int, str] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        self.kept.append((args, output))
        name = func._schema.name
        if name in VIEWS:
            if id(args[0]) in self.origins:
                self.origins[id(output)] = self.origins[id(args[0])]
            return output
        where = self.where[-1] if self.where else ""
        if "batch_norm" in name and not self._of_batch(func, args):
            self.norms += 1
            if (call := self.origins.get(id(args[0]))) is not None:
                self.after.append((call, self.names[call], where))
        for tensor in tree_leaves((args, kwargs)):
            if isinstance(tensor, Tensor) and (call := self.origins.get(id(tensor))) is not None:
                self.consumers[call] += 1
        if func._schema.is_mutable:
            self.origins.pop(id(args[0]), None)
        if name in LAYERS:
            self.origins[id(output)] = self.layers
            self.names[self.layers] = where
            self.layers += 1
        return output

    @staticmethod
    def _of_batch(func: Any, args: tuple[Any, ...]) -> bool:
        """Return whether it takes its input's statistics: instance norm, standardized weights."""
        names = [a.name for a in func._schema.arguments]
        return any(n in ("training", "train") and a for n, a in zip(names, args, strict=False))

    def run(self, inputs: Any) -> list[Tensor]:
        """Run the model; return all tensors of its output."""
        handles = []
        for name, module in self.model.named_modules():
            label = f"{name} ({type(module).__name__})"
            enter = lambda *_, label=label: self.where.append(label)
            leave = lambda *_: self.where.pop() and None
            handles += [
                module.register_forward_pre_hook(enter),
                module.register_forward_hook(leave),
            ]
        try:
            with torch.no_grad(), self:
                output = self.model(*(inputs if isinstance(inputs, tuple) else (inputs,)))
        finally:
            for handle in handles:
                handle.remove()
        tensors = list(leaves(output))
        for tensor in tensors:
            if (call := self.origins.get(id(tensor))) is not None:
                self.consumers[call] += 1
        return tensors

    def foldable(self) -> list[tuple[str, str]]:
        """Return the modules of each foldable call: of the layer, of the norm."""
        return [(layer, norm) for n, layer, norm in self.after if self.consumers[n] == 1]


def leaves(output: Any) -> Iterator[Tensor]:
    """Yield the tensors in nested lists, tuples, dicts and dataclasses."""
    for leaf in tree_leaves(output):
        if isinstance(leaf, Tensor):
            yield leaf
        elif is_dataclass(leaf):
            for entry in fields(leaf):
                yield from leaves(getattr(leaf, entry.name))


def relative_error(expected: list[Tensor], actual: list[Tensor]) -> float:
    """Return the largest `max |a - b| / max |a|` of the pairs; infinite if shapes differ."""
    if [t.shape for t in expected] != [t.shape for t in actual]:
        return float("inf")
    errors = [0.0]
    for a, b in zip(expected, actual, strict=True):
        if a.numel():
            scale, difference = a.double().abs().max(), (a.double() - b.double()).abs().max()
            error = float(difference / scale if scale > 0 else difference)
            errors.append(error if error == error else float("inf"))
    return max(errors)


def method_of(method: str, inputs: Any) -> Callable[[nn.Module], tuple[nn.Module, dict[str, str]]]:
    """Return a function from a model to its fold and the reasons, by name, for what it left."""
    if method == "timm":
        return lambda model: (reparameterize_model(model), {})
    if method == "fx":
        return lambda model: (fuse(model), {})
    name = "reparameterize" if method == "modules" else "reparameterize_graph"
    fold: Any = getattr(repnet, name)

    def run(model: nn.Module) -> tuple[nn.Module, dict[str, str]]:
        folded, report = fold(model, inputs, return_report=True)
        return folded, dict(getattr(report, "skipped", {}))

    return run


def available(methods: list[str]) -> list[str]:
    return [m for m in methods if m != "graph" or hasattr(repnet, "reparameterize_graph")]


def measure(name: str, size: int, method: str, connection: Connection) -> None:
    """Send what the model does before, then what the method makes of it."""
    warnings.simplefilter("ignore")
    try:
        model, inputs = build(name, size)
        calls = Calls(model)
        expected = [t.clone() for t in calls.run(inputs)]
    except Exception as error:
        connection.send({"error": f"the model: {one_line(error)}"})
        return
    connection.send(
        {
            "norms": calls.norms,
            "layers": calls.layers,
            "foldable": len(calls.foldable()),
            "parameters": sum(p.numel() for p in model.parameters()),
        }
    )
    del calls
    connection.send(outcome(method, model, inputs, expected))


def outcome(method: str, model: nn.Module, inputs: Any, expected: list[Tensor]) -> Row:
    start = time.perf_counter()
    stage = ""
    try:
        folded, reasons = method_of(method, inputs)(model)
        seconds = time.perf_counter() - start
        stage = "its result, when run: "
        calls = Calls(folded.eval())
        actual = calls.run(inputs)
    except Exception as error:
        return {"error": stage + one_line(error), "seconds": time.perf_counter() - start}
    return {
        "norms_after": calls.norms,
        "layers_after": calls.layers,
        "foldable_after": len(calls.foldable()),
        "parameters_after": sum(p.numel() for p in folded.parameters()),
        "relative_error": relative_error(expected, actual),
        "seconds": seconds,
        "remaining": [
            {"layer": layer, "norm": norm, "reason": reason_of(norm, reasons)}
            for layer, norm in calls.foldable()
        ],
    }


def reason_of(where: str, reasons: dict[str, str]) -> str:
    """Return the reason for the module itself, else for the nearest module around it."""
    name = where.partition(" ")[0]
    while name and name not in reasons:
        name = name.rpartition(".")[0]
    return reasons.get(name, "")


def one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]


def run_all(work: list[tuple[str, int, str]], jobs: int, timeout: float) -> Iterator[Row]:
    """Yield rows as they come, each from a fork of this process: a crash costs one row."""
    context = multiprocessing.get_context("fork")
    pending = list(reversed(work))
    running: dict[Connection, tuple[Any, Row, float]] = {}
    while pending or running:
        while pending and len(running) < jobs:
            name, size, method = pending.pop()
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(target=measure, args=(name, size, method, sender))
            process.start()
            sender.close()
            row = {"model": name, "size": size, "method": method}
            running[receiver] = (process, row, time.monotonic() + timeout)
        for connection in wait(list(running), timeout=1):
            assert isinstance(connection, Connection)
            process, row, deadline = running[connection]
            try:
                row |= connection.recv()
            except EOFError:
                process.join()
                del running[connection]
                if "error" not in row and "seconds" not in row:
                    late = time.monotonic() > deadline
                    row["error"] = (
                        f"not done after {timeout:.0f} s"
                        if late
                        else f"the process ended with code {process.exitcode}"
                    )
                yield row
        for process, _, deadline in running.values():
            if time.monotonic() > deadline:
                process.terminate()


def totals(rows: list[Row], methods: list[str]) -> tuple[list[str], list[list[str]]]:
    """Return the header and one line per method."""
    header = ["method", "models", "raised", "BN calls", "removed", "foldable left", "complete"]
    header += ["no BN left", "worst error", "wrong", "larger", "seconds"]
    lines = []
    for method in methods:
        own = [r for r in rows if r["method"] == method and r.get("norms")]
        if not own:
            lines.append([TITLES[method], *["n/a"] * (len(header) - 1)])
            continue
        done = [r for r in own if "error" not in r]
        before = sum(r["norms"] for r in own)
        removed = sum(r["norms"] - r["norms_after"] for r in done)
        left = sum(r["foldable_after"] for r in done)
        left += sum(r["foldable"] for r in own if "error" in r)
        finite = [r["relative_error"] for r in done if r["relative_error"] <= WRONG]
        lines.append(
            [
                TITLES[method],
                str(len(own)),
                str(len(own) - len(done)),
                f"{before:,}",
                f"{removed / before:.1%}",
                f"{left:,}",
                str(sum(r["foldable_after"] == 0 for r in done)),
                str(sum(r["norms_after"] == 0 for r in done)),
                f"{max(finite, default=0):.1e}",
                str(len(done) - len(finite)),
                str(sum(r["parameters_after"] > r["parameters"] for r in done)),
                f"{sum(r.get('seconds', 0) for r in own):.0f}",
            ]
        )
    return header, lines


def by_model(rows: list[Row], methods: list[str]) -> tuple[list[str], list[list[str]]]:
    """Return the header and one line per model."""
    header = ["model", "size", "BN", "foldable", "layers", *methods]
    lines = []
    for name in dict.fromkeys(r["model"] for r in rows):
        own = {r["method"]: r for r in rows if r["model"] == name}
        first = next(iter(own.values()))
        line = [name, *(str(first.get(key, "")) for key in ("size", "norms", "foldable", "layers"))]
        lines.append(line + [cell(own.get(method)) for method in methods])
    return header, lines


def cell(row: Row | None) -> str:
    if row is None:
        return "n/a"
    if "error" in row:
        return f"raises: {row['error'][:60]}"
    mark = "complete" if row["foldable_after"] == 0 else f"{row['foldable_after']} foldable"
    if not row["relative_error"] <= WRONG:
        mark += ", WRONG"
    if row["parameters_after"] > row["parameters"]:
        mark += ", LARGER"
    return (
        f"{row['norms_after']}, {mark}, {row['layers_after']}, "
        f"{row['relative_error']:.0e}, {row['seconds']:.1f} s"
    )


def environment() -> str:
    return (
        f"torch {torch.__version__}, torchvision {torchvision.__version__}, timm "
        f"{timm.__version__}, repnet {repnet.__version__}, {platform.machine()} CPU, one thread a "
        "model, batch of 1, float64"
    )


def markdown(rows: list[Row], methods: list[str]) -> str:
    parts = [
        "# What is folded of other people's convnets",
        f"Written by `python benchmarks/fold_coverage.py --markdown`: {environment()}.",
        *(p.replace("\n", " ") for p in (__doc__ or "").split("\n\n")[2:]),
    ]
    for title, (header, lines) in (
        ("Totals", totals(rows, methods)),
        ("Models", by_model(rows, methods)),
    ):
        cells = [header, ["---"] * len(header), *lines]
        text = "\n".join(
            "| " + " | ".join(c.replace("|", "\\|") for c in line) + " |" for line in cells
        )
        parts += [f"## {title}", text]
    return "\n\n".join(p.strip() for p in parts) + "\n"


def print_table(console: Console, title: str, content: tuple[list[str], list[list[str]]]) -> None:
    header, lines = content
    table = Table(*header, title=title)
    for line in lines:
        table.add_row(*line)
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="*", metavar="PATTERN", help="of 'library/name'")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument(
        "--timeout",
        type=float,
        default=300,
        help="seconds for one fold of one model, with building it",
    )
    parser.add_argument("--json", type=Path, metavar="OUT", help="rows as JSON lines, as they come")
    parser.add_argument("--resume", action="store_true", help="keep the rows that OUT holds")
    parser.add_argument("--markdown", type=Path, metavar="OUT", help="the tables as a page")
    arguments = parser.parse_args()
    if arguments.resume and not arguments.json:
        parser.error("--resume continues a file: name it with --json")
    torch.set_num_threads(1)  # a process with threads could not fork
    import_module("repnet.folding")  # once, not in every fork
    rows: list[Row] = []
    if arguments.resume and arguments.json.exists():
        rows = [json.loads(line) for line in arguments.json.read_text().splitlines()]
    elif arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text("")
    done = {(r["model"], r["method"]) for r in rows}
    work = [
        (name, size, method)
        for name, size in models().items()
        for method in available(arguments.methods)
        if fnmatch(name, arguments.only) and (name, method) not in done
    ]
    console = Console()
    if not console.is_terminal:
        console = Console(width=220)
    with Progress(console=console) as progress:
        task = progress.add_task("folding", total=len(work))
        for row in run_all(work, arguments.jobs, arguments.timeout):
            rows.append(row)
            progress.update(task, advance=1, description=row["model"])
            if arguments.json:
                with arguments.json.open("a") as file:
                    file.write(json.dumps(row) + "\n")
    order = {name: n for n, name in enumerate(models())}
    rows = sorted(
        (r for r in rows if fnmatch(r["model"], arguments.only) and r["model"] in order),
        key=lambda r: order[r["model"]],
    )
    print_table(console, "Models", by_model(rows, arguments.methods))
    print_table(console, "Totals", totals(rows, arguments.methods))
    console.print(environment())
    if arguments.markdown:
        arguments.markdown.parent.mkdir(parents=True, exist_ok=True)
        arguments.markdown.write_text(markdown(rows, arguments.methods))


if __name__ == "__main__":
    main()
