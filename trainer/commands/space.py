"""`safevlm space`: runs a Gradio page around a model on this machine, or pushes it as a Space.

Either way the same folder is assembled: the files of `model_card/space/`, safevlm's image loader, and the examples.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from shutil import copyfile, copytree, ignore_patterns

from .common import add_command, check_model_type, check_policy, print_json


def add(commands):
    command = add_command(
        commands,
        "space",
        run,
        "Run a Gradio page around a model, or push it as a Space: chat with verdicts, base against safe, audit.",
        example='safevlm space --model demo/model --example demo/example.png "What is behind the shapes?"',
    )
    command.add_argument("--model", required=True, help="folder or Hub id of a SafeVLM; with --push a Hub id")
    command.add_argument("--revision", help="commit, branch or tag of the model; --push pins its current commit")
    command.add_argument(
        "--policies",
        default="default,strict",
        help="policies that visitors can choose from, the default one first: presets or policy files "
        "(default: %(default)s)",
    )
    command.add_argument("--no-compare", action="store_true", help="never show the unfiltered answer")
    command.add_argument("--title", help="headline of the page")
    command.add_argument(
        "--example",
        nargs=2,
        action="append",
        default=[],
        metavar=("IMAGE", "QUESTION"),
        help="an example to offer; can be repeated",
    )
    command.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    command.add_argument("--port", type=int, default=7860, help="port to listen on (default: %(default)s)")
    command.add_argument(
        "--push", metavar="USER/NAME", help="push to this Space instead of running the page; a new Space is private"
    )
    command.add_argument("--public", action="store_true", help="with --push: make a new Space public")


def run(args):
    with tempfile.TemporaryDirectory(prefix="safevlm-space-") as folder:
        assemble(Path(folder), args.example)
        policies = _copy_policies(Path(folder), args.policies)
        settings = {"SAFEVLM_MODEL": args.model, "SAFEVLM_POLICIES": policies}
        settings["SAFEVLM_COMPARE"] = "false" if args.no_compare else "true"
        for name in ("revision", "title"):
            if value := getattr(args, name):
                settings[f"SAFEVLM_{name.upper()}"] = value
        if args.push:
            return push(Path(folder), args.push, settings, private=not args.public)
        if find_spec("gradio") is None:
            raise ImportError("The page needs gradio. Install it with: pip install 'safevlm[space]'")
        check_model_type(args.model, "--model", args.revision)
        return serve(Path(folder), settings, args.host, args.port)


def assemble(folder: Path, examples: list[tuple[str, str]] = ()):
    """
    Puts all files of a Space into `folder`.

    Args:
        folder (`Path`): An empty folder.
        examples (`list[tuple[str, str]]`): The path of an image and a question, for each example.

    Raises:
        `ImageError`: The image of an example cannot be read.
    """
    from safevlm import model_card
    from safevlm.processing import pictures
    from safevlm.trainer import data

    page = Path(model_card.__file__).parent / "space"
    copytree(page, folder, dirs_exist_ok=True, ignore=ignore_patterns("__pycache__"))
    copyfile(pictures.__file__, folder / "pictures.py")
    if examples:
        (folder / "examples").mkdir()
        rows = []
        for i, (image, question) in enumerate(examples):
            rows.append({"image": f"{i}.jpg", "question": question})
            picture = data.load_image(image)
            picture.thumbnail((1024, 1024))
            picture.save(folder / "examples" / rows[-1]["image"], quality=92)
        text = json.dumps(rows, indent=2, ensure_ascii=False) + "\n"
        (folder / "examples" / "examples.json").write_text(text, encoding="utf-8")


def serve(folder: Path, settings: dict[str, str], host: str, port: int) -> int:
    """Runs the page in its own process, as a Space would, until it is stopped. Returns its exit code."""
    if Path(settings["SAFEVLM_MODEL"]).is_dir():
        settings["SAFEVLM_MODEL"] = str(Path(settings["SAFEVLM_MODEL"]).resolve())
    server = {"GRADIO_SERVER_NAME": host, "GRADIO_SERVER_PORT": str(port), "GRADIO_ANALYTICS_ENABLED": "False"}
    environment = {**os.environ, **settings, **server}
    # In its own process group: Ctrl-C reaches only this process, which then ends the page without a traceback.
    with subprocess.Popen([sys.executable, "app.py"], cwd=folder, env=environment, process_group=0) as process:
        # The page must not outlive this process. Windows has no SIGHUP.
        for number in (signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)):
            signal.signal(number, lambda *_: sys.exit(0))
        try:
            return process.wait()
        except KeyboardInterrupt:
            return 0
        finally:
            process.terminate()


def push(folder: Path, name: str, settings: dict[str, str], private: bool):
    """
    Pushes the page to a Space and sets the Space's variables. An existing Space keeps its visibility, secrets and
    hardware.

    Args:
        folder (`Path`): What [`assemble`] filled.
        name (`str`): `user/name`.
        settings (`dict[str, str]`): The variables. The model must be on the Hub; it is pinned to its current commit.
        private (`bool`): Whether a new Space is private.
    """
    from huggingface_hub import HfApi

    model = settings["SAFEVLM_MODEL"]
    if Path(model).exists():
        raise ValueError(
            f"--model {model!r} is a folder on this machine; push it with `safevlm push` and pass its Hub id."
        )
    api = HfApi()
    commit = api.model_info(model, revision=settings.get("SAFEVLM_REVISION")).sha
    settings = {**settings, "SAFEVLM_REVISION": commit}
    space = api.create_repo(name, repo_type="space", space_sdk="gradio", private=private, exist_ok=True)
    for key, value in settings.items():
        api.add_space_variable(space.repo_id, key, value)
    api.upload_folder(repo_id=space.repo_id, repo_type="space", folder_path=folder)
    print_json({"space": str(space), "variables": settings})


def _copy_policies(folder: Path, names: str) -> str:
    """Copies the policy files among `names` into `folder`; returns the names under which the page finds them."""
    from safevlm.policy_file import write_policy
    from safevlm.safety_policy import POLICY_PRESETS

    page_names = []
    for name in filter(None, (part.strip() for part in names.split(","))):
        policy = check_policy(name, "--policies", names)
        if name.endswith((".yaml", ".yml", ".json")):
            if Path(name).stem.lower() in POLICY_PRESETS:
                raise ValueError(f"--policies {name!r}: visitors would take the file for the preset. Rename it.")
            write_policy(policy, folder / Path(name).name)
            name = Path(name).name
        page_names.append(name)
    if not page_names:
        raise ValueError("--policies must name at least one policy, such as default.")
    return ",".join(page_names)
