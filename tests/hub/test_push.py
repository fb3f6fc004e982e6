"""`push_to_hub`: what is sent, what is refused, and what happens when the Hub or the network fails."""

import json
import re

import pytest
import torch
from huggingface_hub import HfApi
from loopback import TOKEN
from safetensors.torch import load_file, save_file

from safevlm.model_card import push_to_hub, write_card
from safevlm.model_card.push import CommitOptions
from safevlm.trainer.cli import main

STAGE = {"stage": "safety_alignment", "arguments": {"trainable": ["safety"]}}


@pytest.fixture
def run(capsys):
    """`run("push", ...)`: exit code, standard output, standard error."""

    def call(*arguments):
        code = main([str(a) for a in arguments])
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err
        lines = [line for line in captured.err.splitlines() if line.startswith("safevlm ")]  # not progress bars
        return code, captured.out, "".join(f"{line}\n" for line in lines)

    return call


# -- what goes


def test_a_dry_run_lists_what_would_go_and_sends_nothing(hub, saved, run):
    (saved / "notes.txt").write_text("mine")
    before = {path.name: path.read_bytes() for path in saved.iterdir()}
    code, out, _ = run("push", saved, "--repo-id", "me/m", "--dry-run")
    assert code == 0 and hub.requests == []
    listed = dict(reversed(line.rsplit("  ", 1)) for line in out.splitlines()[:-1])
    assert listed.pop("notes.txt").strip() == "not sent"
    assert set(listed) == {*before, "policy.yaml"} - {"notes.txt"}
    size = (saved / "model.safetensors").stat().st_size
    assert listed["model.safetensors"].strip() == f"{size / 1e3:.1f} kB"
    assert re.fullmatch(
        rf"Dry run: {len(listed)} files, [\d.]+ [kM]B would go to me/m \(private\)\.", out.splitlines()[-1]
    )
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before


def test_only_files_of_a_model_go(hub, saved):
    for name in ("notes.txt", "train.py", "data.jsonl", "secret.yaml"):
        (saved / name).write_text("x = 1\n")
    (saved / "plots").mkdir()
    (saved / "plots" / "a.png").write_bytes(b"\x89PNG")
    (saved / "LICENSE").write_text("MIT\n")
    push = push_to_hub(saved, "me/m")
    files = hub.repo("me/m").files
    assert set(push.files) == set(files)
    assert {"plots/a.png", "LICENSE", "policy.yaml", "README.md"} <= set(files)
    assert push.left_out == ["data.jsonl", "notes.txt", "secret.yaml", "train.py"]


def test_the_card_on_the_hub_names_the_repository(hub, saved):
    push_to_hub(saved, "me/safe-model")
    assert 'model="me/safe-model"' in hub.repo("me/safe-model").files["README.md"].decode()
    assert 'model="model"' in (saved / "README.md").read_text()


def test_a_card_that_a_person_wrote_goes_as_it_is(hub, saved):
    (saved / "README.md").write_text("# By hand\n")
    push_to_hub(saved, "me/m")
    assert hub.repo("me/m").files["README.md"] == b"# By hand\n"


def test_public_is_said_to_the_hub_only_if_asked(hub, saved):
    push_to_hub(saved, "me/open", public=True)
    push_to_hub(saved, "me/closed")
    assert not hub.repo("me/open").private and hub.repo("me/closed").private


@pytest.mark.parametrize(
    "private, public, advice", [(False, False, "pass --public"), (True, True, "leave out --public")]
)
def test_an_existing_repository_must_be_as_private_as_the_push(hub, saved, private, public, advice):
    hub.add("me/m", private=private)
    with pytest.raises(ValueError, match=advice):
        push_to_hub(saved, "me/m", public=public)
    assert hub.repo("me/m").commits == []


def test_a_model_in_memory_is_pushed_with_its_processor(hub, pushed_model, processor, saved):
    push_to_hub(pushed_model, "me/m", processor=processor)
    files = hub.repo("me/m").files
    assert files["model.safetensors"] == (saved / "model.safetensors").read_bytes()
    assert "processor_config.json" in files
    with pytest.raises(ValueError, match="`processor`"):
        push_to_hub(pushed_model, "me/n")


def test_shards_hold_the_same_weights(hub, saved, tmp_path):
    push_to_hub(saved, "me/m", max_shard_size="100KB")
    files = hub.repo("me/m").files
    weights = {}
    for name in [name for name in files if name.endswith(".safetensors")]:
        (tmp_path / name).write_bytes(files[name])
        weights |= load_file(tmp_path / name)
    expected = load_file(saved / "model.safetensors")
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


