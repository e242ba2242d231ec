"""The model card of an artefact: `README.md`, with the header that the Hugging Face Hub reads."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml

from repnet import __version__
from repnet.deploy import description as descriptions
from repnet.deploy.description import REPORT, WEIGHTS, read_description
from repnet.deploy.formats import format_named
from repnet.deploy.report import claims
from repnet.deploy.staging import CARD
from repnet.errors import InputError
from repnet.files import write_text
from repnet.spec import unknown_name
from repnet.text import printable

# What the Hub knows as a license: https://huggingface.co/docs/hub/repositories-licenses
LICENSES = (
    *("afl-3.0", "agpl-3.0", "apache-2.0", "apple-amlr", "apple-ascl", "artistic-2.0"),
    *("bigcode-openrail-m", "bigscience-bloom-rail-1.0", "bigscience-openrail-m", "bsd"),
    *("bsd-2-clause", "bsd-3-clause", "bsd-3-clause-clear", "bsl-1.0", "c-uda", "cc", "cc-by-2.0"),
    *("cc-by-2.5", "cc-by-3.0", "cc-by-4.0", "cc-by-nc-2.0", "cc-by-nc-3.0", "cc-by-nc-4.0"),
    *("cc-by-nc-nd-3.0", "cc-by-nc-nd-4.0", "cc-by-nc-sa-2.0", "cc-by-nc-sa-3.0"),
    *("cc-by-nc-sa-4.0", "cc-by-nd-4.0", "cc-by-sa-3.0", "cc-by-sa-4.0", "cc0-1.0"),
    *("cdla-permissive-1.0", "cdla-permissive-2.0", "cdla-sharing-1.0", "creativeml-openrail-m"),
    *("deepfloyd-if-license", "ecl-2.0", "epl-1.0", "epl-2.0", "etalab-2.0", "eupl-1.1"),
    *("eupl-1.2", "fair-noncommercial-research-license", "gemma", "gfdl", "gpl", "gpl-2.0"),
    *("gpl-3.0", "h-research", "intel-research", "isc", "lgpl", "lgpl-2.1", "lgpl-3.0", "lgpl-lr"),
    *("llama2", "llama3", "llama3.1", "llama3.2", "llama3.3", "llama4", "lppl-1.3c", "mit"),
    *("mpl-2.0", "ms-pl", "ncsa", "odbl", "odc-by", "ofl-1.1", "openmdw-1.0", "openrail"),
    *("openrail++", "osl-3.0", "other", "pddl", "postgresql", "unknown", "unlicense", "wtfpl"),
    "zlib",
)


def write_model_card(
    directory: str | Path, *, repo_id: str = "OWNER/NAME", license: str | None = None
) -> Path:
    """Write the artefact's `README.md` from its description and report, and return its path.

    Args:
        directory: that `deploy.py` wrote.
        repo_id: that the card's examples load.
        license: one of `LICENSES`, the Hub's identifiers; None leaves it out.

    Raises:
        InputError: the artefact is not verified, its report is incomplete, or the Hub does not know
            the license.
    """
    directory = Path(directory)
    if license is not None and license not in LICENSES:
        raise InputError(unknown_name("license", license, LICENSES))
    description = read_description(directory)
    report = read_report(directory, description)
    try:
        text = _card(description, report, repo_id, license)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"'{directory / REPORT}' is incomplete: {error!r}") from error
    write_text(directory / CARD, text)
    return directory / CARD


def check_card(directory: Path, description: dict[str, Any]) -> None:
    """Refuse a card whose table of hashes is that of another artefact.

    Raises:
        InputError: it is.
    """
    text = (directory / CARD).read_text(encoding="utf-8", errors="replace")
    row = r"^\s*\|\s*(\S+)\s*\|\s*`?([0-9a-f]{64})`?\s*\|\s*$"
    for file, digest in re.findall(row, text, re.MULTILINE | re.IGNORECASE):
        if digest.lower() != description["hashes"].get(file, digest.lower()):
            raise InputError(
                f"'{CARD}' describes another artefact (it lists another hash of '{file}'); write "
                "it anew with python -m repnet.hub card --overwrite, or remove it"
            )


def read_report(directory: Path, description: dict[str, Any]) -> dict[str, Any]:
    """Return `report.json` of an artefact.

    Raises:
        InputError: it is missing or changed, or does not say that each file is verified.
    """
    path = directory / REPORT
    report = descriptions.read_report(directory, description)
    if report is None:
        raise InputError(
            f"'{directory}' has no {REPORT}, so that nobody verified it; make it with deploy.py"
        )
    if report.get("verified") is not True:
        raise InputError(f"'{path}' says that the model is not verified; deploy it again")
    try:
        verified = {export["file"] for export in _verified(report)}
        listed = [export["file"] for export in description.get("exports") or []]
    except (KeyError, TypeError) as error:
        raise InputError(f"'{directory}': its list of exports is malformed: {error!r}") from error
    for file in listed:
        if file not in verified:
            raise InputError(f"'{path}' does not say that '{file}' is verified; deploy it again")
    return report


def _verified(report: dict[str, Any]) -> list[dict[str, Any]]:
    return [entry for entry in report.get("exports") or [] if entry["verified"] is True]


def _card(
    description: dict[str, Any], report: dict[str, Any], repo_id: str, license: str | None
) -> str:
    provenance = report.get("provenance") or {}
    data = printable(str(provenance.get("data", "images")))
    name = printable(_model_name(description))
    exports = _verified(report)
    split = printable(str(provenance.get("split", "test")))
    top1 = report["metrics"]["deploy_form"]["top1"]
    header: dict[str, Any] = {
        **({"license": license} if license else {}),
        "library_name": "repnet",
        "pipeline_tag": "image-classification",
        "tags": sorted(
            {"image-classification", "structural-re-parameterization"}
            | {str(export["format"]) for export in exports}
        ),
        "metrics": ["accuracy"],
        "model-index": [
            {
                "name": name,
                "results": [
                    {
                        "task": {"type": "image-classification"},
                        "dataset": {"name": data, "type": _identifier(data), "split": split},
                        "metrics": [{"type": "accuracy", "name": "top-1", "value": top1}],
                    }
                ],
            }
        ],
    }
    reasons = claims.withheld(report)
    classes = len((description.get("data") or {}).get("class_names") or [])
    lines = [
        "---",
        yaml.safe_dump(header, sort_keys=False, allow_unicode=True).rstrip(),
        "---",
        f"# {name} on {data}",
        "",
        f"A convnet that was trained with several branches per block and folded by repnet "
        f"{__version__}. Before it was saved, all {report['samples']:,} predictions of the {split} "
        f"split were compared with those of the trained network, in every form below. "
        + " ".join(claims.headline(report)),
        "",
        *_table(
            ("form", "file", "top-1", "drop", "agreement", "latency, ms", "MB"),
            _forms(description, report, exports),
        ),
        "",
        f"Latency: {_cell(_latency(report))}. Drop: of accuracy, from the train form. Agreement: "
        "predictions that are the same.",
        *(
            f"Latency is not given where it cannot be compared: {_cell(reason)}."
            for reason in reasons
        ),
        "",
        "## Use",
        "",
        *_usage(repo_id, exports, classes),
        "",
        "## Provenance",
        "",
        *_table(("", ""), _provenance(provenance, report)),
        "",
        "## SHA-256",
        "",
        *_table(("file", "hash"), ((f, f"`{h}`") for f, h in description["hashes"].items())),
    ]
    return "\n".join(lines) + "\n"


def _forms(
    description: dict[str, Any], report: dict[str, Any], exports: Iterable[dict[str, Any]]
) -> list[tuple[str, ...]]:
    """Return a row for each form, and for each exported file."""
    metrics, latency = report["metrics"], _comparable(report)
    train, deployed = metrics["train_form"]["top1"], metrics["deploy_form"]["top1"]
    rows: list[tuple[str, ...]] = [
        ("train form", "", _percent(train), "", "", _number(latency.get("train_form")), ""),
        (
            "deploy form",
            WEIGHTS,
            _percent(deployed),
            _percent(train - deployed),
            _percent(report.get("agreement")),
            _number(latency.get("deploy_form")),
            "",
        ),
    ]
    for export in exports:
        size = export.get("bytes")
        rows.append(
            (
                f"{export['format']} {export['precision']}",
                str(export["file"]),
                _percent(export.get("top1")),
                _percent(export.get("drop")),
                _percent(export.get("agreement")),
                _number(latency.get(f"{export['format']} {export['precision']}")),
                _number(size / 1e6 if size else None),
            )
        )
    return rows


def _comparable(report: dict[str, Any]) -> dict[str, float]:
    """Return the milliseconds of each form, unless a reader would compare what cannot be."""
    forms = (report.get("latency") or {}).get("forms") or {}
    withheld = {name for name, found in forms.items() if found.get("withheld")}
    if withheld == forms.keys() - {"train_form"}:  # nothing is left to compare it with
        withheld |= forms.keys()
    known = dict(report.get("latency_ms") or {})
    return {name: value for name, value in known.items() if name not in withheld}


def _latency(report: dict[str, Any]) -> str:
    """Return how many images a pass took, and where."""
    latency = report.get("latency") or {}
    batch = latency.get("batch") or 1
    default = latency.get("device") or (report.get("provenance") or {}).get("device")
    places = dict.fromkeys([default, *(latency.get("devices") or {}).values()])
    where = "; files on the CPU: ".join(str(place) for place in places)
    return f"{'one image' if batch == 1 else f'{batch} images'}, {where}"


def _usage(repo_id: str, exports: Sequence[dict[str, Any]], classes: int) -> list[str]:
    lines = [
        "```python",
        "from repnet.hub import from_hub",
        "",
        f"model = from_hub({repo_id!r})  # nn.Module: normalized images to {classes} logits",
    ]
    for export in exports:
        # Code is loaded only where somebody says that he trusts its author.
        trust = ", trust=['native']" if format_named(export["format"]).native else ""
        takes = "  # uint8 images" if export.get("preprocess") else ""
        lines.append(f"model = from_hub({repo_id!r}, file={export['file']!r}{trust}){takes}")
    return [
        *lines,
        "```",
        "",
        "```bash",
        f"python -m repnet.hub pull {repo_id} model",
        "python -m repnet.predict model IMAGE_OR_FOLDER",
        "```",
    ]


def _provenance(provenance: dict[str, Any], report: dict[str, Any]) -> list[tuple[str, str]]:
    """Return facts about where the weights come from; paths stay private."""
    facts = {
        "data": provenance.get("data"),
        "split": provenance.get("split"),
        "samples compared": report["samples"],
        "largest error of a block, float64": claims.largest_error(report),
        "loosened limits": ", ".join(claims.loosened(report)) or None,
        "epoch": provenance.get("epoch"),
        "weights": provenance.get("weights"),
        "checkpoint SHA-256": provenance.get("checkpoint_sha256"),
        "deployed": provenance.get("created"),
        **(provenance.get("versions") or {}),
    }
    return [(key, str(value)) for key, value in facts.items() if value is not None]


def _model_name(description: dict[str, Any]) -> str:
    target = description["architecture"]["train_form"].get("_target_", "network")
    return str(target).rpartition(".")[2]


def _identifier(name: str) -> str:
    """Return `FashionMNIST` as `fashion_mnist`."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower()


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = [header, ["---"] * len(header), *rows]
    return ["| " + " | ".join(_cell(cell) for cell in line) + " |" for line in lines]


def _cell(value: Any) -> str:
    return printable(" ".join(str(value).split())).replace("|", "\\|").replace("<", "&lt;")


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.2%}"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"
