"""Images per second of both forms of a named model, beside timm's folded twin, taking turns.

    python benchmarks/throughput.py repvgg_a0 repvgg_b1 mobileone_s0 --dtype bfloat16 --compile

Also checks that the model folds on its device, in its dtype and memory format, as exactly as it
does elsewhere. On a GPU the batch should fill it; on a CPU use a small one.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from importlib import import_module
from statistics import median

import torch
from fold import randomize
from torch import nn

from repnet import create_model, reparameterize


def timm_twin(name: str) -> nn.Module | None:
    """Return timm's model of the name, folded by timm, None without timm or without the model."""
    try:
        timm = import_module("timm")
    except ImportError:
        return None
    if name not in timm.list_models():
        return None
    fold = import_module("timm.utils.model").reparameterize_model
    return fold(randomize(timm.create_model(name)))


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("models", nargs="*", default=["repvgg_a0", "repvgg_b1", "mobileone_s0"])
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--size", type=int, default=224, help="pixels")
    parser.add_argument("--rounds", type=int, default=9, help="each times every form once")
    parser.add_argument("--steps", type=int, default=10, help="batches in each timing")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--channels-last", action="store_true")
    parser.add_argument("--compile", action="store_true")
    options = parser.parse_args()
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    layout = torch.channels_last if options.channels_last else torch.contiguous_format
    name_of_device = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    print(
        f"torch {torch.__version__}, {name_of_device}, {options.dtype}, {layout}, "
        f"batch {options.batch}, {options.size} px, {'compiled' if options.compile else 'eager'}, "
        f"median of {options.rounds} (smallest - largest)"
    )
    images = torch.randn(options.batch, 3, options.size, options.size)
    images = images.to(device, dtype).contiguous(memory_format=layout)
    for name in options.models:
        torch.manual_seed(0)
        model = randomize(create_model(name)).to(device, dtype).to(memory_format=layout)
        folded, report = reparameterize(model, images[:2], return_report=True)
        assert report.proof is not None
        worst = max(block.relative_error for block in report.proof.blocks)
        weights = {(p.device.type, p.dtype) for p in folded.parameters()}
        assert weights == {(device.type, dtype)}
        print(f"{name}: {len(report.folded)} convolutions, worst block {worst:.1e} in float64")
        forms: dict[str, Callable[..., object]] = {"train form": model, "deploy form": folded}
        if (twin := timm_twin(name)) is not None:
            forms["timm, folded"] = twin.eval().to(device, dtype).to(memory_format=layout)
        if options.compile:
            forms = {key: torch.compile(form) for key, form in forms.items()}
        rates: dict[str, list[float]] = {key: [] for key in forms}
        with torch.inference_mode():
            for form in forms.values():  # to warm up, and to compile
                for _ in range(3):
                    form(images)
            for _ in range(options.rounds):
                for key, form in forms.items():
                    synchronize(device)
                    start = time.perf_counter()
                    for _ in range(options.steps):
                        form(images)
                    synchronize(device)
                    seconds = time.perf_counter() - start
                    rates[key].append(options.batch * options.steps / seconds)
        for key, values in rates.items():
            spread = f"({min(values):,.0f} - {max(values):,.0f})"
            ratio = median(values) / median(rates["train form"])
            print(
                f"  {key:14s} {median(values):9,.0f} images/s {spread:22s} {ratio:.2f} x train form"
            )


if __name__ == "__main__":
    main()