def test_weights_of_a_former_push_are_deleted(hub, saved):
    push_to_hub(saved, "me/m")
    push_to_hub(saved, "me/m", max_shard_size="200KB")
    assert "model.safetensors" not in hub.repo("me/m").files
    push_to_hub(saved, "me/m")
    assert [n for n in hub.repo("me/m").files if "model" in n and "safetensors" in n] == ["model.safetensors"]


def test_a_branch_is_made_and_main_stays(hub, saved, run):
    hub.add("me/m", files={"README.md": b"old"})
    code, *_ = run("push", saved, "--repo-id", "me/m", "--revision", "v2", "--message", "Second try")
    repo = hub.repo("me/m")
    assert code == 0 and repo.files == {"README.md": b"old"}
    assert "model.safetensors" in repo.branches["v2"] and repo.commits[0]["summary"] == "Second try"


def test_a_pull_request_is_opened_where_one_may_not_write(hub, saved, run):
    hub.read_only.add("them")
    hub.add("them/m", private=False, files={"README.md": b"theirs"})
    code, out, _ = run("push", saved, "--repo-id", "them/m", "--create-pr")
    repo = hub.repo("them/m")
    assert code == 0 and "/them/m/discussions/1" in out.splitlines()[-1]
    assert repo.files == {"README.md": b"theirs"} and "model.safetensors" in repo.branches["refs/pr/1"]
    assert hub.created == []


# -- the adapter


def test_an_adapter_folder_is_pushed_alone(hub, pushed_model, tmp_path):
    pushed_model.save_safety_adapter(tmp_path / "adapter")
    push_to_hub(tmp_path / "adapter", "me/adapter", adapter_only=True)
    files = hub.repo("me/adapter").files
    assert {"safety_adapter.safetensors", "config.json", "README.md", "policy.yaml"} <= set(files)
    assert [name for name in files if name.endswith(".safetensors")] == ["safety_adapter.safetensors"]
    assert "modeling_safevlm.py" not in files and "configuration_safevlm.py" in files
    assert "from_base(" in files["README.md"].decode()


def test_the_adapter_in_a_whole_model_is_what_save_safety_adapter_writes(hub, saved, pushed_model, tmp_path):
    write_card(saved, {"model_name": "M", "training": {"stages": [STAGE]}})
    pushed_model.save_safety_adapter(tmp_path / "adapter")
    expected = load_file(tmp_path / "adapter" / "safety_adapter.safetensors")
    push_to_hub(saved, "me/adapter", adapter_only=True)
    (tmp_path / "got.safetensors").write_bytes(hub.repo("me/adapter").files["safety_adapter.safetensors"])
    got = load_file(tmp_path / "got.safetensors")
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[name], expected[name]) for name in expected)
    config = json.loads(hub.repo("me/adapter").files["config.json"])
    assert config.pop("auto_map") == {"AutoConfig": "configuration_safevlm.SafeVlmConfig"}
    expected = json.loads((tmp_path / "adapter" / "config.json").read_text())
    of_the_whole_model = ("auto_map", "custom_pipelines")
    assert config == {name: value for name, value in expected.items() if name not in of_the_whole_model}


@pytest.mark.parametrize("stages", [[], [STAGE, {"stage": "joint_finetuning", "arguments": {}}]])
def test_an_adapter_is_refused_where_the_language_model_was_trained_or_nobody_knows(saved, stages):
    write_card(saved, {"model_name": "M", "training": {"stages": stages}})
    with pytest.raises(ValueError, match="cannot go alone"):
        push_to_hub(saved, "me/m", adapter_only=True, dry_run=True)


# -- what is refused


@pytest.mark.parametrize(
    "name, what",
    [
        ("pytorch_model.bin", "pickle"),
        ("training_args.bin", "pickle"),
        ("weights.pt", "pickle"),
        ("optimizer.safetensors", "optimizer"),
        ("checkpoint-100/config.json", "checkpoint"),
        (".env", "secrets"),
        ("plots/x.pkl", "pickle"),
    ],
)
def test_pickles_optimizer_states_and_checkpoints_are_refused(hub, saved, run, name, what):
    (saved / name).parent.mkdir(exist_ok=True)
    (saved / name).write_text("x")
    code, _, err = run("push", saved, "--repo-id", "me/m")
    assert code == 1 and err.count("\n") == 1 and repr(name) in err and what in err
    assert hub.requests == []


