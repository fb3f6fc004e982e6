"""Two processes with half the batch each take the step that one process takes with all of it."""

import ast
import os
import runpy
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

SCRIPT = Path(__file__).with_name("distributed_schedule.py")


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def on_two_processes(folder, batch_size):
    launch = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(free_port())]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "PASSIVE",
        "HF_HUB_OFFLINE": "1",
        "GLOO_SOCKET_IFNAME": "lo",  # not whatever the host's name resolves to
    }
    command = [sys.executable, *launch, str(SCRIPT), str(folder), str(batch_size)]
    process = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert process.returncode == 0, process.stderr
    return process.stdout


def logged_loss(output: str) -> float:
    return next(float(ast.literal_eval(line)["loss"]) for line in output.splitlines() if line.startswith("{'loss'"))


@pytest.mark.slow
def test_two_processes_take_the_step_of_one(tmp_path, capsys):
    runpy.run_path(str(SCRIPT))["main"](str(tmp_path / "one"), 4)
    loss = logged_loss(capsys.readouterr().out)
    output = on_two_processes(tmp_path / "two", batch_size=2)
    one, two = (load_file(tmp_path / n / "1-safety_alignment" / "model" / "model.safetensors") for n in ("one", "two"))
    assert one.keys() == two.keys()
    for name in one:
        assert torch.allclose(one[name], two[name], rtol=1e-4, atol=1e-6), name
    assert logged_loss(output) == pytest.approx(loss, rel=1e-3)
    written = sorted(path.name for path in (tmp_path / "two" / "1-safety_alignment").iterdir())
    assert written == ["model", "settings.json"]
