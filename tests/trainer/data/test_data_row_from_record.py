"""Rows as people write them in Python: one mapping, one row."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from safevlm.trainer.data import DataError, SafetyLabels, row_from_record

PICTURE = Image.new("RGB", (4, 4), "red")
IMAGE = {"type": "image"}
QUESTION = {"type": "text", "text": "How is this made?"}
ANSWER = {"role": "assistant", "content": "I can't help with that."}
OWN = SafetyLabels(("fine", "deepfake"), ("no", "yes"), "fine")


def png():
    file = io.BytesIO()
    PICTURE.save(file, "PNG")
    return file.getvalue()


@pytest.mark.parametrize("content", [QUESTION["text"], [IMAGE, QUESTION]])
@pytest.mark.parametrize("labels", [{"safe_type": 1, "safe_level": 3}, {"category": "illegal risk", "level": "high"}])
@pytest.mark.parametrize("image", [PICTURE, "a.png", {"bytes": png(), "path": None}, png()])
def test_messages_images_and_labels_side_by_side_are_a_row(content, labels, image):
    record = {"messages": [{"role": "user", "content": content}, ANSWER], "images": [image], **labels}
    row = row_from_record(record, SafetyLabels(), "row 7")
    assert row.messages[0]["content"] == [IMAGE, QUESTION]
    assert (row.category, row.level, row.row_id, row.metadata) == (1, 3, "row 7", {})
    assert len(row.images) == 1
    if image != "a.png":
        assert row.load_images()[0].getpixel((0, 0)) == (255, 0, 0)


def test_pictures_in_the_parts_and_rows_without_answer_picture_or_label_are_read():
    turn = {"role": "user", "content": [{"type": "image", "image": PICTURE}, QUESTION]}
    row = row_from_record({"id": 5, "messages": [turn], "category": "privacy", "author": "Ann", "note": None})
    assert (row.images, row.category, row.level, row.row_id) == ((PICTURE,), 4, None, "5")
    assert row.metadata == {"author": "Ann"}
    row = row_from_record({"messages": [{"role": "user", "content": "Hi"}], "image": None})
    assert (row.images, row.category, row.level) == ((), None, None)


def test_own_labels_are_read_by_name_and_index():
    record = {"messages": [{"role": "user", "content": "Hi"}]}
    for given in ({"safe_type": 1, "safe_level": "yes"}, {"category": "deepfake", "level": 1}):
        row = row_from_record({**record, **given}, OWN)
        assert (row.category, row.level) == (1, 1)
    with pytest.raises(DataError, match="row 'x': `category`: unknown category 'privacy'.*0 fine, 1 deepfake"):
        row_from_record({**record, "category": "privacy"}, OWN, "x")


def test_labels_of_tables_and_tensors_are_read():
    record = {"messages": [{"role": "user", "content": "Hi"}]}
    for label in (1.0, np.int64(1), np.float32(1), np.array(1), torch.tensor(1)):
        row = row_from_record({**record, "category": label, "level": float("nan")})
        assert (row.category, row.level) == (1, None)
    with pytest.raises(DataError, match="unknown category 1.5"):
        row_from_record({**record, "category": 1.5})


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (5, "must be a mapping"),
        ({"text": "Hi"}, r"no known format, it has the keys \['text'\]"),
        ({"messages": "Hi"}, "`messages` must be a non-empty list of turns, got 'Hi'"),
        ({"messages": [{"role": "user", "content": "Hi"}], "video": "a.mp4"}, "`video` .*looks like a picture"),
        (
            {"messages": [{"role": "user", "content": "Hi"}], "images": [PICTURE, PICTURE]},
            "2 in `images` but 0 <image>",
        ),
        ({"messages": [{"role": "user", "content": [IMAGE, QUESTION]}]}, "0 image.* but 1 image part"),
        ({"messages": [{"role": "user", "content": "Hi"}], "safe_type": 6, "level": 2}, "contradicts level 'medium'"),
        ({"messages": [{"role": "user", "content": "Hi"}], "safe_type": 1, "category": "safe"}, "differ.*keep one"),
    ],
)
def test_what_cannot_be_a_row_is_an_error_that_names_it(record, reason):
    with pytest.raises(DataError, match=f"row 'r1': .*{reason}") as caught:
        row_from_record(record, SafetyLabels(), "r1")
    assert str(caught.value).count("row 'r1'") == 1