@pytest.mark.parametrize(
    "secret, what",
    [
        ("hf_" + "aB3" * 12, "Hugging Face token"),
        ("sk-proj-" + "aB3_" * 10, "API key"),
        ("AKIA" + "ABCD1234" * 2, "AWS access key"),
        ("-----BEGIN RSA PRIVATE KEY-----", "private key"),
        ("https://me:pa55word@host/x", "password in a URL"),
        ("/home/alice/models/llava", "path '/home/alice"),
        ("C:\\Users\\Alice\\x", "path"),
        ("/root/models", "path '/root/models'"),
    ],
)
def test_secrets_and_home_paths_are_refused_with_file_line_and_fix(hub, saved, run, secret, what):
    config = json.loads((saved / "generation_config.json").read_text())
    text = json.dumps({"zzz": secret, **config}, indent=2)
    (saved / "generation_config.json").write_text(text)
    code, _, err = run("push", saved, "--repo-id", "me/m")
    assert code == 1 and err.count("\n") == 1
    assert "generation_config.json, line 2: " in err and what in err and "; " in err
    assert secret not in err or "path" in what
    assert hub.requests == []


def test_the_base_s_path_on_this_machine_stays_here(hub, saved):
    config = json.loads((saved / "config.json").read_text())
    config["base_config"]["_name_or_path"] = "/home/bob/llava"
    (saved / "config.json").write_text(json.dumps(config, indent=2))
    push_to_hub(saved, "me/m")
    sent = json.loads(hub.repo("me/m").files["config.json"])
    assert sent.pop("base_config") == {**config.pop("base_config"), "_name_or_path": ""} and sent == config
    assert "/home/bob/llava" in (saved / "config.json").read_text()


def test_the_base_s_id_on_the_hub_goes_along(hub, saved):
    config = json.loads((saved / "config.json").read_text())
    config["base_config"]["_name_or_path"] = "llava-hf/llava-1.5-7b-hf"
    (saved / "config.json").write_text(json.dumps(config, indent=2))
    push_to_hub(saved, "me/m")
    assert hub.repo("me/m").files["config.json"] == (saved / "config.json").read_bytes()


def test_a_push_of_what_is_there_already_says_so(hub, saved, run):
    for expected in ("Sent ", "Nothing to send: me/m has all "):
        code, out, _ = run("push", saved, "--repo-id", "me/m")
        assert code == 0 and out.splitlines()[-1].startswith(expected)
    code, out, _ = run("push", saved, "--repo-id", "me/m", "--create-pr")
    assert code == 0 and out.splitlines()[-1].startswith("Nothing to send")
    assert len(hub.repo("me/m").commits) == 1 and "refs/pr/1" not in hub.repo("me/m").branches


def test_a_pickle_named_safetensors_is_refused(saved):
    torch.save({"x": torch.zeros(2)}, saved / "model.safetensors")
    with pytest.raises(ValueError, match="not a complete safetensors file"):
        push_to_hub(saved, "me/m", dry_run=True)


def test_a_missing_shard_is_refused(saved):
    weights = load_file(saved / "model.safetensors")
    save_file(weights, saved / "model-00001-of-00002.safetensors")
    (saved / "model.safetensors").unlink()
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (saved / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="do not fit each other: model-00002-of-00002"):
        push_to_hub(saved, "me/m", dry_run=True)


def test_code_that_is_not_in_the_folder_is_refused(saved):
    (saved / "modeling_safevlm.py").unlink()
    with pytest.raises(ValueError, match="names the code 'modeling_safevlm"):
        push_to_hub(saved, "me/m", dry_run=True)


def test_what_is_no_safevlm_is_refused(saved, base, tmp_path):
    base.save_pretrained(tmp_path / "base")
    with pytest.raises(ValueError, match="'llava', not a SafeVLM"):
        push_to_hub(tmp_path / "base", "me/m", dry_run=True)
    with pytest.raises(ValueError, match="no config.json"):
        push_to_hub(tmp_path, "me/m", dry_run=True)
    with pytest.raises(ValueError, match="is not a folder"):
        push_to_hub(tmp_path / "nowhere", "me/m", dry_run=True)


