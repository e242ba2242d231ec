"""How much of other people's convnets is folded, and how exactly, beside timm's and torch.fx's.

    python benchmarks/fold_coverage.py --jobs 2 --markdown docs/fold_coverage.md

Each model gets random batch norm statistics, evaluation mode and float64, and is folded by each
method in a process of its own. What is counted is what runs: calls of batch norm on a feature map,
and of convolution and linear layers. A call of batch norm is "foldable" if it alone consumes what a
convolution or linear layer returned; a fold is complete if it leaves no such call. Errors are
those of the outputs on the example, and on a batch of two other images, 32 pixels larger where the
model takes that. Seconds are those of the fold, for repnet with its proof, on whatever else the
machine does.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import platform
import re
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from fnmatch import fnmatch
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
TITLES = {
    "default": "repnet.reparameterize",
    "graph": "repnet.reparameterize_graph",
    "timm": "timm reparameterize_model",
    "fx": "torch.fx fuse",
}
WRONG = 1e-6  # relative error in float64 that no rounding explains
SOURCES = {  # of a norm's input; other operators go by their own names
    operator: text
    for text, operators in {
        "an activation": "relu silu gelu hardswish hardtanh leaky_relu elu sigmoid tanh mish",
        "a pooling": "max_pool2d_with_indices avg_pool2d _adaptive_avg_pool2d",
        "a sum": "add sub",
        "a concatenation": "cat",
        "a product": "mul",
        "a norm": "native_batch_norm _native_batch_norm_legit_no_training",
    }.items()
    for operator in operators.split()
}
LAYERS = {"convolution", "_convolution", "linear", "addmm", "mm"}
VIEWS = {"_unsafe_view", "alias", "detach", "reshape", "squeeze", "unsqueeze", "view"}
Row = dict[str, Any]
Content = tuple[list[str], list[list[str]]]


def models() -> dict[str, int]:
    """Return the size of the example image by `library/name`."""
    return {
        f"{library}/{name}": size
        for library, sizes in (("torchvision", TORCHVISION), ("timm", TIMM))
        for size, names in sizes.items()
        for name in names.split()
    }


def build(name: str, size: int) -> tuple[nn.Module, Any, dict[str, Any]]:
    """Return the model, random and in float64, its example, and others to try, by description."""
    torch.manual_seed(0)
    library, _, builder = name.partition("/")
    inputs: Any = torch.randn(1, 3, size, size, dtype=torch.float64)
    sides = (size + 32, size)
    others: dict[str, Any] = {f"2 x {n} px": torch.randn(2, 3, n, n).double() for n in sides}
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
            inputs = ([inputs[0].sigmoid()],)
            others = {key: (list(images.sigmoid()),) for key, images in others.items()}
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
    return model.eval().double(), inputs, others


class Calls(TorchDispatchMode):
    """Counts what runs, and follows the tensors that layers return to their consumers.

    Args:
        model: what will run, whose modules give the calls their names.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.layers = 0
        self.consumers: Counter[int] = Counter()  # of what layer call n returned
        self.origins: dict[int, int] = {}  # layer call by id of what it returned, or a view of it
        self.sources: dict[int, str] = {}  # operator by id of what it returned, or a view of it
        self.inputs: list[tuple[str, int | None, str]] = []  # of norms: source, layer call, module
        self.kept: list[Any] = []  # as long as a tensor lives, its id is its own
        self.where: list[str] = []
        self.names: dict[int, str] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        self.kept.append((args, output))
        name = func._schema.name.partition("::")[2]
        if name in VIEWS:
            self.sources[id(output)] = self.sources.get(id(args[0]), "an input")
            if id(args[0]) in self.origins:
                self.origins[id(output)] = self.origins[id(args[0])]
            return output
        where = self.where[-1] if self.where else ""
        if "batch_norm" in name and not self._of_batch(func, args):
            source, call = self.sources.get(id(args[0]), "an input"), self.origins.get(id(args[0]))
            self.inputs.append((source, call, where))
        given = tensors_of((args, kwargs))
        self.consumers.update(self.origins[id(t)] for t in given if id(t) in self.origins)
        if func._schema.is_mutable:
            self.origins.pop(id(args[0]), None)
        for tensor in tree_leaves(output):
            self.sources[id(tensor)] = SOURCES.get(name.rstrip("_"), name)
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
            handles.append(module.register_forward_pre_hook(enter))
            handles.append(module.register_forward_hook(lambda *_: self.where.pop() and None))
        try:
            with torch.no_grad(), self:
                output = self.model(*(inputs if isinstance(inputs, tuple) else (inputs,)))
        finally:
            for handle in handles:
                handle.remove()
        tensors = tensors_of(output)
        self.consumers.update(self.origins[id(t)] for t in tensors if id(t) in self.origins)
        return tensors

    def norms(self, reasons: dict[str, str]) -> list[Row]:
        """Return the calls of batch norm: what is before them, and why they are there."""
        rows = []
        for source, call, norm in self.inputs:
            foldable = call is not None and self.consumers[call] == 1
            if call is not None:
                source = "a layer" if foldable else "a layer with other users"
            layer = "" if call is None else self.names[call]
            row = {"norm": norm, "input": source, "layer": layer, "foldable": foldable}
            rows.append(row | {"reason": reason_of(norm, reasons)})
        return rows


