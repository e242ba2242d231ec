"""`constraints.txt` agrees with the extras and with what the installed packages ask for."""

from __future__ import annotations

import tomllib
from importlib.metadata import distributions

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.commands import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
LINES = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
PINS = {
    canonicalize_name(pin.name): next(iter(pin.specifier)).version
    for pin in (Requirement(line) for line in LINES if not line.startswith("#"))
}
# What packages that `dev` does not bring ask for beside their names; `make resolve` asks pip.
NOT_INSTALLED = {
    "ray": ["cloudpickle<3", "python-dateutil<3"],  # hydra-ray-launcher 1.2.2, botocore
}


def unmet(requirements: list[str]) -> list[str]:
    """Return the requirements that a pin does not satisfy."""
    found = []
    for requirement in map(Requirement, requirements):
        pin = PINS.get(canonicalize_name(requirement.name))
        applies = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        if applies and pin and not requirement.specifier.contains(pin, prereleases=True):
            found.append(f"{requirement}, pinned {pin}")
    return found


@pytest.mark.parametrize("extra", ["", *PROJECT["optional-dependencies"]])
def test_an_extra_can_be_installed_with_the_constraints(extra: str) -> None:
    own = PROJECT["optional-dependencies"].get(extra, PROJECT["dependencies"])
    assert unmet([*own, *NOT_INSTALLED.get(extra, ())]) == []


def test_the_pins_satisfy_every_package_that_is_installed_as_pinned() -> None:
    pinned = [d for d in distributions() if PINS.get(canonicalize_name(d.name)) == d.version]
    assert len(pinned) > 50
    broken = {d.name: unmet(d.requires or []) for d in pinned}
    assert {name: reasons for name, reasons in broken.items() if reasons} == {}
