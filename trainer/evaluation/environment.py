"""Where a number was measured: what a report or card says beside it."""

import os
import platform
from datetime import date

import torch
import transformers


def environment() -> dict[str, str]:
    """Device, versions and date of the running process."""
    cuda = torch.cuda.is_available()
    return {
        "device": torch.cuda.get_device_name() if cuda else f"{os.cpu_count()} CPU cores",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "date": date.today().isoformat(),
    }
