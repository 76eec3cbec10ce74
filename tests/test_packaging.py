"""What an installation holds and which versions it asks for."""

import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[1]


def requirements(file: str) -> dict[str, Requirement]:
    lines = (ROOT / file).read_text().splitlines()
    parsed = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return {requirement.name: requirement for requirement in parsed}


def test_the_oldest_set_pins_every_lower_bound():
    pins = requirements(".ci/constraints-oldest.txt")
    for name, requirement in requirements("requirements.txt").items():
        (bound,) = requirement.specifier
        (pin,) = pins[name].specifier
        assert (bound.operator, pin.operator) == (">=", "==")
        assert Version(bound.version) == Version(pin.version), name


def test_the_cuda_extra_asks_for_the_same_jax():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (cuda,) = map(Requirement, project["optional-dependencies"]["cuda"])
    assert cuda.specifier == requirements("requirements.txt")[cuda.name].specifier


def test_every_folder_of_code_is_a_package():
    """One without `__init__.py` would be left out of an installation."""
    for top in ("gsa_jax", "pallas_kernels", "experiments"):
        folders = {file.parent for file in (ROOT / top).rglob("*.py")}
        assert [str(folder) for folder in folders if not (folder / "__init__.py").exists()] == []
