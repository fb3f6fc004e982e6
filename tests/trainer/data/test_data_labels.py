"""One set of labels: where it comes from, what may not be one, and that reading, statistics and mixes go by it."""

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from safevlm import SafeVlmConfig
from safevlm.trainer.data import PAPER_LABELS, DataError, SafetyLabels, Taxonomy, balance, load_labels, read_rows
from safevlm.trainer.data.check import check_files
from safevlm.trainer.data.fingerprints import ImageIndex
from safevlm.trainer.data.labels_file import labels_dict
from safevlm.trainer.data.mix import mix
from safevlm.trainer.data.mix_recipe import MixRecipe
from safevlm.trainer.data.stats import data_stats

REPOSITORY = Path(__file__).parents[3]
OWN = {"category_names": ["fine", "deepfake"], "level_names": ["no", "yes"], "safe_category": "fine"}
LABELS = SafetyLabels(**OWN)


def rows(folder):
    """A labelled file: two risky rows and a clean one."""
    talk = [{"role": "user", "content": "Is it real?"}, {"role": "assistant", "content": "No."}]
    pairs = [("deepfake", "yes"), ("deepfake", 1), ("fine", "no")]
    records = [
        {
            "messages": [{"role": "user", "content": f"{talk[0]['content']} {n}"}, talk[1]],
            "category": c,
            "level": level,
        }
        for n, (c, level) in enumerate(pairs)
    ]
    path = folder / "own.jsonl"
    path.write_text("\n".join(map(json.dumps, records)))
    return path


def test_the_papers_names_stand_once_in_the_repository():
    """Its categories as a list of names, in code or data; a saved model has its own."""
    places = []
    for folder in ("modeling_safevlm", "processing", "trainer", "model_card"):
        for path in (REPOSITORY / folder).rglob("*"):
            if path.suffix == ".py":
                nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
                lists = [node for node in nodes if isinstance(node, (ast.Tuple, ast.List))]
                for node in lists:
                    names = {item.value for item in node.elts if isinstance(item, ast.Constant)}
                    places += [path.name] * (set(PAPER_LABELS.category_names) <= names)
            elif path.suffix in (".yaml", ".yml"):
                places += [path.name] * ("category_names" in path.read_text(encoding="utf-8"))
    assert places == ["safety_labels.py"]
    assert SafeVlmConfig().labels == PAPER_LABELS


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (
            {"category_names": ["fine", "deepfake", "fine"]},
            r"`category_names` has the same name more than once: \['fine",
        ),
        ({"level_names": ["no", " No"]}, "`level_names` has the same name more than once"),
        ({"category_names": ["fine"]}, "`category_names` must have at least two"),
        ({"category_names": "fine"}, "`category_names` must be a list of texts"),
        ({"level_names": [False, True]}, r"`level_names` must be a list of texts, got \[False, True\]; in YAML quote"),
        ({"level_names": ["no", " "]}, "`level_names` must be a list of texts"),
        ({"safe_category": "good"}, "`safe_category` 'good' is not among"),
    ],
)
def test_labels_that_cannot_be_told_apart_are_an_error_everywhere(changes, reason, tmp_path):
    wrong = {**OWN, **changes}
    with pytest.raises(ValueError, match=reason):
        SafetyLabels(**wrong)
    with pytest.raises(ValueError, match=reason):
        SafeVlmConfig(**wrong, safety_policy="off")
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(wrong))
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({"safety": wrong, "stages": []}))
    for source in (wrong, tmp_path / "own.yaml", tmp_path / "recipe.yaml"):
        with pytest.raises(DataError, match=reason):
            load_labels(source)


def test_labels_come_from_a_file_a_recipe_a_model_or_a_mapping(tmp_path):
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(OWN))
    (tmp_path / "own.json").write_text(json.dumps(OWN))
    recipe = {"safety": {**OWN, "num_head_tokens": 8}, "stages": [{"stage": "safety_alignment"}]}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    policy = {"level_actions": {"yes": "refuse"}}
    SafeVlmConfig(**OWN, safety_policy=policy).save_pretrained(tmp_path / "model")
    for source in ("own.yaml", "own.json", "recipe.yaml", "model", "model/config.json"):
        assert load_labels(source, tmp_path) == load_labels(tmp_path / source) == LABELS
    assert load_labels(OWN) == load_labels(recipe) == LABELS
    assert load_labels(None) == load_labels("paper") == load_labels("demo") == PAPER_LABELS
    assert load_labels(labels_dict(LABELS)) == LABELS


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("names: [a, b]", r"unknown entries \['names'\]; known are \['category_names', 'level_names'"),
        ("- a", "must hold some of"),
        ("{", "cannot be read"),
        ('{"model_type": "llava"}', "is a model of type 'llava', not a SafeVLM"),
    ],
)
def test_file_without_labels_is_an_error_that_names_it(content, reason, tmp_path):
    (tmp_path / "x.yaml").write_text(content)
    with pytest.raises(DataError, match=f"`labels` .*x.yaml.*{reason}"):
        load_labels(tmp_path / "x.yaml")


