"""A push with the command, then a load by repository id without the package, gives the same model."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import HfApi
from loopback import LoopbackHub
from tiny import answers, encode, picture

from safevlm import SafeVlmPipeline

SAFEVLM = Path(sys.executable).with_name("safevlm")
QUESTION = "What is in the picture?"


@pytest.fixture(scope="module")
def there(saved_once, tmp_path_factory):
    """The Hub after `safevlm push` with small shards, what that printed, and what a fresh process computed."""
    folder = tmp_path_factory.mktemp("fresh")
    picture(0).save(folder / "picture.png")
    with LoopbackHub() as hub:
        variables = {**os.environ, **hub.environment(folder / "home"), "OMP_NUM_THREADS": "1"}

        def call(*command):
            done = subprocess.run(
                list(map(str, command)), env=variables, cwd=folder, capture_output=True, text=True, timeout=300
            )
            assert done.returncode == 0, done.stderr[-3000:]
            return done.stdout

        pushed = call(SAFEVLM, "push", saved_once, "--repo-id", "me/tiny-safe", "--max-shard-size", "200KB")
        commit = hub.repo("me/tiny-safe").sha("main")
        script = Path(__file__).with_name("fresh_hub.py")
        result = call(sys.executable, script, "me/tiny-safe", commit, QUESTION)
        yield hub, pushed, json.loads(result.rpartition("RESULT ")[2])


def test_the_hub_holds_the_whole_model_in_private(there, saved_once):
    hub, pushed, _ = there
    (created,) = hub.created
    assert created.get("visibility") == "private" or created.get("private") is True
    repo = hub.repo("me/tiny-safe")
    assert repo.private and len(repo.commits) == 1
    shards = {name for name in repo.files if name.endswith(".safetensors")}
    assert len(shards) > 2 and "model.safetensors" not in shards
    assert set(json.loads(repo.files["model.safetensors.index.json"])["weight_map"].values()) == shards
    assert all(len(repo.files[name]) < 250_000 for name in shards)
    rest = {path.name for path in saved_once.iterdir()} - {"model.safetensors"}
    assert set(repo.files) == shards | rest | {"model.safetensors.index.json", "policy.yaml"}
    assert "me/tiny-safe (private): http://127.0.0.1" in pushed.splitlines()[-1]


def test_the_pushed_policy_is_the_model_s(there, pushed_model):
    hub, *_ = there
    policy = yaml.safe_load(hub.repo("me/tiny-safe").files["policy.yaml"])
    assert policy == pushed_model.config.safety_policy


@pytest.mark.parametrize("auto", ["AutoModel", "AutoModelForImageTextToText"])
def test_a_fresh_process_gets_the_same_outputs_by_repository_id(there, pushed_model, processor, auto):
    *_, result = there
    inputs = encode(processor, [QUESTION], [1])
    with torch.no_grad():
        expected = pushed_model(**inputs)
    found = result[auto]
    assert found["module"].startswith("transformers_modules.")
    assert result["input_ids"] == inputs["input_ids"].tolist()
    for name in ("logits", "safety_level_logits"):
        torch.testing.assert_close(torch.tensor(found[name]), expected[name], rtol=1e-4, atol=1e-4)
    assert found["sequences"] == pushed_model.generate(**inputs).tolist()


def test_the_pipeline_answers_by_repository_id(there, pushed_model, processor):
    *_, result = there
    inputs = encode(processor, [QUESTION], [1])
    expected = answers(processor, pushed_model.generate(**inputs, max_new_tokens=8), inputs)[0]
    assert result["pipeline"]["generated_text"].strip() == expected.strip()
    assert result["pipeline"]["safety"]["score"] == pytest.approx(
        pushed_model.assess(**inputs).to_list()[0]["score"], abs=1e-4
    )


def test_the_card_s_example_runs_as_it_stands_and_prints_answer_and_verdict(there, pushed_model, processor):
    *_, result = there
    inputs = encode(processor, [QUESTION], [1])
    verdict = ast.literal_eval(result["example"][-1])
    assert verdict["action"] == pushed_model.assess(**inputs).to_list()[0]["action"]
    expected = answers(processor, pushed_model.generate(**inputs, max_new_tokens=64), inputs)[0]
    assert "\n".join(result["example"][:-1]).strip() == expected.strip()


CODE = {"modeling_safevlm.py", "pipeline_safevlm.py", "processing_safevlm.py", "configuration_safevlm.py"}
MODEL = {"config.json", "generation_config.json", "processor_config.json", "tokenizer.json", "chat_template.jinja"}


def test_push_to_hub_of_transformers_works_for_model_and_processor(hub, pushed_model, processor):
    pushed_model.push_to_hub("me/theirs", private=True, max_shard_size="200KB")
    processor.push_to_hub("me/theirs")
    files = set(HfApi().list_repo_files("me/theirs"))
    assert hub.repo("me/theirs").private
    assert CODE | MODEL | {"model.safetensors.index.json"} <= files


def test_push_to_hub_of_transformers_works_for_the_pipeline(hub, pushed_model, processor):
    SafeVlmPipeline(model=pushed_model, processor=processor).push_to_hub("me/pipe", private=True)
    assert hub.repo("me/pipe").private
    assert CODE | MODEL <= set(HfApi().list_repo_files("me/pipe"))
