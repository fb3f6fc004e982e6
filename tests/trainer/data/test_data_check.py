"""Checking: every kind of problem is found with its row, and nothing stops it."""

import functools
import json

import pytest
from PIL import Image

from safevlm.trainer.data import read_rows
from safevlm.trainer.data.check import check_files


@pytest.fixture
def check(image_folder):
    """`check(*paths, **options)` with the test images."""

    def check(*paths, require_answer=True, **options):
        read = functools.partial(
            read_rows,
            image_folder=image_folder,
            check_images="none",
            require_answer=False,
            on_error="skip",
            **options,
        )
        return check_files(paths, read, require_answer=require_answer, progress=False)

    return check


def found(report):
    return [(problem.row_id, problem.kind) for problem in report.problems]


def test_good_rows_have_no_problem(check, write, safevlm_record):
    report = check(write([safevlm_record(id=f"{n}", image=f"{n}.png") for n in "abc"]))
    assert report.problems == [] and report.num_images == 3
    assert report.summary() == "3 rows of 1 file, 3 images: no problems"


def test_every_problem_is_listed_with_row_path_and_reason(check, write, safevlm_record, image_folder):
    (image_folder / "text.png").write_text("no picture")
    turns = safevlm_record()["conversations"]
    path = write(
        [
            safevlm_record(id="good"),
            safevlm_record(id="label", safe_type=17),
            safevlm_record(id="level", safe_level="extreme"),
            safevlm_record(id="contradiction", safe_type=6),
            safevlm_record(id="empty", conversations=[{"from": "USER", "value": " "}, turns[1]]),
            safevlm_record(id="gone", image="gone.png"),
            safevlm_record(id="outside", image="../a.png"),
            safevlm_record(id="silent", conversations=[turns[0], {"from": "ASSISTANT", "value": " "}]),
            safevlm_record(id="two", image="broken.png<split>text.png", conversations=turns[:1]),
            safevlm_record(id="good", image="b.png"),
        ]
    )
    with path.open("a") as file:
        file.write("{not json\n")
    report = check(path)
    assert found(report) == [
        ("label", "row"),
        ("level", "row"),
        ("contradiction", "row"),
        ("outside", "row"),
        ("silent", "row"),
        ("rows.jsonl:11", "row"),
        ("empty", "text"),
        ("gone", "image"),
        ("two", "image"),
        ("two", "image"),
        ("good", "row_id"),
    ]
    reasons = [problem.reason for problem in report.problems]
    for reason, part in zip(
        reasons,
        [
            "unknown category 17",
            "unknown level 'extreme'",
            "contradicts",
            "leaves",
            "(assistant) is empty",
            "JSON",
            "no text",
            "does not exist",
            "truncated or corrupt",
            "not a readable",
            "earlier row",
        ],
        strict=True,
    ):
        assert part in reason
    assert str(report.problems[7]).startswith(f"{path}: row gone: image '{image_folder}/gone.png'")
    assert report.rows == {str(path): 11}
    assert report.summary().splitlines() == [
        "rows without an answer, which train the safety head alone: 1",
        "11 rows of 1 file, 5 images: 11 problems in 10 rows",
    ]


def test_a_row_needs_an_answer_or_a_label_but_for_evaluation(check, write, safevlm_record):
    question = {"conversations": safevlm_record()["conversations"][:1]}
    nothing = {**question, "safe_type": None, "safe_level": None}
    path = write([safevlm_record(id="1", **question), safevlm_record(id="2", image="b.png", **nothing)])
    assert found(check(path)) == [("2", "answer")]
    report = check(path, require_answer=False)
    assert found(report) == [] and (report.unlabelled, report.unanswered) == (1, 2)


def test_unlabelled_rows_are_counted_and_none_labelled_is_a_problem(check, write, safevlm_record):
    nothing = {"safe_type": None, "safe_level": None}
    path = write([safevlm_record(id="1", **nothing), safevlm_record(id="2", image="b.png")])
    report = check(path)
    assert found(report) == [] and report.unlabelled == 1
    assert "rows without a label, which do not train the safety head: 1\n" in report.summary()
    path = write([{"conversations": safevlm_record()["conversations"], "image": "a.png"}])
    report = check(path)
    assert found(report) == [(None, "labels")] and "--assume-safe" in str(report.problems[0])
    assert found(check(path, assume_safe=True)) == []


def test_fields_kept_as_metadata_are_listed_once(check, write, safevlm_record):
    rows = [safevlm_record(id=str(n), image=f"{n}.png", author="Ann") for n in "ab"]
    report = check(write([*rows, safevlm_record(id="c", image="c.png", year=2024)]))
    assert report.problems == [] and report.metadata == {"author": 2, "year": 1}
    assert report.summary().startswith("fields kept as metadata (rows): author (2), year (1)\n3 rows")


def test_the_same_pixels_and_question_with_other_labels_conflict_across_files(
    check, write, safevlm_record, image_folder, tmp_path
):
    Image.open(image_folder / "a.png").save(image_folder / "copy.bmp")
    first = write([safevlm_record(id="1"), safevlm_record(id="2", image="b.png")])
    second = tmp_path / "second.jsonl"
    second.write_text(json.dumps(safevlm_record(id="3", image="copy.bmp", safe_type=4)) + "\n")
    report = check(first, second)
    assert found(report) == [("1", "conflict"), ("3", "conflict")]
    assert f"row 3 of {second}" in report.problems[0].reason and "category 4, level 3" in report.problems[0].reason
    assert f"row 1 of {first}" in report.problems[1].reason


def test_a_row_shared_by_a_bad_image_is_no_conflict_but_named_each_time(check, write, safevlm_record):
    path = write([safevlm_record(id="1", image="broken.png"), safevlm_record(id="2", image="broken.png", safe_type=4)])
    assert found(check(path)) == [("1", "image"), ("2", "image")]


def test_a_file_that_cannot_be_read_is_one_problem_and_the_next_file_is_checked(
    check, write, safevlm_record, tmp_path
):
    path, gone, odd = write([safevlm_record(image="gone.png")]), tmp_path / "gone.jsonl", tmp_path / "odd.jsonl"
    odd.write_text('{"something": "else"}\n')
    report = check(gone, odd, path)
    assert found(report) == [(None, "file"), (None, "file"), ("rows.jsonl:1", "image")]
    assert "cannot be read" in report.problems[0].reason and "no known format" in report.problems[1].reason
    assert report.rows == {str(gone): 0, str(odd): 0, str(path): 1}


def test_the_report_is_json(check, write, safevlm_record):
    path = write([safevlm_record(id="x", image="gone.png")])
    content = json.loads(json.dumps(check(path).to_dict()))
    assert content["rows"] == {str(path): 1} and content["num_images"] == 1
    assert content["problems"][0].keys() == {"path", "row_id", "kind", "reason"}
    assert (content["problems"][0]["row_id"], content["problems"][0]["kind"]) == ("x", "image")


def test_the_real_odd_images_are_told_apart(check, write, safevlm_record, shared_data):
    folder = shared_data / "pillow_odd_images/Tests/images"
    names = ["hopper.jpg", "truncated_jpeg.jpg", "transparent.png", "decompression_bomb.gif", "broken.png"]
    path = write([safevlm_record(id=name, image=name) for name in names])
    read = functools.partial(read_rows, image_folder=folder, check_images="none", on_error="skip")
    report = check_files([path], read, progress=False)
    assert found(report) == [(name, "image") for name in (names[1], names[3], names[4])]
