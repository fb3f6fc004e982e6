"""
Runs the common tests of transformers on SafeVLM over LLaVA and over Qwen2.5-VL, with the native models as control.

    python tests/transformers_common/run.py        # or: make test-transformers

`pip download` fetches the tests with the source distribution of the installed version of transformers into build/,
outside this repository's files, and checks its hash. Fails if SafeVLM fails a test that the control passes. Tests that
only SafeVLM skips are listed with the reason.
"""

import argparse
import os
import subprocess
import sys
import tarfile
import xml.etree.ElementTree as ElementTree
from collections import Counter
from pathlib import Path

import transformers
from missing_modules import MISSING_MODULES

HERE = Path(__file__).parent
CACHE = HERE.parents[1] / "build" / "transformers-tests"
BOTH = ("Llava", "Qwen2_5_VL")
MIXINS = {"ModelTest": BOTH, "ConfigTest": BOTH, "ProcessorTest": BOTH, "PipelineTest": ("Llava",)}


def fetch(version: str) -> Path:
    """The folder of transformers' common tests, with stand-ins for modules that they import but that it lacks."""
    name = f"transformers-{version}"
    folder = CACHE / name
    if not (CACHE / f"{name}.tar.gz").exists():
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", "transformers"]
        subprocess.run([*command, "--dest", str(CACHE), f"transformers=={version}"], check=True)
    if not (folder / "tests").exists():
        with tarfile.open(CACHE / f"{name}.tar.gz") as archive:
            archive.extractall(CACHE, [m for m in archive if m.name.startswith(f"{name}/tests/")], filter="data")
        # The pipeline mixin imports transformers from this folder.
        (folder / "src").mkdir(exist_ok=True)
        (folder / "src" / "transformers").symlink_to(Path(transformers.__file__).parent)
    for path, source in MISSING_MODULES.items():
        file = folder / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(source)
    return folder


def run(folder: Path, pytest_arguments: list[str]) -> dict[str, dict[str, tuple[str, str]]]:
    """Outcome and reason of each test, by test class."""
    report = CACHE / "report.xml"
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(str(path) for path in (folder, HERE, HERE.parent)),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    environment.setdefault("OMP_NUM_THREADS", "1")
    files = [str(HERE / f"common_{name}.py") for name in ("models", "processors", "pipelines")]
    # Without the settings of our own tests: with `importlib`, our folder would hide transformers' `tests`.
    command = [
        sys.executable,
        "-m",
        "pytest",
        *files,
        f"--junitxml={report}",
        "--noconftest",
        "--override-ini=addopts=",
    ]
    command += ["--import-mode=prepend", "--quiet", "--tb=short", "--disable-warnings"]
    command += ["-p", "no:cacheprovider", *pytest_arguments]
    report.unlink(missing_ok=True)
    code = subprocess.run(command, env=environment).returncode
    if code not in (0, 1):  # 1: some tests failed
        raise SystemExit(f"pytest stopped with exit code {code}.")
    outcomes: dict[str, dict[str, tuple[str, str]]] = {}
    for case in ElementTree.parse(report).getroot().iter("testcase"):
        outcome = ("passed", "")
        for kind, name in (("skipped", "skipped"), ("error", "failed"), ("failure", "failed")):
            if (element := case.find(kind)) is not None:
                outcome = (name, " ".join((element.get("message") or "").split())[:200])
        tests = outcomes.setdefault(case.get("classname").split(".")[-1], {})
        if tests.get(case.get("name"), ("",))[0] != "failed":  # one entry per subtest that failed
            tests[case.get("name")] = outcome
    return outcomes


def summary(outcomes) -> bool:
    """Writes the table and the differences. Returns whether SafeVLM fails no test that the control passes."""
    write = sys.stdout.write
    write("\n| mixin | family | | passed | failed | skipped |\n|---|---|---|---:|---:|---:|\n")
    differs, worse = [], False
    for mixin, families in MIXINS.items():
        for family in families:
            native, safe = outcomes.get(family + mixin, {}), outcomes.get(f"Safe{family}{mixin}", {})
            if native.keys() != safe.keys():
                differs.append(f"{mixin}, {family}: the control ran {len(native)} tests, SafeVLM {len(safe)}")
                worse = True
            for who, tests in (("native", native), ("SafeVLM", safe)):
                counts = Counter(outcome for outcome, _ in tests.values())
                columns = " | ".join(str(counts[outcome]) for outcome in ("passed", "failed", "skipped"))
                write(f"| {mixin} | {family} | {who} | {columns} |\n")
            for test, (outcome, reason) in safe.items():
                control = native.get(test, ("missing", ""))[0]
                if outcome == "failed" and control == "failed":
                    differs.append(f"{mixin}, {family}: {test} fails on both")
                elif outcome != "passed" and control != outcome:
                    differs.append(f"{mixin}, {family}: {test} {outcome}, control {control}: {reason}")
                    worse |= outcome == "failed"
    write("\n" + "".join(f"- {line}\n" for line in differs))
    write(
        "FAILED: SafeVLM fails tests that the control passes\n"
        if worse
        else "SafeVLM fails no test that the control passes\n"
    )
    return not worse


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pytest_arguments", nargs="*", help="passed to pytest, after --")
    args = parser.parse_args()
    CACHE.mkdir(parents=True, exist_ok=True)
    return 0 if summary(run(fetch(transformers.__version__), args.pytest_arguments)) else 1


if __name__ == "__main__":
    sys.exit(main())
