"""Exported files: written, run in their own runtime over the whole split, and judged."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from repnet import __version__
from repnet.data import ImageDataModule
from repnet.deploy.evaluation import Evaluation
from repnet.deploy.formats import ExportError, Format, Runner, format_named
from repnet.deploy.gate import Comparison, Gate, VerificationError
from repnet.deploy.latency import Latency
from repnet.deploy.preprocess import preprocessed
from repnet.deploy.settings import Settings
from repnet.errors import InputError
from repnet.files import sha256

if TYPE_CHECKING:
    from repnet.deploy.int8 import LayerSensitivity


_PIXELS = 50_000_000  # values of a batch of images in their full size
_OTHER_BATCHES = 32  # batches of which one image is run in a batch of another size as well


@dataclass
class Export:
    """One file that was asked for, and what became of it.

    Args:
        format: that writes and runs it.
        precision: of its arithmetic.
        path: of the file.
        status: `verified`, `refused` by a gate, `failed` to be written or run, or `skipped`.
        reason: why it is not verified.
        comparison: with the deploy form.
        runner: the file in its own runtime.
        latency: of a pass.
    """

    format: Format
    precision: str
    path: Path
    status: str = "skipped"
    reason: str | None = None
    comparison: Comparison | None = None
    runner: Runner | None = None
    latency: Latency | None = None

    @property
    def name(self) -> str:
        return f"{self.format.name} {self.precision}"

    def describe(self, top1: float, preprocess: bool) -> dict[str, Any]:
        """Return the entry of `report.json`; `top1` is that of the train form."""
        files = self.format.contents(self.path) if self.status == "verified" else []
        compared = self.comparison
        return {
            "format": self.format.name,
            "precision": self.precision,
            "file": self.path.name,
            "files": [file.relative_to(self.path.parent).as_posix() for file in files],
            "bytes": sum(file.stat().st_size for file in files) if files else None,
            "sha256": sha256(files[0]) if files else None,
            "preprocess": preprocess,
            "status": self.status,
            "verified": self.status == "verified",
            "reason": self.reason,
            "samples": compared and compared.samples,
            "agreement": compared and compared.agreement,
            "top1": compared and compared.top1,
            "drop": compared and top1 - compared.top1,
            "logit_difference": compared and compared.difference,
            "batch_difference": compared and compared.other_batch,
            "changed": compared and compared.samples - compared.agreeing,
            "ties": compared and compared.ties,
            "latency_ms": self.latency and self.latency.median,
            "latency": self.latency and asdict(self.latency),
        }


class Exporting:
    """Makes the files that the settings ask for, and finds out whether they may be shipped.

    Args:
        model: in deploy form, on the CPU, in evaluation mode.
        data: set up; its images are what the files are run on.
        evaluation: of both forms over the same split.
        settings: of the deployment.
        directory: where the files go.
        progress: wraps batches, given with a description.
    """

    def __init__(
        self,
        model: nn.Module,
        data: ImageDataModule,
        evaluation: Evaluation,
        settings: Settings,
        directory: Path,
        progress: Callable[[Iterable[Any], str], Iterable[Any]] = lambda batches, _: batches,
    ) -> None:
        self.progress = progress
        self.folded, self.data, self.evaluation = model, data, evaluation
        self.settings, self.directory = settings, directory
        self.top1 = evaluation.metrics["train_form"]["top1"]
        self.scale = evaluation.max_logit
        self.model: nn.Module = model
        channels, height, width = data.input_shape
        self.example = torch.zeros(2, channels, height, width)
        if settings.preprocess:
            self.model = preprocessed(model, data).eval()
            resize = self.model.resize
            side = (resize, resize) if resize else (height, width)
            self.example = torch.zeros(2, channels, *side, dtype=torch.uint8)
        self.int8: dict[str, Any] | None = None  # of the report
        self.calibration: tuple[Tensor, list[LayerSensitivity]] | None = None

    def run(self) -> list[Export]:
        """Return all exports with their verdicts; a failure of one does not stop the others."""
        exports = [
            self._write(format_named(name), precision)
            for name, precisions in self.settings.exports.items()
            for precision in precisions
            if precision != "int8"
        ]
        self._compare([export for export in exports if export.runner is not None])
        for name, precisions in self.settings.exports.items():
            if "int8" in precisions:
                exports.append(self._quantize(format_named(name)))
        return exports

    def _new(self, format: Format, precision: str) -> Export:
        return Export(format, precision, self.directory / format.file_name(precision))

    def _write(self, format: Format, precision: str) -> Export:
        export = self._new(format, precision)
        if reason := format.skip_reason():
            export.reason = reason
            return export
        try:
            format.export(
                self.model,
                self.example,
                export.path,
                precision=precision,
                metadata=self._metadata(),
            )
            export.runner = format.load(export.path, precision=precision)
        except Exception as error:  # whatever another library makes of a network
            self._fail(export, error)
        return export

    def _fail(self, export: Export, error: Exception) -> None:
        text = str(error).strip().replace(f"{self.directory}{os.sep}", "")
        line = text.splitlines()[0] if text else ""
        known = isinstance(error, ExportError | InputError) and line
        export.status, export.reason = (
            "failed",
            line if known else f"{type(error).__name__}: {line}",
        )

    def _compare(self, exports: Sequence[Export]) -> None:
        """Run the files over the split, all with the same batches."""
        if not exports:
            return
        for export in exports:
            export.comparison = Comparison(self._gate(export.precision), self.scale)
        running = list(exports)
        names = ", ".join(export.name for export in exports)
        batches = self.progress(self._batches(), names)
        for number, (images, labels, expected) in enumerate(batches):
            if not running:
                break
            for export in list(running):
                assert export.runner is not None
                assert export.comparison is not None
                try:
                    logits = export.runner(images)
                    export.comparison.add(logits, expected, labels)
                    if number < _OTHER_BATCHES and export.comparison.finite:
                        self._run_in_another_batch(export, images, logits)
                except VerificationError as error:
                    export.status, export.reason = "refused", str(error)
                    running.remove(export)
                except Exception as error:  # of a foreign runtime
                    self._fail(export, error)
                    running.remove(export)
        for export in running:
            assert export.comparison is not None
            export.reason = export.comparison.refusal(self.evaluation.samples, self.top1)
            export.status = "refused" if export.reason else "verified"

    def _run_in_another_batch(self, export: Export, images: Tensor, logits: Tensor) -> None:
        """Run the first image alone, or twice: a runtime may compile other code for it.

        Raises:
            VerificationError: its logits are not those that it had in its batch.
        """
        assert export.runner is not None
        assert export.comparison is not None
        images, how = (
            (images[:1], "alone") if len(images) > 1 else (images.repeat(2, 1, 1, 1), "twice")
        )
        again = export.runner(images)
        if again.shape != (len(images), *logits.shape[1:]):
            raise VerificationError(f"it returns {tuple(again.shape)} for an image {how}")
        export.comparison.add_other_batch(again[0], logits[0], how)

    def _gate(self, precision: str) -> Gate:
        settings = self.settings
        if precision == "fp32":
            return Gate(settings.export_tolerance, 0.0, 1.0)
        if precision == "int8":
            return Gate(float("inf"), settings.int8.max_drop, settings.int8.min_agreement)
        return Gate(float("inf"), settings.export_max_drop, settings.export_min_agreement)

    def _batches(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield images as the files take them, labels, and the deploy form's logits."""
        expected = torch.cat(self.evaluation.logits)
        labels = torch.cat(self.evaluation.labels)
        done = 0
        for images in self._images():
            end = done + len(images)
            yield images, labels[done:end], expected[done:end]
            done = end

    def _images(self) -> Iterable[Tensor]:
        if not self.settings.preprocess:
            loader = self.data.evaluation_dataloader(self.settings.split_index)
            return (batch[0] for batch in loader)
        return self._pixels()

    def _pixels(self) -> Iterator[Tensor]:
        """Yield batches of the images as they are stored; one by one where their sizes differ."""
        assert self.data.splits is not None
        split: Any = self.data.splits[self.settings.split_index]
        corrupt = getattr(split, "corrupt", None)
        held: list[Tensor] = []
        for index in range(len(split)):
            if corrupt is not None and len(corrupt) and corrupt[index]:
                continue
            image = split.read(index)
            full = len(held) == self.data.batch_size or len(held) * image.numel() > _PIXELS
            if held and (full or held[0].shape != image.shape):
                yield torch.stack(held)
                held = []
            held.append(image)
        if held:
            yield torch.stack(held)

    def _quantize(self, format: Format) -> Export:
        from repnet.deploy.int8 import Attempt, quantize_until

        export = self._new(format, "int8")
        if reason := format.skip_reason():
            export.reason = reason
            return export
        source = self.directory / f"float{format.suffix}"
        tried: list[Attempt] = []
        try:
            if self.calibration is None:
                self.calibration = self._calibrate()
            images, layers = self.calibration
            format.export(self.model, self.example, source, metadata=self._metadata())

            def accept(path: Path) -> Attempt:
                export.comparison = None
                export.runner = format.load(path, precision="int8")
                self._compare([export])
                assert export.comparison is not None
                result = export.comparison
                drop, accepted = self.top1 - result.top1, export.status == "verified"
                return Attempt([], accepted, result.top1, drop, result.agreement)

            name = format.name
            for attempt in quantize_until(name, source, export.path, images, layers, accept):
                tried.append(attempt)
        except Exception as error:  # of a foreign library
            self._fail(export, error)
        finally:
            for file in format.files(source):
                file.unlink(missing_ok=True)
        if self.int8 is not None:
            kept = set(tried[-1].kept) if tried and export.status == "verified" else set()
            for layer in self.int8["layers"]:
                layer["kept_float"] |= layer["name"] in kept
            self.int8["attempts"][format.name] = [asdict(attempt) for attempt in tried]
        return export

    def _calibrate(self) -> tuple[Tensor, list[LayerSensitivity]]:
        """Return the calibration images, as the files take them, and what int8 does to layers."""
        from repnet.deploy.int8 import sensitivity

        options = self.settings.int8
        images, indices = self.data.calibration(options.samples, options.seed)
        layers = sensitivity(self.folded, images)
        joined = ",".join(str(index) for index in indices)
        self.int8 = {
            "samples": len(indices),
            "seed": options.seed,
            "split": "train",
            "indices_sha256": hashlib.sha256(joined.encode()).hexdigest(),
            "max_drop": options.max_drop,
            "layers": [asdict(layer) | {"kept_float": False} for layer in layers],
            "attempts": {},
        }
        return (self._calibration_pixels(indices) if self.settings.preprocess else images), layers

    def _calibration_pixels(self, indices: Sequence[int]) -> Tensor:
        """Return the calibration images as they are stored, in the size of the example."""
        from torchvision.transforms import v2

        assert self.data.splits is not None
        split: Any = self.data.splits[0]
        height, width = self.example.shape[-2:]
        steps = v2.Compose([v2.Resize(min(height, width)), v2.CenterCrop([height, width])])
        images = (split.read(index) for index in indices)
        same = (height, width)
        return torch.stack([i if tuple(i.shape[-2:]) == same else steps(i) for i in images])

    def _metadata(self) -> dict[str, str]:
        data = self.data
        return {
            "producer": f"repnet {__version__}",
            "class_names": json.dumps(data.class_names, ensure_ascii=False),
            "input_shape": json.dumps(list(data.input_shape)),
            "mean": json.dumps(data.mean),
            "std": json.dumps(data.std),
            "preprocess": json.dumps(self.settings.preprocess),
        }
