"""Where a number was measured: the device, versions and date that a report or card gives beside it."""

import os
import platform
from datetime import date


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
