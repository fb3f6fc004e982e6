"""Where a number was measured: the device, versions and date that a report or card gives beside it."""

import os
import platform
import subprocess
from datetime import date
from importlib.metadata import version
from pathlib import Path


def environment() -> dict[str, str]:
    """Device, versions and date of the running process."""
    import torch  # here, so that importing the package stays cheap
    import transformers

    cuda = torch.cuda.is_available()
    return {
        "device": torch.cuda.get_device_name() if cuda else f"{os.cpu_count()} CPU cores",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "date": date.today().isoformat(),
    }


def versions() -> dict[str, str]:
    """The versions that answers to benchmarks depend on."""
    installed = environment()
    return {
        "safevlm": version("safevlm"),
        "lmms_eval": version("lmms-eval"),
        "torch": installed["torch"],
        "transformers": installed["transformers"],
    }


def git_commit() -> str | None:
    """The commit of safevlm's source tree, marked if files differ from it; `None` for an installed wheel."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10)
        changes = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    if commit.returncode:
        return None
    return commit.stdout.strip() + (" with changes" if changes.stdout.strip() else "")