def tensors_of(output: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]


def relative_error(expected: list[Tensor], actual: list[Tensor]) -> float:
    """Return the largest `max |a - b| / max |a|` of the pairs; infinite if shapes differ."""
    if [t.shape for t in expected] != [t.shape for t in actual]:
        return float("inf")
    pairs = [(a.double(), b.double()) for a, b in zip(expected, actual, strict=True) if a.numel()]
    errors = [float((a - b).abs().max() / (a.abs().max() or 1)) for a, b in pairs]
    return max((e if e == e else float("inf") for e in errors), default=0.0)


def fold(method: str, model: nn.Module, inputs: Any) -> tuple[nn.Module, dict[str, str]]:
    """Return the folded model and the reasons, by name, for what is left."""
    if method == "timm":
        return reparameterize_model(model), {}
    if method == "fx":
        return fuse(model), {}
    call = repnet.reparameterize if method == "default" else repnet.reparameterize_graph
    folded, report = call(model, inputs, return_report=True)
    return folded, report.skipped


def measure(name: str, size: int, method: str, connection: Connection) -> None:
    """Send what the model does before, then what the method makes of it."""
    warnings.simplefilter("ignore")
    try:
        model, inputs, others = build(name, size)
        calls = Calls(model)
        expected = [t.clone() for t in calls.run(inputs)]
    except Exception as error:
        connection.send({"error": f"the model: {one_line(error)}"})
        return
    norms = calls.norms({})
    row: Row = {
        "norms": len(norms),
        "layers": calls.layers,
        "foldable": sum(bool(n["foldable"]) for n in norms),
        "parameters": sum(p.numel() for p in model.parameters()),
    }
    del calls
    checks = {"relative_error": (inputs, expected)}
    for row["other"], other in others.items():
        with suppress(Exception):
            checks["other_error"] = other, [t.clone() for t in Calls(model).run(other)]
            break
    else:
        row["other"] = "n/a"
    connection.send(row)
    connection.send(outcome(method, model, checks))


