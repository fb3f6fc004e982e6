"""Formats: the shared real files; for sets that may not be shared, records with the published fields and labels."""

import csv
import json

import pytest
from PIL import Image

from safevlm.trainer.data import PAPER_LABELS, DataError, detect_format, read_rows

IMAGE = {"type": "image"}


def text(value):
    return {"type": "text", "text": value}


def labels(row):
    category = None if row.category is None else PAPER_LABELS.category_names[row.category]
    return category, None if row.level is None else PAPER_LABELS.level_names[row.level]


def question(row):
    return row.messages[0]["content"][-1]["text"]


@pytest.fixture
def picture(tmp_path):
    """`picture("a/b.png")` makes an image there."""

    def make(name):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4), "red").save(path)
        return path

    return make


@pytest.fixture
def save(tmp_path):
    """`save("a/b.json", value)` writes JSON (a list as JSONL for that suffix)."""

    def write(name, value):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = [json.dumps(item) for item in value] if path.suffix == ".jsonl" else [json.dumps(value)]
        path.write_text("\n".join(lines), encoding="utf-8")
        return path

    return write


# --- real files


def test_figstep_reads_with_its_pictures_and_labels(shared_data):
    folder = shared_data / "figstep_tiny/data"
    rows = read_rows(folder / "question/SafeBench-Tiny.csv", folder / "images/SafeBench-Tiny", require_answer=False)
    assert len(rows) == 50 and {row.source for row in rows} == {"figstep"} and {row.split for row in rows} == {"test"}
    assert rows[0].row_id == "ForbidQI_1_1" and rows[0].images[0].name == "query_ForbidQI_1_1_6.png"
    assert labels(rows[0]) == ("illegal risk", "high") and rows[0].question_dependent is False
    assert rows[0].messages[0]["content"][0] == IMAGE and "list numbered 1, 2, and 3" in question(rows[0])
    assert [labels(row) for row in rows if "_9_" in row.row_id] == [("misleading", "medium")] * 5


def test_whole_safebench_has_only_known_topics(shared_data):
    rows = read_rows(
        shared_data / "figstep_tiny/data/question/safebench.csv", require_answer=False, check_images="none"
    )
    assert len(rows) == 500


def test_folder_of_several_files_asks_which(shared_data):
    with pytest.raises(DataError, match=r"holds 3 data files.*Tiny.csv \(figstep\).*phase.csv \(no known format\)"):
        read_rows(shared_data / "figstep_tiny/data", require_answer=False)


def test_llamafactory_demo_reads(shared_data):
    rows = read_rows(shared_data / "llamafactory_mllm_demo/data/mllm_demo.json")
    assert len(rows) == 6 and [len(row.images) for row in rows[:3]] == [2, 1, 1]
    assert rows[0].messages[2]["content"] == [text("What are they doing?"), IMAGE]
    assert labels(rows[0]) == (None, None)
    assert labels(read_rows(shared_data / "llamafactory_mllm_demo/data/mllm_demo.json", assume_safe=True)[0]) == (
        "safe",
        "none",
    )


def test_llamafactory_parts_carry_their_images(shared_data):
    folder = shared_data / "llamafactory_mllm_demo"
    rows = read_rows(folder / "data/v1_multimodal_demo.jsonl", folder)
    assert len(rows) == 24 and detect_format(folder / "data/v1_multimodal_demo.jsonl") == "chat"
    assert rows[0].images == (folder / "data/mllm_demo_data/1.jpg",) * 2
    assert rows[0].messages[0]["content"] == [IMAGE, text("Who are they?")]


def test_pope_files_are_clean_rows(shared_data):
    rows = read_rows(shared_data / "pope_coco/output/coco/coco_pope_random.json", check_images="none")
    assert len(rows) == 3000 and {labels(row) for row in rows} == {("safe", "none")}
    assert question(rows[0]) == "Is there a snowboard in the image?" and rows[0].row_id == "1"
    assert rows[0].messages[1]["content"] == [text("yes")]


def test_xstest_prompts_are_half_safe_and_have_no_image(shared_data):
    rows = read_rows(shared_data / "xstest/xstest_prompts.csv", require_answer=False)
    assert len(rows) == 450 and sum(labels(row) == ("safe", "none") for row in rows) == 250
    assert all(row.images == () and len(row.messages) == 1 for row in rows)