@pytest.mark.parametrize("size", ["big", "0", "-5GB", ""])
def test_a_shard_size_must_be_one(saved, size):
    with pytest.raises(ValueError, match="max_shard_size"):
        push_to_hub(saved, "me/m", dry_run=True, max_shard_size=size)


# -- failures


def test_an_interrupted_upload_goes_on_with_what_is_missing(hub, saved, run, waits):
    hub.fail("PUT", "/upload/", None, times=1000, after=2)
    arguments = ("push", saved, "--repo-id", "me/m", "--max-shard-size", "200KB")
    code, _, err = run(*arguments)
    assert code == 1 and "repeat the command, and it goes on with what is missing" in err and err.count("\n") == 1
    assert hub.repo("me/m").commits == []
    arrived = set(hub.blobs)
    assert len(arrived) == 2
    hub.failures.clear()
    hub.requests.clear()
    code, *_ = run(*arguments)
    uploaded = [path.removeprefix("/upload/") for method, path in hub.requests if method == "PUT"]
    shards = [name for name in hub.repo("me/m").files if name.endswith(".safetensors")]
    assert code == 0 and not arrived & set(uploaded)
    assert len(uploaded) == len(shards) - len(arrived)


def test_an_upload_whose_connection_breaks_once_succeeds(hub, saved, waits):
    hub.fail("PUT", "/upload/", None)
    push_to_hub(saved, "me/m")
    assert hub.repo("me/m").files["model.safetensors"] == (saved / "model.safetensors").read_bytes()
    assert hub.sent("PUT", "/upload/") == 2


@pytest.mark.parametrize(
    "method, path",
    [("POST", "/repos/create"), ("GET", "/api/models/me/m$"), ("POST", "/preupload/"), ("POST", "/objects/batch")]
    + [("PUT", "/upload/"), ("POST", "/commit/")],
)
@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_busy_hub_is_asked_again(hub, saved, waits, method, path, status):
    hub.fail(method, path, status, times=2, Retry_After="7")
    push_to_hub(saved, "me/m")
    assert len(hub.repo("me/m").commits) == 1
    assert [wait for wait in waits if wait >= 7], waits


def test_a_hub_that_stays_busy_is_an_error_of_one_line(hub, saved, run, waits):
    hub.fail("POST", "/commit/", 503, times=100)
    code, _, err = run("push", saved, "--repo-id", "me/m")
    assert code == 1 and err.count("\n") == 1 and "(503)" in err and "repeat the command" in err
    assert hub.sent("POST", "/commit/") == 6


def test_a_pull_request_is_not_opened_twice(hub, saved, waits):
    hub.add("me/m", private=False)
    hub.fail("POST", "/commit/", 500)
    with pytest.raises(OSError, match="500"):
        push_to_hub(saved, "me/m", commit=CommitOptions(create_pr=True))
    assert hub.sent("POST", "/commit/") == 1


def test_a_wrong_token_says_how_to_log_in(hub, saved, run, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    code, _, err = run("push", saved, "--repo-id", "me/m")
    assert code == 1 and err.count("\n") == 1 and "(401)" in err and "hf auth login" in err and TOKEN not in err


def test_a_missing_repository_is_named(hub, saved, run):
    code, _, err = run("push", saved, "--repo-id", "me/nowhere", "--create-pr")
    assert code == 1 and err.count("\n") == 1
    assert "me/nowhere does not exist" in err and "leave out --create-pr" in err


def test_a_namespace_of_others_is_refused(hub, saved, run):
    hub.read_only.add("them")
    code, _, err = run("push", saved, "--repo-id", "them/m")
    assert code == 1 and err.count("\n") == 1 and "may not write to them/m" in err and "--create-pr" in err


def test_a_hub_that_cannot_be_reached_is_named(hub, saved, run, waits, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    code, _, err = run("push", saved, "--repo-id", "me/m")
    assert code == 1 and err.count("\n") == 1 and "http://127.0.0.1:9" in err


def test_a_bad_repository_id_is_refused_before_anything_is_read(hub, saved, run):
    code, _, err = run("push", saved, "--repo-id", "a/b/c")
    assert code == 1 and "a/b/c" in err and hub.requests == []


def test_a_second_push_of_the_same_files_makes_no_commit(hub, saved):
    push_to_hub(saved, "me/m")
    push_to_hub(saved, "me/m")
    assert len(hub.repo("me/m").commits) == 1
    assert sorted(HfApi().list_repo_files("me/m")) == sorted(hub.repo("me/m").files)
