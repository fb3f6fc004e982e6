"""Two processes with half the batch each take the steps that one process takes with all of it: under DDP and FSDP2."""

import ast
import json
import os
import runpy
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate import PartialState
from safetensors.torch import load_file

from safevlm.trainer import Recipe, run_schedule
from safevlm.trainer import schedule as schedule_module

SCRIPT = Path(__file__).with_name("distributed_schedule.py")
needs_cpu_events = pytest.mark.skipif(
    not hasattr(torch.cpu.Stream, "record_event"), reason="FSDP2 on the CPU needs a later torch than this one"
)
STAGES = ("1-safety_alignment", "2-joint_finetuning")


def schedule(batch_size: int, joint=None, **arguments) -> str:
    both = dict(max_steps=2, per_device_train_batch_size=batch_size, **arguments)
    return json.dumps(
        [dict(stage="safety_alignment", **both), dict(stage="joint_finetuning", **both, **(joint or {}))]
    )


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def on_two_processes(folder, stages, *more):
    launch = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(free_port())]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "PASSIVE",
        "HF_HUB_OFFLINE": "1",
        "GLOO_SOCKET_IFNAME": "lo",  # not whatever the host's name resolves to
    }
    command = [sys.executable, *launch, str(SCRIPT), str(folder), stages, *more]
    process = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert process.returncode == 0, process.stderr
    return process.stdout


def on_one_process(folder, stages, capsys, *more):
    runpy.run_path(str(SCRIPT))["main"](str(folder), stages, *more)
    return capsys.readouterr().out


def logged_losses(output: str) -> list[float]:
    return [float(ast.literal_eval(line)["loss"]) for line in output.splitlines() if line.startswith("{'loss'")]


def weights(folder, stage):
    return load_file(folder / stage / "model" / "model.safetensors")


def assert_close(found: Path, expected: Path):
    for stage in STAGES:
        one, two = weights(expected, stage), weights(found, stage)
        assert one.keys() == two.keys()
        for name in one:
            assert torch.allclose(one[name], two[name], rtol=1e-4, atol=1e-5), (stage, name)


@pytest.mark.slow
def test_two_ddp_processes_take_the_steps_of_one(tmp_path, capsys):
    losses = logged_losses(on_one_process(tmp_path / "one", schedule(4), capsys))
    output = on_two_processes(tmp_path / "two", schedule(2))
    assert_close(tmp_path / "two", tmp_path / "one")
    assert len(losses) == 4 and logged_losses(output) == pytest.approx(losses, rel=1e-3)
    assert sorted(path.name for path in (tmp_path / "two" / STAGES[0]).iterdir()) == [
        "measured.json",
        "model",
        "settings.json",
    ]


@pytest.mark.slow
def test_a_ddp_process_whose_rows_have_no_picture_takes_part(tmp_path, capsys):
    """In stage 1 nothing of its loss reaches what trains, which others wait for; their safety losses stay whole."""
    order = dict(train_sampling_strategy="sequential")
    losses = logged_losses(on_one_process(tmp_path / "one", schedule(2, **order), capsys, "13"))
    output = on_two_processes(tmp_path / "two", schedule(1, **order), "13")
    assert_close(tmp_path / "two", tmp_path / "one")
    assert len(losses) == 4 and logged_losses(output) == pytest.approx(losses, rel=1e-3)


@pytest.mark.slow
@needs_cpu_events
def test_fsdp_with_lora_takes_the_steps_of_one_process_and_resumes(tmp_path, capsys):
    lora = {"lora_r": 4}
    losses = logged_losses(on_one_process(tmp_path / "one", schedule(4, lora), capsys))
    sharded = schedule(2, lora, fsdp=True, save_strategy="steps", save_steps=1)
    output = on_two_processes(tmp_path / "two", sharded)
    assert_close(tmp_path / "two", tmp_path / "one")
    assert len(losses) == 4 and logged_losses(output) == pytest.approx(losses, rel=1e-3)

    whole = [weights(tmp_path / "two", stage) for stage in STAGES]
    for stage in STAGES:  # as if both stages had been interrupted in their second step
        assert (tmp_path / "two" / stage / "checkpoint-1" / "pytorch_model_fsdp_0").is_dir()
        shutil.rmtree(tmp_path / "two" / stage / "model")
        shutil.rmtree(tmp_path / "two" / stage / "checkpoint-2")
    output = on_two_processes(tmp_path / "two", sharded)
    assert len(logged_losses(output)) == 2
    for stage, expected in zip(STAGES, whole, strict=True):
        found = weights(tmp_path / "two", stage)
        assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.slow
@needs_cpu_events
def test_fsdp_trains_the_whole_language_model_as_one_process_does(tmp_path, capsys):
    on_one_process(tmp_path / "one", schedule(4), capsys)
    on_two_processes(tmp_path / "two", schedule(2, fsdp=True))
    assert_close(tmp_path / "two", tmp_path / "one")


def test_processes_know_which_one_writes_before_anything_is_written(tmp_path, monkeypatch):
    """On the CPU, accelerate takes each process for the only one until the training arguments say otherwise."""

    class Checked(Exception):
        pass

    def check(folder, settings):
        assert PartialState._shared_state
        raise Checked

    PartialState._reset_state()
    monkeypatch.setattr(schedule_module, "check_stage", lambda *args: None)
    monkeypatch.setattr(schedule_module, "check_same_run", check)
    with pytest.raises(Checked):
        run_schedule(None, None, [None], tmp_path, Recipe([{"stage": "safety_alignment", "use_cpu": True}]))