def outcome(method: str, model: nn.Module, checks: dict[str, tuple[Any, list[Tensor]]]) -> Row:
    """Return what a method makes of the model; checks are inputs and what it returned there."""
    start = time.perf_counter()
    row: Row = {}
    try:
        folded, reasons = fold(method, model, checks["relative_error"][0])
        row["seconds"] = time.perf_counter() - start
        for key, (inputs, expected) in checks.items():
            calls = Calls(folded.eval())
            row[key] = relative_error(expected, calls.run(inputs))
            if key == "relative_error":
                norms, layers = calls.norms(reasons), calls.layers
    except Exception as error:
        if "relative_error" not in row:
            return {"seconds": time.perf_counter() - start, "error": one_line(error)}
        row["other_refused"] = one_line(error)
    return row | {
        "norms_after": len(norms),
        "layers_after": layers,
        "foldable_after": sum(n["foldable"] for n in norms),
        "parameters_after": sum(p.numel() for p in folded.parameters()),
        "remaining": norms,
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
                    row["error"] = f"the process ended with code {process.exitcode}"
                    if time.monotonic() > deadline:
                        row["error"] = f"not done after {timeout:.0f} s"
                yield row
        for process, _, deadline in running.values():
            if time.monotonic() > deadline:
                process.terminate()


def worst(row: Row) -> float:
    return max(row["relative_error"], row.get("other_error", 0.0))


def totals(rows: list[Row], methods: list[str]) -> Content:
    """Return the header and one line per method."""
    lines: list[dict[str, str]] = []
    for method in methods:
        own = [r for r in rows if r["method"] == method and r.get("norms")]
        done = [r for r in own if "error" not in r]
        norms, layers = (sum(r[key] for r in own) for key in ("norms", "layers"))
        removed = sum(r["norms"] - r["norms_after"] for r in done)
        merged = sum(r["layers"] - r["layers_after"] for r in done)
        right = [worst(r) for r in done if worst(r) <= WRONG]
        line = {
            "method": TITLES[method],
            "models": len(own),
            "raised": len(own) - len(done),
            "BN calls": f"{norms:,}",
            "removed": f"{removed / max(norms, 1):.1%}",
            "foldable left": sum(r["foldable" if "error" in r else "foldable_after"] for r in own),
            "layers": f"{layers:,}",
            "left": f"{layers - merged:,}",
            "complete": sum(r["foldable_after"] == 0 for r in done),
            "no BN left": sum(r["norms_after"] == 0 for r in done),
            "worst error": f"{max(right, default=0):.1e}",
            "wrong": len(done) - len(right),
            "refuse another input": sum("other_refused" in r for r in done),
            "larger": sum(r["parameters_after"] > r["parameters"] for r in done),
            "seconds": f"{sum(r.get('seconds', 0) for r in own):.0f}",
        }
        lines.append({key: str(value) for key, value in line.items()})
    return list(lines[0]), [list(line.values()) for line in lines]


def by_reason(rows: list[Row]) -> Content:
    """Return the header and one line per kind of batch norm that a method of repnet left."""
    header = ["method", "BN calls", "models", "the norm's input is", "reason", "for example"]
    groups: dict[tuple[str, str, str], list[str]] = {}
    for row in rows:
        for left in row.get("remaining", []) if row["method"] in ("default", "graph") else []:
            reason = re.sub(r"'[^']*'|\d[\d,]*", "#", left["reason"])
            key = (row["method"], left["input"], reason)
            groups.setdefault(key, []).append(f"{row['model']} {left['norm']}")
    lines = [
        [TITLES[m], f"{len(g):,}", str(len({e.split()[0] for e in g})), source, reason, g[0]]
        for (m, source, reason), g in groups.items()
    ]
    return header, sorted(lines, key=lambda line: (line[0], -int(line[1].replace(",", ""))))


def by_model(rows: list[Row], methods: list[str]) -> Content:
    """Return the header and one line per model."""
    header = ["model", "size", "BN", "foldable", "layers", "other size and batch", *methods]
    lines, keys = [], ("size", "norms", "foldable", "layers", "other")
    for name in dict.fromkeys(r["model"] for r in rows):
        own = {r["method"]: r for r in rows if r["model"] == name}
        first = next(iter(own.values()))
        line = [name, *(str(first.get(key, "")) for key in keys)]
        lines.append(line + [cell(own.get(method)) for method in methods])
    return header, lines


def cell(row: Row | None) -> str:
    if row is None:
        return "n/a"
    if "error" in row:
        return f"raises: {row['error'][:60]}"
    mark = f"{row['foldable_after']} foldable" if row["foldable_after"] else "complete"
    if not worst(row) <= WRONG:
        mark += ", WRONG"
    if row["parameters_after"] > row["parameters"]:
        mark += ", LARGER"
    other = f"{row['other_error']:.0e}" if "other_error" in row else "n/a"
    return (
        f"{row['norms_after']}, {mark}, {row['layers_after']}, {row['relative_error']:.0e}, other "
        f"{'refused' if 'other_refused' in row else other}, {row['seconds']:.1f} s"
    )


def environment() -> str:
    return (
        f"torch {torch.__version__}, torchvision {torchvision.__version__}, timm "
        f"{timm.__version__}, repnet {repnet.__version__}, {platform.machine()} CPU, one thread a "
        "model, example batch of 1, float64"
    )


def markdown(content: dict[str, Content]) -> str:
    parts = [
        "# What is folded of other people's convnets",
        f"Written by `python benchmarks/fold_coverage.py --markdown`: {environment()}.",
        *(p.replace("\n", " ") for p in (__doc__ or "").split("\n\n")[2:]),
    ]
    for title, (header, lines) in content.items():
        cells = [[c.replace("|", "\\|") for c in line] for line in lines]
        text = [f"| {' | '.join(line)} |" for line in [header, ["---"] * len(header), *cells]]
        parts += [f"## {title}", "\n".join(text)]
    return "\n\n".join(p.strip() for p in parts) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="*", metavar="PATTERN", help="of 'library/name'")
    parser.add_argument("--methods", nargs="+", choices=TITLES, default=list(TITLES))
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--timeout", type=float, default=300, help="seconds for one fold")
    parser.add_argument("--json", type=Path, metavar="OUT", help="rows as JSON lines, as they come")
    parser.add_argument("--resume", action="store_true", help="keep the rows that OUT holds")
    parser.add_argument("--markdown", type=Path, metavar="OUT", help="the tables as a page")
    arguments = parser.parse_args()
    if arguments.resume and not arguments.json:
        parser.error("--resume continues a file: name it with --json")
    torch.set_num_threads(1)  # a process with threads could not fork
    assert callable(repnet.reparameterize)  # which is imported once, not in every fork
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
        for method in arguments.methods
        if fnmatch(name, arguments.only) and (name, method) not in done
    ]
    console = Console(width=None if sys.stdout.isatty() else 220)
    with Progress(console=console) as progress:
        task = progress.add_task("folding", total=len(work))
        for row in run_all(work, arguments.jobs, arguments.timeout):
            rows.append(row)
            progress.update(task, advance=1, description=row["model"])
            if arguments.json:
                with arguments.json.open("a") as file:
                    file.write(json.dumps(row) + "\n")
    named = {name: [r for r in rows if r["model"] == name] for name in models()}
    rows = [r for name, own in named.items() if fnmatch(name, arguments.only) for r in own]
    content = {
        "Totals": totals(rows, arguments.methods),
        "Why norm calls are left": by_reason(rows),
        "Models": by_model(rows, arguments.methods),
    }
    for title, (header, lines) in reversed(content.items()):
        table = Table(*header, title=title)
        for line in lines:
            table.add_row(*line)
        console.print(table)
    console.print(environment())
    if arguments.markdown:
        arguments.markdown.parent.mkdir(parents=True, exist_ok=True)
        arguments.markdown.write_text(markdown(content))


if __name__ == "__main__":
    main()
