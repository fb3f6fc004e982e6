"""Old packages, and configurations of later releases: both fail at once and say what to install."""

import importlib.metadata
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from safevlm import SafeVlmConfig, SafeVlmForConditionalGeneration, __version__
from safevlm.configuration_safevlm import REQUIRED, check_installed, check_saved_by
from safevlm.processing import processing_safevlm

ROOT = Path(__file__).parents[2]

# A user's process without safevlm, in which a package reports another version and lacks a module.
LOAD = """
import importlib.metadata, sys
sys.modules["safevlm"] = None
import torch, transformers
package, version, missing, auto, folder = sys.argv[1:]
auto = getattr(transformers, auto)
installed = importlib.metadata.version
importlib.metadata.version = lambda name: version if name == package else installed(name)
sys.modules[package].__version__ = version
sys.modules[missing] = None
auto.from_pretrained(folder, trust_remote_code=True)
"""


@pytest.fixture(scope="module")
def saved(model_folders):
    return model_folders / "safe"


def load_with(package: str, version: str, missing: str, auto: str, folder: Path) -> subprocess.CompletedProcess:
    environment = {**os.environ, "HF_MODULES_CACHE": str(folder.parent / "modules"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", LOAD, package, version, missing, auto, str(folder)]
    return subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("package", "version", "auto"),
    [
        ("transformers", "5.22.2", "AutoConfig"),
        ("transformers", "4.57.6", "AutoProcessor"),
        ("transformers", "5.24.0", "AutoConfig"),  # which renames `past_key_values`
        ("torch", "2.5.1+cu124", "AutoModelForImageTextToText"),
    ],
)
def test_saved_code_under_a_package_that_does_not_fit_says_what_to_install(saved, package, version, auto):
    # One of the modules that the saved code imports and old releases lack.
    done = load_with(package, version, "transformers.models.auto.modeling_auto", auto, saved)
    (requirement,) = (text for text in REQUIRED if text.startswith(package))
    assert done.returncode == 1
    error = "\n".join(done.stderr.strip().splitlines()[-2:])
    assert error == (
        f"ImportError: {requirement} is required for a normal functioning of this module, but found "
        f"{package}=={version}.\nThis SafeVLM needs it: pip install --upgrade '{requirement.replace('.dev0', '')}' "
        f"(and restart Python)."
    ), done.stderr[-2000:]


def test_saved_code_loads_under_later_patches_and_development_versions(saved):
    done = load_with("transformers", "5.23.7.dev0", "no_such_module", "AutoProcessor", saved)
    assert done.returncode == 0, done.stderr[-2000:]


def pretend(monkeypatch, package: str, version: str):
    """Makes `package` look as if it were installed in `version`."""
    installed = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: version if name == package else installed(name))


@pytest.mark.parametrize("version", ["2.6.0", "2.6.0a0+git1", "2.13.0+cpu", "3.0"])
def test_versions_from_the_lowest_on_are_accepted(monkeypatch, version):
    pretend(monkeypatch, "torch", version)
    check_installed()


def test_numbers_are_compared_as_numbers(monkeypatch):
    pretend(monkeypatch, "transformers", "5.9.1")
    with pytest.raises(
        ImportError, match="transformers>=5.23.dev0,<5.24.dev0 is required .* found transformers==5.9.1"
    ):
        check_installed()


@pytest.mark.parametrize("version", ["5.22.9", "5.24.0.dev0", "5.24.0rc1", "6.0"])
def test_transformers_before_and_after_the_range_is_refused(monkeypatch, version):
    pretend(monkeypatch, "transformers", version)
    with pytest.raises(ImportError, match="pip install --upgrade 'transformers>=5.23,<5.24'"):
        check_installed()


def test_a_saved_configuration_names_the_release_that_wrote_it(saved):
    assert json.loads((saved / "config.json").read_text())["safevlm_version"] == __version__


def test_a_later_releases_model_is_refused_with_both_versions(saved, tmp_path):
    config = json.loads((saved / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "safevlm_version": "7.1.0", "new_setting": 1}))
    message = rf"saved by safevlm 7\.1\.0, found {__version__}: pip install --upgrade 'safevlm>=7\.1\.0'"
    for load in (SafeVlmConfig, SafeVlmForConditionalGeneration):
        with pytest.raises(ValueError, match=message):
            load.from_pretrained(tmp_path)


def test_models_of_this_and_earlier_releases_load_and_record_this_one_when_saved():
    # None: saved before releases were recorded.
    for version in (None, "0.0.9", __version__, f"{__version__}.post1"):
        assert SafeVlmConfig(safevlm_version=version).safevlm_version == __version__


@pytest.mark.parametrize("version", ["new", "1", 3, ["0.1"]])
def test_an_invalid_version_is_an_error(version):
    with pytest.raises(ValueError, match="A version must start with two numbers"):
        check_saved_by(version)


def test_the_lowest_versions_are_the_same_everywhere():
    project = (ROOT / "pyproject.toml").read_text()
    pins = dict(re.findall(r"^([\w-]+)==([\d.]+)", (ROOT / "constraints-lowest.txt").read_text(), re.MULTILINE))
    dependencies = project.split("\ndependencies = ")[1].split("[project.scripts]")[0]  # and the optional ones
    bounds = dict(re.findall(r'"([\w-]+)>=([\d.]+)', dependencies))
    assert "transformers" in bounds and pins["transformers"].startswith(bounds["transformers"])
    for name in bounds.keys() & pins.keys():
        assert f"{pins[name]}.".startswith(f"{bounds[name]}."), name
    for requirement in REQUIRED:
        package, lowest = re.match(r"(\w+)>=([\d.]+)\.dev0", requirement).groups()
        assert bounds[package].startswith(lowest)
    assert processing_safevlm.REQUIRED in REQUIRED


def test_the_package_has_one_version():
    assert re.search(r'^version = "(.+)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)[1] == __version__
