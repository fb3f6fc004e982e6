"""The folders that documents run in, one for each document, with the files that it assumes."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from blocks import ROOT
from judge_endpoint import start_judge
from preloaded import call

# The text of a document, the text to run instead, and why. Each is used by at least one document.
SUBSTITUTES = [
    ("git clone <this repository>", f"ln -s {ROOT}", "the repository is here"),
    (
        "make ",
        "make --dry-run ",
        "the targets install packages and take minutes; their recipes have their own tests",
    ),
    (
        "safevlm demo --fast --output tiny",
        "ln -s demo tiny",
        "the fixture `demo` ran it, once for all documents",
    ),
    ("llava-hf/llava-1.5-7b-hf", "demo/base", "no 7B checkpoint, no network"),
    ("--recipe paper", "--recipe paper --holdout 0 --set bf16=false", "two rows, so none to hold out; a CPU"),
    ('Recipe.load("paper")', 'Recipe.load("paper").with_arguments(bf16=False)', "a CPU"),
    ("max_steps=60", "max_steps=2", "time"),
    ("figstep,mossbench,mmbench", "figstep_tiny --limit 2 --max-new-tokens 4", "the data that is here; time"),
    ("figstep_tiny,own,mossbench,own_lookalikes,mmbench", "figstep_tiny,own,mmbench --limit 2", "the same"),
    ("--limit 100", "--limit 4 --max-new-tokens 8", "time"),
    (
        "answers=answers.jsonl --tasks figstep",
        "answers=answers.jsonl,device=cpu --tasks figstep_tiny --limit 2",
        "time",
    ),
    ("--xstest ../shared/data/xstest", "--help", "a minute of fits; test_refusals.py checks their figures"),
    ('"sqrti/SPA-VL", subset="validation", revision="main"', '"set.zip/train.json", "set.zip/pictures"', "no network"),
    ("localhost:8000", "127.0.0.1:{port}", "a free port"),
    ("--port 8000", "--port {port}", "a free port"),
]
# With a fast demo, whose answers are not compared, a roughly trained model is enough.
OF_A_FAST_DEMO = [("max_steps=40 warmup_steps=5", "max_steps=6 warmup_steps=1", "time")]
# Data sets that documents download from the Hub; here they are empty.
DATASETS = ("lmms-lab-encoder/POPE", "ys-zong/VLGuard")
GITHUB = ("xirui-li/MOSSBench",)


class Workplace:
    """
    Args:
        folder (`Path`): Gets `home`, `bin` and a folder for each document; contains `shared/data`.
        hub (`LoopbackHub`): Stands in for the Hub.
    """

    def __init__(self, folder: Path, hub):
        self.folder = folder
        self.socket = os.path.join(tempfile.mkdtemp(prefix="docs-"), "socket")  # its path must be short
        (folder / "home").mkdir()
        binaries = folder / "bin"
        binaries.mkdir()
        here = Path(__file__).parent
        for name, words in {
            "safevlm": [sys.executable, "-S", "-E", here / "preloaded.py", self.socket],
            "pip": [sys.executable, here / "pip_stand_in.py"],
        }.items():
            (binaries / name).write_text(f'#!/bin/sh\nexec {" ".join(map(str, words))} "$@"\n')
            (binaries / name).chmod(0o755)
        for name in DATASETS:
            hub.add(name, files={"README.md": b""}, kind="datasets")
        for name in GITHUB:
            empty = folder / "github" / name
            empty.mkdir(parents=True)
            subprocess.run(["git", "init", "--quiet", empty], check=True)
        self.environment = {
            "PATH": os.pathsep.join([str(binaries), str(Path(sys.executable).parent), os.environ["PATH"]]),
            "HOME": str(folder / "home"),
            "LANG": "C.UTF-8",
            "OMP_NUM_THREADS": "1",
            "OMP_WAIT_POLICY": "PASSIVE",
            "TOKENIZERS_PARALLELISM": "false",
            "TQDM_DISABLE": "1",
            "OPENAI_API_KEY": "none",
            "http_proxy": "http://127.0.0.1:9",  # requests to anywhere else fail at once
            "https_proxy": "http://127.0.0.1:9",
            "no_proxy": "127.0.0.1,localhost",
            "GIT_CONFIG_COUNT": "1",
            "GIT_CONFIG_KEY_0": f"url.{folder}/github/.insteadOf",
            "GIT_CONFIG_VALUE_0": "https://github.com/",
            **hub.environment(folder / "home" / "hf"),
        }

    def socket_answers(self) -> bool:
        return os.path.exists(self.socket)

    def call(self, arguments: list[str], folder: Path, log) -> int:
        """Runs `safevlm ...` or a Python file in the preloaded process; its output goes to the file `log`."""
        with open(os.devnull) as nothing:
            streams = (nothing.fileno(), log.fileno(), log.fileno())
            return call(self.socket, arguments, str(folder), self.environment, streams)

    def run(self, document: str, blocks, demo: Path, port: int) -> list[dict]:
        """Runs a document's blocks in a new folder; returns the steps it ran, the last of which may have failed."""
        folder = self.folder / document.replace("/", "-").removesuffix(".md")
        folder.mkdir()
        for name in (
            "tests",
            "trainer",
            "Makefile",
            "pyproject.toml",
            "lock.txt",
            "constraints-lowest.txt",
        ):
            (folder / name).symlink_to(ROOT / name)
        shutil.copytree(demo, folder / "demo")
        PREPARE.get(document, lambda *given: None)(folder, self, port)
        is_fast = json.loads((demo / "settings.json").read_text())["fast"]
        substitutes = SUBSTITUTES + OF_A_FAST_DEMO * is_fast
        steps = []
        for block in blocks:
            if block.file is not None:
                (folder / block.file).write_text(block.text, encoding="utf-8")
            else:
                text = substitute(block.text, substitutes).replace("{port}", str(port))
                step = {"where": block.where, "language": block.language, "text": text, "output": block.output}
                steps.append({**step, "ready": f"http://127.0.0.1:{port}/health"})
        files = [folder / f"{name}.json" for name in (".steps", ".results")]
        files[0].write_text(json.dumps(steps))
        with open(folder / ".log", "w") as log:
            script = str(Path(__file__).with_name("run_steps.py"))
            code = self.call([script, *map(str, files)], folder, log)
        assert code == 0 and files[1].is_file(), (folder / ".log").read_text()[-4000:]
        return json.loads(files[1].read_text())


