"""Invariant 6: a saved model loads through the Auto classes and the pipeline in a process without safevlm."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny import answers, encode, picture, safe_model, tiny_llava

QUESTIONS = ["What is in the picture?", "yes"]
# The model's own policy gives every request a hint; the call's policy refuses every request.
HINT_ALL = {"level_actions": dict.fromkeys(("none", "low", "medium", "high"), "caution")}
REFUSE_ALL = {
    "level_actions": dict.fromkeys(("none", "low", "medium", "high"), "refuse"),
    "refusals": {"en": "Not about {category}."},  # not saved with the model
}


@pytest.fixture(scope="module")
def local_model(processor):
    """The model in this process."""
    return safe_model(tiny_llava(), processor, safety_policy=HINT_ALL)


@pytest.fixture(scope="module")
def inputs(processor):
    return encode(processor, QUESTIONS, [1, 1])


@pytest.fixture(scope="module")
def fresh_process(local_model, processor, tmp_path_factory):
    """The results of a fresh process that loads the saved folder."""
    folder = tmp_path_factory.mktemp("saved")
    local_model.save_pretrained(folder)
    processor.save_pretrained(folder)
    for i in range(2):
        picture(i).save(folder / f"{i}.png")
    request = {"images": ["0.png", "1.png"], "questions": QUESTIONS, "policy": REFUSE_ALL}
    (folder / "request.json").write_text(json.dumps(request))
    script = Path(__file__).with_name("fresh_process.py")
    environment = {**os.environ, "HF_MODULES_CACHE": str(folder / "modules"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, script, folder], env=environment, cwd=folder, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return {**json.loads((folder / "result.json").read_text()), "stderr": done.stderr}


def test_the_saved_folder_holds_all_its_code(local_model, processor, tmp_path):
    local_model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    code = {path.name for path in tmp_path.glob("*.py")}
    folders = [Path(sys.modules[name].__file__).parent for name in ("safevlm", "safevlm.processing")]
    package_only = {"__init__.py", "__main__.py", "registration.py"}
    package_only |= {"from_base.py", "safety_adapter.py", "adapter_files.py", "files.py", "policy_file.py"}
    assert code == {path.name for folder in folders for path in folder.glob("*.py")} - package_only
    assert json.loads((tmp_path / "config.json").read_text())["auto_map"] == {
        "AutoConfig": "configuration_safevlm.SafeVlmConfig",
        "AutoModel": "modeling_safevlm.SafeVlmForConditionalGeneration",
        "AutoModelForImageTextToText": "modeling_safevlm.SafeVlmForConditionalGeneration",
        "AutoModelForMultimodalLM": "modeling_safevlm.SafeVlmForConditionalGeneration",
    }


@pytest.mark.parametrize("auto", ["AutoModel", "AutoModelForImageTextToText"])
def test_a_fresh_process_computes_the_same(local_model, inputs, fresh_process, auto):
    result = fresh_process[auto]
    assert result["class"] == "SafeVlmForConditionalGeneration"
    assert result["module"].startswith("transformers_modules.")
    assert fresh_process["input_ids"] == inputs["input_ids"].tolist()
    with torch.no_grad():
        expected = local_model(**inputs)
    torch.testing.assert_close(torch.tensor(result["logits"]), expected.logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        torch.tensor(result["safety_level_logits"]), expected.safety_level_logits, rtol=1e-4, atol=1e-4
    )
    assert result["sequences"] == local_model.generate(**inputs).tolist()


def test_the_pipeline_gives_answer_and_verdict_and_never_the_hint(local_model, processor, inputs, fresh_process):
    pipe = fresh_process["pipeline"]
    expected = answers(processor, local_model.generate(**inputs, max_new_tokens=80), inputs)
    verdict = local_model.assess(**inputs).to_list()
    assert pipe["class"] == "SafeVlmPipeline"
    for result in (pipe["list"], pipe["batched"]):
        records = [record for records in result for record in records]
        # The stock pipeline drops the white space between prompt and answer.
        assert [record["generated_text"].strip() for record in records] == [text.strip() for text in expected]
        assert [record["safety"]["action"] for record in records] == ["caution", "caution"]
        assert records[1]["safety"]["score"] == pytest.approx(verdict[1]["score"], abs=1e-4)
    assert pipe["single"][0]["generated_text"] == pipe["list"][0][0]["generated_text"]
    assert pipe["full"]["role"] == "assistant"
    assert pipe["full"]["content"].strip() == expected[0].strip()
    everything = json.dumps(pipe)
    assert "Note: this request" not in everything and "ASSISTANT:" not in pipe["single"][0]["generated_text"][:12]


def test_a_pipeline_call_can_bring_its_own_policy(local_model, inputs, processor, fresh_process):
    off = answers(processor, local_model.generate(**inputs, safety_policy="off", max_new_tokens=80), inputs)[0]
    result = fresh_process["pipeline"]["off"][0]
    assert result["generated_text"].strip() == off.strip() and result["safety"]["action"] == "off"
    for records, verdict in zip(
        fresh_process["pipeline"]["policy"], local_model.assess(**inputs).to_list(), strict=True
    ):
        category = verdict["category"]
        assert records[0]["generated_text"].strip() == f"Not about {category}."
        assert records[0]["safety"]["action"] == "refuse"


def test_the_pipeline_returns_a_verdict_with_every_beam(fresh_process):
    assert [len(records) for records in fresh_process["pipeline"]["beams"]] == [2, 2]
    scores = [{record["safety"]["score"] for record in records} for records in fresh_process["pipeline"]["beams"]]
    assert [len(row) for row in scores] == [1, 1] and scores[0] != scores[1]


def test_loading_gives_no_warnings(fresh_process):
    complaints = [
        line for line in fresh_process["stderr"].splitlines() if "newly initialized" in line or "MISSING" in line
    ]
    assert not complaints
