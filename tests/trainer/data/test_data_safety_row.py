"""The row schema: what a row may be, and errors that say what is wrong."""

import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from safevlm.trainer.data import (
    PAPER_LABELS,
    DataError,
    ImageError,
    SafetyLabels,
    SafetyRow,
    label_ids,
)

IMAGE = {"type": "image"}
PICTURE = Image.new("RGB", (2, 2))


def text(value):
    return {"type": "text", "text": value}


def turn(role, *content):
    return {"role": role, "content": list(content)}


USER, ASSISTANT = turn("user", text("Hi")), turn("assistant", text("Hello"))


@pytest.mark.parametrize(
    "messages",
    [
        [USER],
        [USER, ASSISTANT],
        [turn("system", text("Be kind")), USER, ASSISTANT, USER],
        [turn("user", IMAGE), ASSISTANT],
        [turn("user", text("one"), IMAGE, text("two")), ASSISTANT],
        [USER, ASSISTANT, turn("user", IMAGE, text("and this?")), ASSISTANT],
    ],
)
def test_well_formed_conversations_are_accepted(messages):
    images = [PICTURE] * sum(IMAGE in message["content"] for message in messages)
    row = SafetyRow("r", images, messages)
    assert row.images == tuple(images) and (row.category, row.level) == (None, None)


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([], "non-empty list"),
        ("Hi", "non-empty list"),
        ([None], "exactly the keys"),
        ([{"role": "user"}], "exactly the keys"),
        ([turn("tool", text("x"))], "has the role 'tool'"),
        ([turn(["user"], text("x"))], "has the role"),
        ([{"role": "user", "content": "Hi"}], "list of parts"),
        ([turn("system", text("x"))], "no user turn"),
        ([ASSISTANT, USER], "turn 1 is from 'assistant', expected 'user'"),
        ([turn("system", text("x")), ASSISTANT], "turn 2 is from 'assistant', expected 'user'"),
        ([USER, USER], "turn 2 is from 'user', expected 'assistant'"),
        ([USER, ASSISTANT, turn("system", text("x"))], "turn 3 is from 'system'"),
        ([turn("user", text(" \n"))], r"turn 1 \(user\) is empty"),
        ([USER, turn("assistant")], r"turn 2 \(assistant\) is empty"),
        ([turn("user", text(3))], "text must be a string"),
        ([turn("user", text("half \ud83d"))], "not valid Unicode"),
        ([USER, turn("assistant", IMAGE)], "in user turns"),
        ([turn("user", {"type": "video"})], "allowed are"),
        ([turn("user", {"type": "image", "url": "http://example.org/x.png"})], "without other keys"),
        ([turn("user", {**text("x"), "path": "/etc/hostname"})], "without other keys"),
        ([turn("user", IMAGE)], r"0 image\(s\) but 1 image part"),
    ],
)
def test_malformed_conversation_is_an_error_naming_row_and_turn(messages, reason):
    with pytest.raises(DataError, match=reason) as caught:
        SafetyRow("row-9", (), messages)
    assert "'row-9'" in str(caught.value)


def test_images_without_a_part_are_an_error():
    with pytest.raises(DataError, match=r"1 image\(s\) but 0 image part"):
        SafetyRow("r", (PICTURE,), [USER])


@pytest.mark.parametrize("labels", [{"category": -1}, {"level": 1.0}, {"category": True}, {"level": "high"}])
def test_labels_must_be_indices(labels):
    with pytest.raises(DataError, match="label index or None"):
        SafetyRow("r", (), [USER], **labels)


def test_images_load_lazily_and_errors_name_the_row(image_folder):
    row = SafetyRow("r1", (image_folder / "a.png", image_folder / "broken.png"), [turn("user", IMAGE, IMAGE)])
    with pytest.raises(ImageError, match=r"row 'r1': image '.*broken.png' is truncated"):
        row.load_images()
    row = SafetyRow("r2", (image_folder / "a.png", PICTURE), [turn("user", IMAGE, IMAGE)])
    assert [image.size for image in row.load_images()] == [(4, 4), (2, 2)]
    with pytest.raises(ImageError, match="`max_pixels`"):
        row.load_images(max_pixels=4)


def test_labels_are_given_as_indices_or_names():
    assert label_ids(6, 0) == label_ids("safe", "none") == (6, 0)
    assert label_ids("illegal risk", 3) == (1, 3)
    assert label_ids(1, 1, SafetyLabels(("safe", "deepfake"), ("no", "yes"))) == (1, 1)


@pytest.mark.parametrize("value", [7, -1, "6", "porn", 1.5, float("inf"), True, [1], {}])
def test_unknown_label_is_an_error_listing_the_known_ones(value):
    for category, level, field in ((value, 0, "category"), (6, value, "level")):
        with pytest.raises(DataError, match=f"unknown {field} .*0 (politics|none)"):
            label_ids(category, level)


def test_safe_row_with_a_risk_level_is_a_contradiction_but_a_risky_category_may_be_harmless():
    with pytest.raises(DataError, match=r"'safe' contradicts level 'high' \(3\)"):
        label_ids(6, 3)
    assert label_ids(PAPER_LABELS.category_names.index("misleading"), 0) == (5, 0)


def test_data_modules_do_not_import_torch_or_datasets():
    # Loaded as a package of its own: the parents `safevlm` and `safevlm.trainer` may import what they like.
    code = (
        "import importlib.util, sys, types\n"
        "safevlm = sys.modules['safevlm'] = types.ModuleType('safevlm')\n"
        "safevlm.__path__ = [sys.argv[2]]\n"
        "spec = importlib.util.spec_from_file_location('data', sys.argv[1])\n"
        "module = sys.modules['data'] = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(module)\n"
        "sys.exit(sorted({'torch', 'transformers', 'datasets'} & set(sys.modules)) or 0)\n"
    )
    import safevlm
    import safevlm.trainer.data as package

    arguments = [package.__file__, str(Path(safevlm.__file__).parent)]
    result = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