def substitute(text: str, substitutes: list[tuple[str, str, str]]) -> str:
    """The text to run for a block."""
    for shown, run, _ in substitutes:
        text = text.replace(shown, run)
    return text


def _readme(folder: Path, place: Workplace, port: int):
    from PIL import Image

    (folder / "pictures").mkdir()
    Image.open(folder / "demo" / "example.png").convert("RGB").save(folder / "pictures" / "knife.jpg")


def _trained(folder: Path, place: Workplace, port: int):
    """`out`, as `safevlm train` leaves it."""
    shutil.copytree(folder / "demo" / "training", folder / "out")
    shutil.copytree(folder / "demo" / "model", folder / "out" / "model", dirs_exist_ok=True)


LORA = """
safety: {safety_hidden_size: 32, num_safety_features: 4, num_attention_heads: 4}
stages:
  - {stage: safety_alignment, max_steps: 1}
  - {stage: joint_finetuning, max_steps: 1, lora_r: 2}
"""


def _trained_with_lora(folder: Path, place: Workplace, port: int):
    """`out`, as `safevlm train` leaves it with the paper's recipe, so that an adapter can be made from it."""
    (folder / "lora.yaml").write_text(LORA)
    data = ["--data", "demo/dev/rows.jsonl", "--holdout", "0", "--set", "per_device_train_batch_size=4"]
    command = ["safevlm", "train", "--base", "demo/base", "--recipe", "lora.yaml", "--output", "out", *data]
    with open(folder / ".train-log", "w") as log:
        code = place.call(command, folder, log)
    assert code == 0, (folder / ".train-log").read_text()[-4000:]


def _data(folder: Path, place: Workplace, port: int):
    """The files that the data README reads, of two rows each, about two small pictures."""
    from PIL import Image

    real = place.folder / "shared" / "data"
    tiny = real / "figstep_tiny" / "data"
    shutil.copy(tiny / "question" / "SafeBench-Tiny.csv", folder / "figstep.csv")
    shutil.copytree(tiny / "images" / "SafeBench-Tiny", folder / "images")
    (folder / "VLGuard").mkdir()
    for path in (folder / "one.png", folder / "two.png", folder / "VLGuard" / "one.png"):
        Image.new("RGB", (4, 4), "red").save(path)
    turn = {"instruction": "What is this?", "response": "A red square."}
    record = {"id": "1", "image": "one.png", "safe": False, "harmful_category": "risky behavior"}
    record |= {"harmful_subcategory": "violence", "instr-resp": [turn]}
    (folder / "VLGuard" / "train.json").write_text(json.dumps([record]))
    answer = {"from": "ASSISTANT", "value": "A red square."}
    good = {"id": "1", "image": "one.png", "safe_type": 6, "safe_level": 0}
    good["conversations"] = [{"from": "USER", "value": "<image>\nWhat is this?"}, answer]
    (folder / "set.json").write_text(json.dumps([good, {**good, "id": "2", "image": "lost.png"}]))
    with zipfile.ZipFile(folder / "set.zip", "w") as archive:
        archive.writestr("train.json", json.dumps([good]))
        archive.write(folder / "one.png", "pictures/one.png")


def _evaluation(folder: Path, place: Workplace, port: int):
    _trained(folder, place, port)
    start_judge(port)
    tiny = place.folder / "shared" / "data" / "figstep_tiny"
    (folder / "data").mkdir()
    (folder / "data" / "figstep").symlink_to(tiny)


PREPARE = {
    "README.md": _readme,
    "model_card/README.md": _trained_with_lora,
    "trainer/README.md": _trained,
    "trainer/data/README.md": _data,
    "trainer/evaluation/README.md": _evaluation,
}
