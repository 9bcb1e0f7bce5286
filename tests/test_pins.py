"""Pinned versions: constraints.txt and requirements.lock are one set, with everything that the tests need.

The lock is resolved for PyPI, where torch is a CUDA build that names its own triton; a pin that differs there would make
`pip install -c constraints.txt` impossible on any Linux machine but those with the CPU build.
"""

import re
from pathlib import Path

import tomllib

ROOT = Path(__file__).parent.parent
PIN = re.compile(r"^([A-Za-z0-9_.-]+)==([^\s;\\]+)", re.MULTILINE)


def canonical(name: str) -> str:
    """The name of a package as PEP 503 compares it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def pins(file: str) -> dict[str, str]:
    return {canonical(name): version for name, version in PIN.findall((ROOT / file).read_text())}


def test_both_files_pin_one_version_of_each_package() -> None:
    constraints, lock = pins("constraints.txt"), pins("requirements.lock")
    both = constraints.keys() & lock.keys()
    assert {"torch", "triton", "lightning", "transformers"} <= both
    assert {name: constraints[name] for name in both} == {name: lock[name] for name in both}


def test_the_lock_has_all_that_the_tests_install() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras, wanted = project["optional-dependencies"], list(project["dependencies"])
    pending = ["dev"]
    while pending:
        for requirement in extras[pending.pop()]:
            name, _, names = requirement.partition("[")
            if name == "genai_pl":
                pending += names.rstrip("]").split(",")
            else:
                wanted.append(requirement)
    names = {canonical(re.match(r"[A-Za-z0-9_.-]+", requirement)[0]) for requirement in wanted}
    assert names <= pins("requirements.lock").keys()