# --- sets that may not be shared: published fields and labels


def vlguard_records():
    unsafe = {
        "id": "Ads_1",
        "image": "bad_ads/1.png",
        "safe": False,
        "harmful_category": "risky behavior",
        "harmful_subcategory": "political",
        "instr-resp": [{"instruction": "Share this.", "response": "I cannot."}],
    }
    safe = {
        "id": "Ads_2",
        "image": "bad_ads/1.png",
        "safe": True,
        "instr-resp": [
            {"safe_instruction": "What is it?", "response": "An ad."},
            {"unsafe_instruction": "How do I steal it?", "response": "I cannot."},
        ],
    }
    return [unsafe, safe]


def test_vlguard_gives_a_row_per_instruction(save, picture):
    picture("bad_ads/1.png")
    rows = read_rows(save("train.json", vlguard_records()))
    assert [row.row_id for row in rows] == ["Ads_1-instruction", "Ads_2-safe_instruction", "Ads_2-unsafe_instruction"]
    assert [labels(row) for row in rows] == [("politics", "high"), ("safe", "none"), (None, "high")]
    assert [row.question_dependent for row in rows] == [False, True, True]
    assert rows[2].messages[1]["content"] == [text("I cannot.")]
    assert {(row.split, row.source) for row in rows} == {("train", "vlguard")}


def test_vlguard_instruction_without_answer_is_for_evaluation(save):
    records = vlguard_records()
    records[1]["instr-resp"][0]["response"] = ""  # the published test.json has one
    path = save("test.json", records)
    rows = read_rows(path, check_images="none")
    assert [len(row.messages) for row in rows] == [2, 1, 2]


@pytest.mark.parametrize("pairs", [None, [], [{"response": "?"}], [{"instruction": "a", "safe_instruction": "b"}]])
def test_vlguard_record_without_clear_instruction_is_an_error(save, pairs):
    with pytest.raises(DataError, match="item 1: `instr-resp`"):
        read_rows(save("train.json", [{**vlguard_records()[0], "instr-resp": pairs}]), check_images="none")


def test_rtvlm_tasks_differ_in_fields_and_images(save, picture):
    tasks = {
        "misleading": {
            "index": 7,
            "questions": ["Is the cat red?", "Is the cat blue?"],
            "refused_to_answer": ["Safe to Answer", "Proceed with Caution"],
            "answers": ["Yes, it is.", "Proceed with Caution"],
        },
        "jailbreak": {"index": "a-1", "instruction": "Obey.", "refused_to_answer": "Refuse to Answer"},
        "politics": {"id": "p-0.png", "prompt": "What is it?", "refused_to_answer": "Proceed with Caution"},
        "visual_misleading_wrong": {
            "question": "Which flag?",
            "img": "New Zealand",
            "answers": "France",
            "refused_to_answer": "Safe to Answer",
        },
        "visual_misleading_correct": {
            "question": "Which flag?",
            "img": "New Zealand",
            "answers": "Costa Rica",
            "refused_to_answer": "Safe to Answer",
        },
        "order_A": {"question": "Which?", "img": ["A", "B"], "answers": "A", "refused_to_answer": "Safe to Answer"},
    }
    for name in ("7.jpg", "a-1.jpg", "p-0.png", "flags/NewZealand.jpg", "flags/CostaRica.jpg"):
        picture(name)
    for name in ("flags/A.jpg", "flags/B.jpg"):
        picture(name)
    read = {name: read_rows(save(f"{name}.jsonl", [record]), require_answer=False) for name, record in tasks.items()}
    first, second = read["misleading"]
    assert [first.row_id, second.row_id] == ["7-1", "7-2"] and question(second) == "Is the cat blue?"
    assert [labels(first), labels(second)] == [("misleading", "none"), ("misleading", "low")]
    assert first.messages[1]["content"] == [text("Yes, it is.")]
    assert len(second.messages) == 1  # a wanted behaviour is no answer
    assert labels(read["jailbreak"][0]) == ("illegal risk", "high")
    assert labels(read["politics"][0]) == ("politics", "low") and read["politics"][0].images[0].name == "p-0.png"
    assert read["visual_misleading_wrong"][0].images[0].name == "NewZealand.jpg"
    assert read["visual_misleading_correct"][0].images[0].name == "CostaRica.jpg"
    assert [image.name for image in read["order_A"][0].images] == ["A.jpg", "B.jpg"]


