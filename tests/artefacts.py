"""Deploy artefacts for tests: a small folded network with random statistics, and what it needs."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from repnet import create_model, reparameterize, save_deployed
from repnet.deploy.formats import format_named
from repnet.files import sha256
from tests.models import randomize_batch_norm

COLORS = {
    "input_shape": [3, 16, 16],
    "mean": [0.4, 0.5, 0.6],
    "std": [0.2, 0.25, 0.3],
    "class_names": ["cat", "dog", "[red]fox", "gnu"],
    "resize": 20,
}
GRAY = {
    "input_shape": [1, 8, 8],
    "mean": [0.3],
    "std": [0.4],
    "class_names": ["zero", "one", "two"],
}


def write_artefact(
    directory: Path,
    data: dict[str, Any] = COLORS,
    *,
    formats: Sequence[str] = (),
    preprocess: bool = False,
    report: dict[str, Any] | None = None,
    **entries: Any,
) -> nn.Module:
    """Write a network for `data` to `directory` and return it.

    Args:
        directory: made.
        data: of `model.json`.
        formats: to export to as well.
        preprocess: whether the exported files take uint8 images.
        report: of `report.json`, beside a page.
        **entries: of `save_deployed`.
    """
    shape = data["input_shape"]
    model = randomize_batch_norm(
        create_model(
            "repvgg_tiny", num_classes=len(data["class_names"]), in_channels=shape[0],
            widths=[0.125] * 4,
        )
    )  # fmt: skip
    folded = reparameterize(model, torch.randn(2, *shape)).eval()
    with torch.no_grad():
        folded.head.weight.mul_(20)  # else all classes are about as likely
        folded.head.bias.sub_(folded(torch.randn(16, *shape)).mean(0))  # not one class for all
    directory.mkdir(parents=True, exist_ok=True)
    exported: nn.Module = folded
    example: Tensor = torch.zeros(2, *shape)
    if preprocess:
        from repnet.deploy.preprocess import Preprocessed

        size, resize = (shape[1], shape[2]), data.get("resize")
        exported = Preprocessed(
            folded, mean=data["mean"], std=data["std"], size=size, resize=resize
        ).eval()
        side = (resize, resize) if resize else size
        example = torch.zeros(2, shape[0], *side, dtype=torch.uint8)
    exports = []
    for name in formats:
        chosen = format_named(name)
        path = directory / chosen.file_name()
        chosen.export(exported, example, path)
        exports.append(
            {
                "format": name,
                "precision": "fp32",
                "file": path.name,
                "files": [file.name for file in chosen.files(path)],
                "preprocess": preprocess,
            }
        )
    reports = ["report.json", "report.html"] if report else []
    if report:
        (directory / "report.json").write_text(json.dumps(report))
        (directory / "report.html").write_text("<h1>Verified</h1>")
    save_deployed(folded, directory, data=data, exports=exports, reports=reports, **entries)
    return folded


def rewrite(directory: Path, name: str, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change a JSON file of an artefact, as one who knows of the hashes."""
    contents = json.loads((directory / name).read_text())
    change(contents)
    if name == "model.json":
        contents.pop("sha256", None)
    (directory / name).write_text(json.dumps(contents))
    if name != "model.json":
        digest = sha256(directory / name)
        rewrite(directory, "model.json", lambda m: m["hashes"].update({name: digest}))
