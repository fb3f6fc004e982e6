"""Two processes with half the batch each take the step that one process takes with all of it."""

import ast
import os
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


def run(folder, batch_size, processes):
    launch = ["-m", "torch.distributed.run", "--nproc_per_node", str(processes), "--master_port", str(free_port())]
    command = [sys.executable, *(launch if processes > 1 else []), str(SCRIPT), str(folder), str(batch_size)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1"}
    process = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert process.returncode == 0, process.stderr
    logs = [ast.literal_eval(line) for line in process.stdout.splitlines() if line.startswith("{'loss'")]
    stage = folder / "1-safety_alignment"
    assert sorted(path.name for path in stage.iterdir()) == ["model", "settings.json"]
    return load_file(stage / "model" / "model.safetensors"), logs[0]


@pytest.mark.slow
def test_two_processes_take_the_step_of_one(tmp_path):
    one, log = run(tmp_path / "one", batch_size=4, processes=1)
    two, log_of_two = run(tmp_path / "two", batch_size=2, processes=2)
    assert one.keys() == two.keys()
    for name in one:
        assert torch.allclose(one[name], two[name], rtol=1e-4, atol=1e-6), name
    assert float(log_of_two["loss"]) == pytest.approx(float(log["loss"]), rel=1e-3)