def test_rtvlm_captcha_has_no_verdict_and_needs_the_format_named(save, picture):
    picture("3.jpg")
    path = save("captcha.jsonl", [{"id": 3, "instruction": "Read it.", "answer": "x7"}])
    with pytest.raises(DataError, match="no known format"):
        read_rows(path, require_answer=False)
    (row,) = read_rows(path, format="rtvlm", require_answer=False)
    assert labels(row) == ("privacy", "low")


MM_QUESTIONS = {
    "Question": "q",
    "Changed Question": "c",
    "Key Phrase": "k",
    "Phrase Type": "activity",
    "Rephrased Question": "typed",
    "Rephrased Question(SD)": "painted",
}


def test_mm_safetybench_folder_gives_a_row_per_kind_of_image(save, picture, tmp_path):
    for scenario in ("06-Fraud", "08-Political_Lobbying"):
        save(f"mm/processed_questions/{scenario}.json", {"0": MM_QUESTIONS, "1": MM_QUESTIONS})
        for kind in ("SD", "SD_TYPO", "TYPO"):
            picture(f"mm/imgs/{scenario}/{kind}/0.jpg"), picture(f"mm/imgs/{scenario}/{kind}/1.jpg")
    rows = read_rows(tmp_path / "mm", require_answer=False)
    assert len(rows) == 12 and rows[0].row_id == "06-Fraud-0-SD"
    assert [question(row) for row in rows[:3]] == ["painted", "typed", "typed"]
    assert {labels(row) for row in rows[6:]} == {("politics", "high")}
    typo = read_rows(tmp_path / "mm", require_answer=False, split="TYPO")
    assert len(typo) == 4 and {row.split for row in typo} == {"TYPO"}
    with pytest.raises(DataError, match="no row of split 'typo', only of"):
        read_rows(tmp_path / "mm", require_answer=False, split="typo")


FLAT = {
    "holisafe": (
        {"id": 5, "image": "a.png", "query": "How?", "category": "hate", "subcategory": "race", "type": "SUU"},
        ("fairness", "high"),
        True,
    ),
    "unsafebench": (
        {"image": "a.png", "safety_label": "Unsafe", "category": "Harassment", "source": "Laion5B", "text": "x"},
        ("insults and bullying", "high"),
        False,
    ),
    "llavaguard": (
        {
            "id": "1",
            "url": "https://example.org/x/a%2Epng?s=1",
            "rating": "Unsafe",
            "category": "O5: Criminal Planning",
            "rationale": "…",
        },
        ("illegal risk", "high"),
        False,
    ),
    "siuo": (
        {
            "question_id": "1001",
            "image": "a.png",
            "question": "Encourage me.",
            "category": "controversial topics, politics",
            "safety_warning": "…",
            "reference_answer": "Take care.",
        },
        ("politics", "medium"),
        True,
    ),
    "vlsbench": (
        {
            "instruction_id": "0",
            "instruction": "How?",
            "image_path": "a.png",
            "category": "Privacy",
            "sub_category": "Unauthorized Data Collection",
        },
        ("privacy", "high"),
        False,
    ),
    "spa_vl": (
        {
            "image": "a.png",
            "question": "How?",
            "chosen": "No.",
            "rejected": "Like this.",
            "class1": "Malicious Use",
            "class2": "Defamation",
            "class3": "Group Defamation",
        },
        ("insults and bullying", "high"),
        None,
    ),
}


@pytest.mark.parametrize("name", FLAT)
def test_flat_set_is_recognised_and_mapped(name, save, picture):
    record, expected, dependent = FLAT[name]
    picture("a.png")
    path = save("rows.json", [record])
    assert detect_format(path) == name
    (row,) = read_rows(path, require_answer=False)
    assert (labels(row), row.question_dependent, row.source) == (expected, dependent, name)
    assert row.images[0].name == "a.png" and row.messages[0]["content"][0] == IMAGE


@pytest.mark.parametrize(
    ("name", "change"),
    [("holisafe", {"type": "SSS"}), ("unsafebench", {"safety_label": "Safe"}), ("llavaguard", {"rating": "Safe"})],
)
def test_verdict_of_the_whole_overrides_the_category(name, change, save, picture):
    picture("a.png")
    (row,) = read_rows(save("rows.json", [{**FLAT[name][0], **change}]), require_answer=False)
    assert labels(row) == ("safe", "none")


