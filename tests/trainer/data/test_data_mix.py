"""Mixes: balanced, deduplicated, without leaks, reproducible to the byte, and accounted for."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image
from tiny import psa_vlm_record, write_jsonl

from safevlm.trainer.data import DataError, read_rows
from safevlm.trainer.data import mix as mix_module
from safevlm.trainer.data.fingerprints import ImageIndex
from safevlm.trainer.data.mix import mix
from safevlm.trainer.data.mix_recipe import MIXES, MixRecipe

IMAGES = 24


def picture(seed):
    noise = np.random.default_rng(seed).integers(0, 255, (24, 24, 3), np.uint8)
    return Image.fromarray(noise).resize((96, 64), Image.Resampling.BICUBIC)


def record(name, image, category, level, question="What is it?"):
    return psa_vlm_record(name, image, (category, level), question, "An answer.")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    for number in range(IMAGES):
        picture(number).save(folder / f"{number}.png")
        picture(number).save(folder / f"{number}.jpg", quality=60)
    return folder


@pytest.fixture
def root(tmp_path, pictures):
    """A data root: `risky.jsonl` (6 illegal, 4 privacy), `clean.json` (10 rows), `test.jsonl` (1 row), `images/`."""
    folder = tmp_path / "root"
    folder.mkdir()
    shutil.copytree(pictures, folder / "images")
    risky = [record(f"r{n}", f"{n}.png", 1 if n < 6 else 4, 3) for n in range(10)]
    clean = [
        {
            "id": f"c{n}",
            "image": f"{n + 10}.png",
            "conversations": [{"from": "human", "value": "<image>\nWho?"}, {"from": "gpt", "value": "Me."}],
        }
        for n in range(10)
    ]
    write_jsonl(folder / "risky.jsonl", risky)
    (folder / "clean.json").write_text(json.dumps(clean))
    write_jsonl(folder / "test.jsonl", [record("t0", "23.png", 6, 0)])
    return folder


RISKY = {"name": "risky", "path": "risky.jsonl", "images": "images"}
CLEAN = {"name": "clean", "path": "clean.json", "images": "images", "assume_safe": True}


@pytest.fixture
def build(root, tmp_path):
    """`build(**entries)`: the manifest, and the rows of train.jsonl, read back."""

    def build(output="out", sources=(RISKY, CLEAN), **entries):
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump({"sources": list(sources), **entries}))
        recipe = MixRecipe.load(path)
        manifest = mix(recipe, root, tmp_path / output, progress=False)
        base = tmp_path / output if recipe.images == "copy" else root
        return manifest, read_rows(tmp_path / output / "train.jsonl", base)

    return build


def ids(rows):
    return [row.row_id for row in rows]


def test_balanced_risky_rows_and_the_clean_ratio(build):
    manifest, rows = build(clean_ratio=0.5)
    assert manifest["splits"]["train"]["categories"] == {"illegal risk": 4, "privacy": 4, "safe": 4}
    assert manifest["splits"]["train"]["levels"] == {"none": 4, "high": 8}
    assert manifest["sources"] == {
        "risky": {"read": 10, "left_out": {"balance": 2}, "chosen": 8},
        "clean": {"read": 10, "left_out": {"clean_ratio": 6}, "chosen": 4},
    }
    assert [row.row_id.split("/")[0] for row in rows] == ["risky"] * 8 + ["clean"] * 4
    assert rows[0].load_images()[0].size == (96, 64)


def test_caps_hold_per_source_and_category(build):
    manifest, _ = build(balance=False, max_per_category=5, sources=[RISKY, {**CLEAN, "max_rows": 3}])
    assert manifest["splits"]["train"]["categories"] == {"illegal risk": 5, "privacy": 4, "safe": 3}
    assert manifest["sources"]["risky"]["left_out"] == {"max_per_category": 1}
    assert manifest["sources"]["clean"]["left_out"] == {"max_rows": 7}


def test_every_row_is_chosen_or_counted(build, root):
    lines = (root / "risky.jsonl").read_text()
    bad = [record("gone", "gone.png", 1, 3), record("label", "0.png", 77, 3), record("copy", "1.jpg", 1, 3)]
    bad += [record("clash", "2.png", 4, 2), record("leak", "23.jpg", 1, 1, "Other?")]
    (root / "risky.jsonl").write_text(lines + "".join(json.dumps(record) + "\n" for record in bad))
    against = [{"path": "test.jsonl", "images": "images"}]
    unlabelled = {**CLEAN, "name": "raw", "assume_safe": False}
    manifest, rows = build(sources=[RISKY, CLEAN, unlabelled], against=against, balance=False)
    left_out = {"bad_row": 1, "conflict": 2, "duplicate": 1, "image": 1, "leak": 1}
    assert manifest["sources"]["risky"] == {"read": 15, "left_out": left_out, "chosen": 9}
    assert manifest["sources"]["raw"] == {"read": 10, "left_out": {"unlabelled": 10}, "chosen": 0}
    for source in manifest["sources"].values():
        assert source["read"] == source["chosen"] + sum(source["left_out"].values())
    assert not {"risky/r2", "risky/clash", "risky/leak", "risky/copy"} & set(ids(rows)) and "risky/r1" in ids(rows)


def test_what_was_dropped_is_listed_with_the_reason(build, root, tmp_path):
    write_jsonl(
        root / "risky.jsonl", [record("a", "0.png", 1, 3), record("b", "0.jpg", 1, 3), record("c", "23.jpg", 1, 3)]
    )
    manifest, _ = build(against=[{"path": "test.jsonl", "images": "images"}], balance=False)
    dropped = [json.loads(line) for line in (tmp_path / "out/dropped.jsonl").read_text().splitlines()]
    assert [(entry["row_id"], entry["reason"]) for entry in dropped] == [("risky/c", "leak"), ("risky/b", "duplicate")]
    assert dropped[0]["detail"] == "has a near duplicate of an image of test row t0"
    assert dropped[1]["detail"] == "says the same as row risky/a"
    assert manifest["dropped"]["rows"] == 2


@pytest.mark.parametrize(("duplicates", "kept"), [("near", ["a"]), ("exact", ["a", "b"]), ("keep", ["a", "b", "c"])])
def test_duplicates_are_removed_as_asked(build, root, duplicates, kept):
    write_jsonl(
        root / "risky.jsonl",
        [record(name, f"0.{kind}", 1, 3) for name, kind in zip("abc", ("png", "jpg", "png"), strict=True)],
    )
    _, rows = build(sources=[RISKY], duplicates=duplicates)
    assert ids(rows) == [f"risky/{name}" for name in kept]


def test_no_image_nor_near_duplicate_is_on_both_sides_of_the_holdout(build, root, tmp_path):
    records = [
        record(f"{n}{kind}", f"{n}.{kind}", 1, 3, f"Question {kind}?") for n in range(10) for kind in ("png", "jpg")
    ]
    write_jsonl(root / "risky.jsonl", records)
    manifest, rows = build(holdout=0.3)
    heldout = read_rows(tmp_path / "out/heldout.jsonl", root)
    index = ImageIndex([*rows, *heldout], progress=False)
    groups = [{index.group(image) for row in side for image in row.images} for side in (rows, heldout)]
    assert groups[0] and groups[1] and not groups[0] & groups[1]
    assert len(rows) + len(heldout) == 30 and manifest["splits"]["heldout"]["rows"] == len(heldout) == 9


def test_the_manifest_names_every_file_with_its_hash(build, root, tmp_path):
    manifest, rows = build(holdout=0.2, images="copy", against=[{"path": "test.jsonl", "images": "images"}])
    output = tmp_path / "out"
    assert manifest == json.loads((output / "manifest.json").read_text())

    def sha256(path):
        return hashlib.sha256(path.read_bytes()).hexdigest()

    names = ("risky.jsonl", "clean.json", "test.jsonl")
    assert manifest["inputs"] == {name: sha256(root / name) for name in names}
    for part in [*manifest["splits"].values(), manifest["dropped"]]:
        assert part["sha256"] == sha256(output / part["file"])
    named = {name: digest for split in manifest["splits"].values() for name, digest in split["images"].items()}
    on_disk = {path.relative_to(output).as_posix() for path in (output / "images").rglob("*") if path.is_file()}
    assert set(named) == on_disk and all(sha256(output / name) == digest for name, digest in named.items())
    assert {"safevlm", "imagehash", "pillow"} <= manifest["versions"].keys()
    assert {image.relative_to(output).as_posix() for row in rows for image in row.images} == set(
        manifest["splits"]["train"]["images"]
    )


def test_referenced_images_must_lie_under_the_root(build, root, tmp_path):
    shutil.move(root / "images", tmp_path / "elsewhere")
    source = {**RISKY, "images": "../elsewhere"}
    with pytest.raises(DataError, match="not under the data root .* or use `images: copy`"):
        build(sources=[source])
    assert not (tmp_path / "out").exists()
    assert build(sources=[source], images="copy")[0]["splits"]["train"]["rows"] == 8


def test_repeated_row_ids_stay_distinct(build, root):
    write_jsonl(root / "risky.jsonl", [record("same", f"{n}.png", 1, 3) for n in range(3)])
    assert ids(build(sources=[RISKY])[1]) == ["risky/same", "risky/same#2", "risky/same#3"]


def test_images_in_a_zip_are_copied(build, root):
    shutil.make_archive(root / "pack", "zip", root, "images")
    manifest, rows = build(sources=[{**RISKY, "images": "pack.zip/images"}], images="copy")
    assert len(rows) == 8 and all(name.endswith(".png") for name in manifest["splits"]["train"]["images"])
    with pytest.raises(DataError, match="use `images: copy`"):
        build("other", sources=[{**RISKY, "images": "pack.zip/images"}])


def tree(folder):
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_two_processes_with_other_hash_seeds_and_file_order_write_the_same_bytes(root, tmp_path):
    elsewhere = tmp_path / "another/place"  # files created in the opposite order
    (elsewhere / "images").mkdir(parents=True)
    for path in sorted(root.rglob("*.*"), reverse=True):
        shutil.copy(path, elsewhere / path.relative_to(root))
    write_jsonl(root / "risky.jsonl", [record(f"{n}", f"{n % 12}.png", 1 + n % 2, 3, f"Q{n}?") for n in range(20)])
    shutil.copy(root / "risky.jsonl", elsewhere)
    (tmp_path / "recipe.yaml").write_text(
        yaml.safe_dump(
            {
                "sources": [RISKY, CLEAN, {**CLEAN, "name": "gone", "images": "."}],
                "against": [{"path": "test.jsonl", "images": "images"}],
                "holdout": 0.3,
                "clean_ratio": 0.4,
                "seed": 3,
                "images": "copy",
            }
        )
    )
    command = [sys.executable, "-m", "safevlm.trainer.cli", "data", "mix", tmp_path / "recipe.yaml"]
    processes = [
        subprocess.Popen(
            [*command, "--root", data, "--output", data.parent / "out"], env={**os.environ, "PYTHONHASHSEED": seed}
        )
        for seed, data in (("1", root), ("2", elsewhere))
    ]
    assert [process.wait(timeout=300) for process in processes] == [0, 0]
    first, second = tree(tmp_path / "out"), tree(elsewhere.parent / "out")
    assert first == second and len(first) > 10


def test_another_seed_draws_other_rows(build):
    chosen = [ids(build(f"out{seed}", seed=seed)[1]) for seed in range(4)]
    assert len({tuple(names) for names in chosen}) > 1


def test_the_same_recipe_replaces_its_result_and_another_is_refused(build, root, tmp_path):
    build(seed=1)
    before = tree(tmp_path / "out")
    build(seed=1)
    assert tree(tmp_path / "out") == before
    with pytest.raises(ValueError, match=r"another recipe \(`seed` differs\)"):
        build(seed=2)
    assert tree(tmp_path / "out") == before


def test_a_folder_that_is_no_mix_is_left_alone(build, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine.txt").write_text("mine")
    with pytest.raises(ValueError, match="is not a mix; choose another folder"):
        build()
    assert tree(tmp_path / "out") == {Path("mine.txt"): b"mine"}


def test_a_crash_while_writing_leaves_the_former_result(build, tmp_path, monkeypatch):
    build()
    before = tree(tmp_path / "out")

    def crash(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(mix_module, "write_safevlm_jsonl", crash)
    with pytest.raises(OSError, match="No space"):
        build()
    assert tree(tmp_path / "out") == before


def test_too_few_clean_rows_are_an_error_not_a_smaller_ratio(build):
    with pytest.raises(
        DataError, match="`clean_ratio` 2.0 asks for 16 clean rows beside 8 risky ones, but there are 10"
    ):
        build(clean_ratio=2.0)


@pytest.mark.parametrize(
    ("entries", "reason"),
    [
        ({}, "lacks `sources`"),
        ({"sources": []}, "at least one data file"),
        ({"sources": [{"name": "a"}]}, "`sources` 1 lacks `path`"),
        ({"sources": [{"path": "a"}]}, "`name` of source 1"),
        ({"sources": [{"name": "a", "path": "a"}] * 2}, "'a' is used twice"),
        ({"sources": [{"name": "a", "path": "a", "limit": 3}]}, "unknown entry `limit`; known are path"),
        ({"sources": [{"name": "a", "path": "a", "max_rows": "3"}]}, "`max_rows` of `sources` 1 must be an integer"),
        ({"sources": [RISKY], "holdout": 1}, r"`holdout` must be in \[0, 1\)"),
        ({"sources": [RISKY], "clean_ratio": float("nan")}, "`clean_ratio` must be at least 0"),
        ({"sources": [RISKY], "balance": "yes please"}, "`balance` of the recipe must be true or false"),
        ({"sources": [RISKY], "seed": True}, "`seed` of the recipe must be an integer"),
        ({"sources": [RISKY], "images": "link"}, "`images` must be one of reference, copy"),
        ({"sources": [RISKY], "near_distance": 256}, "`near_distance` must be in 0..255"),
        ({"sources": [RISKY], "ratio": 1}, "unknown entry `ratio`"),
        ([], "must be a mapping"),
    ],
)
def test_a_bad_recipe_is_refused_naming_file_and_entry(tmp_path, entries, reason):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(entries))
    with pytest.raises(ValueError, match=f"recipe.yaml: .*{reason}"):
        MixRecipe.load(path)


def test_an_unknown_shipped_recipe_is_named():
    with pytest.raises(ValueError, match="'paper' not found; use a .yaml file or one of: paper-stage1, paper-stage2"):
        MixRecipe.load("paper")


@pytest.mark.parametrize("name", sorted(path.stem for path in MIXES.glob("*.yaml")))
def test_shipped_recipes_load_and_round_trip(name):
    recipe = MixRecipe.load(name)
    assert json.loads(json.dumps(recipe.to_dict())) == recipe.to_dict()
    assert recipe.against and recipe.duplicates == "near" and recipe.clean_ratio > 0