def test_name_of_nothing_is_an_error(tmp_path):
    with pytest.raises(DataError, match=r"'nowhere' is not a file, a model or one of the recipes \['demo', 'paper"):
        load_labels("nowhere")
    with pytest.raises(DataError, match="has no config.json"):
        load_labels(tmp_path)


def test_reading_checking_and_counting_go_by_the_labels(tmp_path):
    path = rows(tmp_path)
    read = read_rows(path, labels=LABELS)
    assert [(row.category, row.level) for row in read] == [(1, 1), (1, 1), (0, 0)]
    with pytest.raises(DataError, match="unknown category 'deepfake'"):
        read_rows(path)
    assert check_files([path], lambda name: read_rows(name, labels=LABELS), progress=False).problems == []
    stats = data_stats(read, [], ImageIndex(read, progress=False), LABELS)
    assert stats["categories_by_level"] == {"fine": {"no": 1, "yes": 0}, "deepfake": {"no": 0, "yes": 2}}
    assert len(balance(read, labels=LABELS)) == 3  # both deepfakes, and as many clean rows as there are


def test_safe_category_may_have_any_name_and_place(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"messages": [{"role": "user", "content": "Hi"}], "category": "fine", "level": "yes"}))
    with pytest.raises(DataError, match=r"category 'fine' contradicts level 'yes' \(1\)"):
        read_rows(path, labels=LABELS)
    own = {"name": "own", "fields": {"question": "q"}, "safe_when": {"ok": [True]}, "labels": ["deepfake", True]}
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(own))
    with pytest.raises(DataError, match="True is none of our levels"):  # YAML's yes
        Taxonomy.load(tmp_path / "own.yaml", LABELS)
    own["labels"] = {"field": "kind", "values": {"a": ["deepfake", "yes"], "b": "fine"}}
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(own))
    records = [{"q": "1", "ok": True}, {"q": "2", "kind": "a"}, {"q": "3", "kind": "b"}]
    path.write_text("\n".join(map(json.dumps, records)))
    read = read_rows(path, taxonomy=tmp_path / "own.yaml", labels=LABELS)
    assert [(row.category, row.level) for row in read] == [(0, 0), (1, 1), (0, 0)]


@pytest.mark.parametrize("labels", [OWN, "own.yaml"])
def test_mix_goes_by_the_labels_of_its_recipe_and_writes_them_down(tmp_path, labels):
    rows(tmp_path)
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(OWN))
    recipe = {"sources": [{"name": "ours", "path": "own.jsonl"}], "balance": True, "labels": labels}
    (tmp_path / "mix.yaml").write_text(yaml.safe_dump(recipe))
    manifest = mix(MixRecipe.load(tmp_path / "mix.yaml"), tmp_path, tmp_path / "out", progress=False)
    assert manifest["labels"] == OWN
    assert manifest["splits"]["train"]["categories"] == {"fine": 1, "deepfake": 2}
    assert len(read_rows(tmp_path / "out/train.jsonl", labels=LABELS)) == 3


def test_commands_take_labels_and_need_no_torch(tmp_path):
    rows(tmp_path)
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(OWN))
    (tmp_path / "mix.yaml").write_text(yaml.safe_dump({"sources": [{"name": "ours", "path": "own.jsonl"}]}))
    # Started as the console script is: then `import safevlm` registers nothing.
    code = (
        "import sys\n"
        "sys.argv[0] = 'safevlm'\n"
        "from safevlm.trainer.cli import main\n"
        "status = main()\n"
        "loaded = {'torch', 'transformers', 'datasets'} & set(sys.modules)\n"
        "sys.exit(f'{loaded} loaded' if loaded else status)"
    )

    def run(*arguments):
        command = [sys.executable, "-c", code, "data", *arguments]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)

    checked = run("check", "own.jsonl", "--labels", "own.yaml")
    assert checked.returncode == 0 and "3 rows of 1 file, 0 images: no problems" in checked.stdout, checked.stderr
    counted = run("stats", "own.jsonl", "--labels", "own.yaml")
    assert re.search(r"^deepfake +0 +2 +2$", counted.stdout, re.MULTILINE), counted.stderr
    mixed = run("mix", "mix.yaml", "--output", "out", "--labels", "own.yaml")
    assert "train.jsonl: 3 rows, 0 images (1 fine, 2 deepfake)" in mixed.stdout, mixed.stderr
    unknown = run("check", "own.jsonl")
    assert unknown.returncode == 1 and "row own.jsonl:1: line 1: `category`: unknown category" in unknown.stdout
    nowhere = run("check", "own.jsonl", "--labels", "nowhere.yaml")
    assert nowhere.returncode == 1 and "`labels` 'nowhere.yaml' is not a file" in nowhere.stderr


def test_training_a_safe_model_further_keeps_its_labels(tmp_path):
    from safevlm.trainer.training_options import TrainOptions
    from safevlm.trainer.training_run import train_from_files

    SafeVlmConfig(**OWN, safety_policy={"level_actions": {"yes": "refuse"}}).save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="`labels` 'paper' are not those of the base, a SafeVLM: .*deepfake"):
        train_from_files(
            TrainOptions(tmp_path / "model", [rows(tmp_path)], tmp_path / "out", labels="paper", recipe="demo")
        )