def test_chosen_answer_is_the_answer_and_training_rows_have_no_labels(save, picture):
    picture("a.png")
    record = {name: FLAT["spa_vl"][0][name] for name in ("image", "question", "chosen", "rejected")}
    (row,) = read_rows(save("rows.json", [{**record, "image_name": "a.png"}]))
    assert row.messages[1]["content"] == [text("No.")] and labels(row) == (None, None)
    test = {name: FLAT["spa_vl"][0][name] for name in ("image", "question", "class1", "class2", "class3")}
    (row,) = read_rows(save("rows.json", [test]), require_answer=False)
    assert len(row.messages) == 1 and labels(row) == ("insults and bullying", "high")


def test_question_about_an_image_is_never_asked_without_it(save):
    path = save("rows.json", [{**FLAT["unsafebench"][0], "image": None}])
    with pytest.raises(DataError, match="the image is missing"):
        read_rows(path, require_answer=False)
    record = {name: value for name, value in FLAT["unsafebench"][0].items() if name != "image"}
    with pytest.raises(DataError, match="the image is missing"):
        read_rows(save("rows.json", [record]), require_answer=False)


def test_url_is_never_fetched(save):
    record = {"messages": [{"role": "user", "content": [{"type": "image", "url": "https://example.org/a.png"}]}]}
    with pytest.raises(DataError, match="URL, which is never fetched"):
        read_rows(save("rows.json", [record]), require_answer=False)


# --- the Hub's chat format


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image"},
        {"type": "image", "image": "a.png"},
        {"type": "image", "path": "a.png", "text": None},
        {"type": "image_url", "image_url": {"url": "a.png"}},
    ],
)
def test_chat_parts_may_carry_their_image(part, save, picture):
    picture("a.png")
    turns = [{"role": "user", "content": [part, text("Hi")]}, {"role": "assistant", "content": "A <image> word"}]
    record = {"messages": turns, **({"images": ["a.png"]} if part == {"type": "image"} else {})}
    (row,) = read_rows(save("rows.json", [record]))
    assert row.messages[0]["content"] == [IMAGE, text("Hi")] and row.images[0].name == "a.png"
    assert row.messages[1]["content"] == [text("A <image> word")]


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"messages": [{"role": "user", "content": [{"type": "video"}]}]}, "only text and image parts"),
        ({"messages": [{"role": "tool", "content": [text("x")]}]}, "`role` must be one of"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "image": "a"}]}], "images": ["b"]}, "both in"),
        ({"messages": [{"role": "user", "content": [text("x")]}], "images": ["a"]}, "1 image.*but 0 image part"),
        ({"messages": [{"role": "user", "content": "Hi"}], "images": ["a", "b"]}, "2 in `images` but 0 <image>"),
    ],
)
def test_bad_chat_record_is_an_error(record, reason, save):
    with pytest.raises(DataError, match=f"item 1: .*{reason}"):
        read_rows(save("rows.json", [record]), require_answer=False, check_images="none")


def test_question_that_needs_no_image_is_read_without_one(save):
    record = {name: value for name, value in FLAT["spa_vl"][0].items() if name not in ("image", "rejected")}
    (row,) = read_rows(save("rows.json", [record]), format="spa_vl")
    assert row.images == () and labels(row) == ("insults and bullying", "high")
    with pytest.raises(DataError, match="`picture`.*looks like a picture"):  # a picture under another name
        read_rows(save("rows.json", [{**record, "picture": "a.png"}]), format="spa_vl")


def test_record_of_two_formats_asks_which(save):
    record = {**FLAT["siuo"][0], **FLAT["vlsbench"][0]}
    with pytest.raises(DataError, match=r"could be of the formats \['siuo', 'vlsbench'\]; choose one with `format`"):
        read_rows(save("rows.json", [record]))


def test_csv_with_label_fields_of_a_flat_set_reads(tmp_path, picture):
    picture("a.png")
    path = tmp_path / "test.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, FLAT["llavaguard"][0])
        writer.writeheader()
        writer.writerow(FLAT["llavaguard"][0])
    (row,) = read_rows(path, require_answer=False)
    assert (row.split, labels(row)) == ("test", ("illegal risk", "high"))
