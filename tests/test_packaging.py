"""A wheel contains every file that the package reads, and lock.txt every package that pyproject.toml requires."""

import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
FOLDERS = {
    "modeling_safevlm": "safevlm",
    "processing": "safevlm/processing",
    "trainer": "safevlm/trainer",
    "model_card": "safevlm/model_card",
}
# The locked versions of each package; they can differ between Pythons: {"numpy": ["2.4.6"], ...}.
LOCK = (ROOT / "lock.txt").read_text()
LOCKED = {}
for name, version in re.findall(r"^([\w.-]+)==(\S+)", LOCK, re.MULTILINE):
    LOCKED.setdefault(name, []).append(version)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The names of the files in the wheel, and the output of its build."""
    pytest.importorskip("setuptools", minversion="77")
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in FOLDERS:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    code = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"
    done = subprocess.run([sys.executable, "-c", code, out], cwd=source, capture_output=True, text=True, check=True)
    return set(zipfile.ZipFile(next(out.glob("*.whl"))).namelist()), done.stdout + done.stderr


def test_a_wheel_holds_every_file_of_the_package(built):
    expected = {
        str(package / path.relative_to(ROOT / folder))
        for folder, package in ((folder, Path(package)) for folder, package in FOLDERS.items())
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and path.suffix not in (".md", ".png")
    }
    expected |= {
        "safevlm/model_card/template.md",
        "safevlm/model_card/space/README.md",
        "safevlm/trainer/data/README.md",
    }
    assert "safevlm/trainer/evaluation/benchmarks/tasks/_safety_task" in expected
    assert expected - built[0] == set()


def test_a_wheel_is_built_without_warnings(built):
    assert "would be ignored" not in built[1] and "Warning" not in built[1]


def required(extra: str) -> list[Requirement]:
    """Everything that an extra installs, with the package's own requirements and nested extras."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    found = [Requirement(line) for line in project["dependencies"]]
    for requirement in map(Requirement, project["optional-dependencies"][extra]):
        if requirement.name == "safevlm":
            found += [inner for nested in requirement.extras for inner in required(nested)]
        else:
            found.append(requirement)
    return found


@pytest.mark.parametrize("requirement", sorted(set(map(str, required("dev")))))
def test_the_lock_has_what_is_required(requirement):
    requirement = Requirement(requirement)
    if requirement.name == "torch":  # installed separately, see the Makefile
        pins = re.findall(r'"torch==(.+?)"', (ROOT / "pyproject.toml").read_text())
        assert "torch" not in LOCKED
    else:
        pins = LOCKED[canonicalize_name(requirement.name)]
    assert pins and all(requirement.specifier.contains(version) for version in pins)


def test_the_lock_has_hashes_and_no_addresses():
    assert "://" not in LOCK and "index-url" not in LOCK
    packages = re.split(r"\n(?=\w)", LOCK.split("make lock\n")[1])
    assert len(packages) > 100 and all("--hash=sha256:" in package for package in packages)
