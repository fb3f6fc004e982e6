"""No field of a record is lost in silence: whatever could carry a picture, a turn or a label is used or refused."""

import json

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from safevlm.trainer.data import DataError, ReadOptions, Taxonomy, iter_rows, row_from_record, write_safevlm_jsonl
from safevlm.trainer.data.formats import known_formats

TALK = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]
CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
PARTS = [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}, CHAT[1]]

# The least that each format needs; none of them has more than the fields it uses.
RECORDS = {
    "safevlm": {"safe_type": 4, "safe_level": 2, "conversations": TALK},
    "llava": {"conversations": TALK},
    "mllm": {"messages": CHAT},
    "chat": {"messages": PARTS},
    "vlguard": {
        "id": "v",
        "harmful_subcategory": "political",
        "instr-resp": [{"instruction": "Share it.", "response": "No."}],
    },
    "rtvlm": {"index": 7, "instruction": "Obey.", "refused_to_answer": "Refuse to Answer"},
    "figstep": {"dataset": "ForbidQI", "category_id": 1, "task_id": 1, "category_name": "Illegal Activity"},
    "mm_safetybench": {"id": "0", "Question": "q", "Rephrased Question": "r", "Rephrased Question(SD)": "s"},
    "mm_safetybench_hub": {"id": "0", "image": None, "question": "q"},
    "spa_vl": {"image": None, "question": "How?", "chosen": "No.", "class2": "Defamation"},
    "holisafe": {"id": 5, "image": None, "query": "How?", "type": "SUU", "subcategory": "race"},
    "unsafebench": {"image": "a.png", "safety_label": "Unsafe", "category": "Hate"},
    "llavaguard": {"id": "1", "url": "https://x.org/a.png", "rating": "Unsafe", "category": "O5: Criminal Planning"},
    "siuo": {"question_id": 1, "image": None, "question": "Q", "category": "morality", "reference_answer": "A"},
    "vlsbench": {
        "instruction_id": "0",
        "instruction": "How?",
        "image_path": None,
        "sub_category": "Unauthorized Data Collection",
    },
    "xstest": {"id": "1", "prompt": "Q", "type": "homonyms", "label": "safe"},
    "pope": {"question_id": 1, "image": None, "text": "Q?", "label": "yes"},
    "flat": {"ask": "Hi", "colour": "red"},
}
COLOURS = """
name: colours
fields: {question: ask}
labels: {field: colour, values: {red: [privacy, high]}}
"""

PICTURE_FIELDS = {
    name: "a.png"
    for name in (
        "image images image_path images_path imagePath image_file img imgs img_path picture pictures pic photo "
        "photo_url image_url image_urls imageURL file_name filename image_1 image2 Image screenshot png jpg "
        "video videos video_path audio audios frames media image_base64 image_b64 img_b64 jpg_b64"
    ).split()
} | {
    "odd_name": {"bytes": b"x", "path": None},
    "odd_bytes": b"\x89PNG",
    "odd_list": [{"bytes": b"x", "path": "a.png"}],
    "odd_nested": {"page": [[{"bytes": b"x"}]]},
    "odd_text": "data:image/png;base64,iVBOR",
}
TURN_FIELDS = {
    name: "Tell me."
    for name in (
        "system system_prompt systemPrompt prompt query question instruction input output answer response completion "
        "chosen rejected System user_prompt question_text model_response response_0 safe_response tool_calls thinking "
        "assistant human target ground_truth cot thought rationale context prefix"
    ).split()
} | {
    "history": [["Hi", "Ho"]],
    "conversations": TALK,
    "conversation": TALK,
    "messages": CHAT,
    "dialogue": TALK,
    "odd_turns": CHAT,
}
LABEL_FIELDS = {
    "safe_type": 5,
    "safe_level": 3,
    "category": "misleading",
    "categories": ["privacy"],
    "level": "high",
    "label": "privacy",
    "labels": [1],
    "safe": True,
    "is_safe": False,
    "unsafe": 1,
    "risk": "high",
    "risk_level": 3,
    "riskCategory": "privacy",
    "severity": 2,
    "harmful": True,
    "harm_category": "x",
    "safety_label": "Unsafe",
    "sub_category": "x",
    "rating": "Unsafe",
    "toxicity": 0.9,
    "is_response_safe": False,
    "prompt_harm_label": "harmful",
    "final_label": 1,
    "category_id": 3,
    "label_1": 0,
    "decision": "block",
    "moderation": {"violence": 0.9},
}
FIELDS = {**PICTURE_FIELDS, **TURN_FIELDS, **LABEL_FIELDS}


@pytest.fixture
def read(tmp_path):
    """`read(format, record)`: the rows of one record, whose images need not exist."""
    (tmp_path / "colours.yaml").write_text(COLOURS)

    def read(name, record):
        # Bytes and pictures occur in tables only: those records do not go through a file.
        from safevlm.trainer.data.containers import Container, OpenedContainer
        from safevlm.trainer.data.containers.data_files import Item
        from safevlm.trainer.data.row_builder import RowBuilder

        own = str(tmp_path / "colours.yaml") if name == "flat" else name
        taxonomy = Taxonomy.load(own) if name == "flat" or (name in shipped()) else None
        container = Container(
            name="rows",
            file_name="rows",
            stem=FILES.get(name, "rows"),
            open_records=lambda: ("row", iter([Item(1, record)])),
            find_image=lambda image: tmp_path / image,
            subset="Fraud",
        )
        options = ReadOptions(require_answer=False, check_images="none")
        return list(RowBuilder(known_formats()[name], taxonomy, options).rows([OpenedContainer(container)]))

    return read


FILES = {"rtvlm": "jailbreak", "mm_safetybench": "06-Fraud"}


def shipped():
    from safevlm.trainer.data import shipped_taxonomies

    return shipped_taxonomies()


def test_there_is_a_record_for_each_format(read):
    assert RECORDS.keys() == known_formats().keys()
    for name, record in RECORDS.items():
        assert all(row.metadata == {} or name == "mm_safetybench" for row in read(name, record))


def content(rows):
    """All that training and evaluation read of some rows."""
    return [(row.images, row.messages, row.category, row.level) for row in rows]


@pytest.mark.parametrize("name", RECORDS)
def test_field_that_carries_a_picture_a_turn_or_a_label_is_used_or_refused_by_name(name, read):
    record = RECORDS[name]
    plain = content(read(name, record))
    lost = []
    for field, value in FIELDS.items():
        if record.get(field) is not None:
            continue
        try:
            rows = read(name, {**record, field: value})
        except DataError as error:
            if field not in str(error):
                lost.append(f"{field} (refused, but not named: {error})")
        else:
            if content(rows) == plain:
                # A shipped taxonomy may say that a field of its set is no picture, turn or label.
                known = Taxonomy.load(name).metadata if name in shipped() else ()
                if field not in known or not all(row.metadata[field] == value for row in rows):
                    lost.append(field)
    assert lost == []


@pytest.mark.parametrize("turn", [{"image": "a.png"}, {"label": 1}, {"tool_calls": [{}]}, {"messages": CHAT}])
@pytest.mark.parametrize("name", ["llava", "mllm", "chat"])
def test_field_inside_a_turn_is_not_lost_either(name, turn, read):
    turns = "conversations" if name == "llava" else "messages"
    (field,) = turn
    first, *rest = RECORDS[name][turns]
    with pytest.raises(DataError, match=f"turn 1 has the field `{field}`"):
        read(name, {**RECORDS[name], turns: [{**first, **turn}, *rest]})
    (row,) = read(name, {**RECORDS[name], turns: [{**first, "name": "Ann"}, *rest]})
    assert row.metadata == {"turn 1": {"name": "Ann"}}


@pytest.mark.parametrize(
    ("part", "reason"),
    [
        ({"type": "text", "text": "Hi", "image": "a.png"}, "text part has the field `image`"),
        ({"type": "image", "image": "a.png", "path": "b.png"}, r"more than once, in \['image', 'path'\]"),
        ({"type": "video", "video": "a.mp4"}, "only text and image parts"),
        ({"type": "text", "text": "Hi", "value": "Ho"}, "the text twice, in `text` and `value`"),
        ({"type": "image", "text": "Hi"}, "image part has the field `text`"),
    ],
)
def test_part_that_carries_more_than_it_says_is_an_error(part, reason, read):
    with pytest.raises(DataError, match=reason):
        read("chat", {"messages": [{"role": "user", "content": [part]}]})


@pytest.mark.parametrize("name", ["llava", "mllm", "chat"])
def test_turn_that_is_not_to_be_trained_on_is_refused(name, read):
    turns = "conversations" if name == "llava" else "messages"
    first, last = RECORDS[name][turns]
    for field, harmless, value in (("weight", 1, 0), ("loss", True, False), ("train", True, False), ("mask", 0, 1)):
        with pytest.raises(DataError, match=f"turn 2 has the field `{field}`.*a loss weight or mask"):
            read(name, {**RECORDS[name], turns: [first, {**last, field: value}]})
        read(name, {**RECORDS[name], turns: [first, {**last, field: harmless}]})
    with pytest.raises(DataError, match="turn 2 has the field `prefix`"):
        read(name, {**RECORDS[name], turns: [first, {**last, "prefix": True}]})


MARKERS = (
    "<video> <audio> <ImageHere> <Image> <image_1> <img>a.png</img> <|image_pad|> <|image|> [IMG] ![](a.png)".split()
)


@pytest.mark.parametrize("marker", MARKERS)
@pytest.mark.parametrize("name", ["llava", "mllm"])
def test_marker_of_a_picture_that_is_not_there_is_refused(name, marker, read):
    field, key = ("conversations", "value") if name == "llava" else ("messages", "content")
    first, last = RECORDS[name][field]
    with pytest.raises(DataError) as caught:
        read(name, {field: [{**first, key: f"Look: {marker}\nhi"}, last]})
    assert f"turn 1 (user) has {marker!r}" in str(caught.value)
    (row,) = read(name, {field: [first, {**last, key: marker}]})  # an answer may speak of one
    assert row.messages[1]["content"][0]["text"] == marker
    parts = [{"role": "user", "content": [{"type": "text", "text": marker}]}]  # and so may a question that says so
    assert read("chat", {"messages": parts})[0].messages == parts


def test_vlguard_pair_keeps_nothing_back(read):
    pair = {**RECORDS["vlguard"]["instr-resp"][0], "image": "b.png"}
    with pytest.raises(DataError, match="`instr-resp` 1 has the field `image`"):
        read("vlguard", {**RECORDS["vlguard"], "instr-resp": [pair]})


def test_rtvlm_answers_that_fit_no_question_are_an_error(read):
    record = {**RECORDS["rtvlm"], "questions": ["a?", "b?"], "refused_to_answer": "Safe to Answer"}
    del record["instruction"]
    with pytest.raises(DataError, match=r"`answers` must be a text, or one for each of `questions` \(2\)"):
        read("rtvlm", {**record, "answers": ["A"]})
    with pytest.raises(DataError, match=r"in \['questions', 'instruction'\]; keep one"):
        read("rtvlm", {**record, "instruction": "Obey."})


HARMLESS = {
    "author": "Ann",
    "image_width": 640,
    "source_id": 5,
    "difficulty_level": 3,
    "question_type": "yes/no",
    "x": [1],
}


@pytest.mark.parametrize("name", RECORDS)
def test_other_fields_stay_with_the_row_as_metadata(name, read):
    rows = read(name, {**RECORDS[name], **HARMLESS, "nothing": None, "empty": "", "nan": float("nan")})
    assert content(rows) == content(read(name, RECORDS[name]))
    assert all({key: row.metadata.get(key) for key in HARMLESS} == HARMLESS for row in rows)
    assert not any(row.metadata.keys() & {"nothing", "empty", "nan"} for row in rows)


def test_row_without_picture_may_not_name_one_anywhere():
    record = {"messages": CHAT, "origin": "pictures/a.jpg"}
    with pytest.raises(DataError, match="`origin`.*looks like a picture"):
        row_from_record(record)
    with pytest.raises(DataError, match="`image_id`.*looks like a picture"):
        row_from_record({"messages": CHAT, "image_id": 17})
    for value in ("http://a.org/b.jpg?x=1#y", [{"type": "image", "file": "0.png"}], {"path": "0.png", "width": 3}):
        with pytest.raises(DataError, match="`odd`.*looks like a picture"):
            row_from_record({"messages": CHAT, "odd": value})
    row = row_from_record({**record, "image_id": 17, "images": ["a.png"]})
    assert row.metadata == {"origin": "pictures/a.jpg", "image_id": 17}


def test_metadata_and_a_taxonomy_say_that_a_field_is_something_else(tmp_path, read):
    row = row_from_record({"messages": CHAT, "metadata": {"label": 3, "image": "a.png"}, "author": "Ann"})
    assert row.metadata == {"label": 3, "image": "a.png", "author": "Ann"}
    with pytest.raises(DataError, match=r"\['author'\] are in `metadata`, too"):
        row_from_record({"messages": CHAT, "metadata": {"author": "Bob"}, "author": "Ann"})
    (tmp_path / "rows.jsonl").write_text(json.dumps({"messages": CHAT, "label": 3, "kind": "clean"}))
    (tmp_path / "own.yaml").write_text("name: own\nformat: mllm\nlabels: [safe, none]\nmetadata: [label]\n")
    (row,) = iter_rows(tmp_path / "rows.jsonl", taxonomy=tmp_path / "own.yaml")
    assert (row.category, row.metadata) == (6, {"label": 3, "kind": "clean"})


VALUES = st.none() | st.booleans() | st.integers() | st.text(max_size=5) | st.lists(st.integers(), max_size=2)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.dictionaries(st.text(max_size=12), VALUES, max_size=4))
@example({"": 1, "id": 5, "x" * 300: "y"})
def test_whatever_fields_a_row_has_it_is_refused_or_all_of_them_survive_writing(tmp_path, fields):
    record = {"messages": CHAT, **fields}
    try:
        row = row_from_record(record)
    except DataError:
        return
    used = {"messages", "id", "source", "split", "images", "image", "category", "level", "metadata"}
    kept = {key: value for key, value in fields.items() if value not in (None, "", []) and key not in used}
    assert kept == row.metadata
    write_safevlm_jsonl([row], tmp_path / "out.jsonl")
    (again,) = iter_rows(tmp_path / "out.jsonl", format="safevlm", source=row.source)
    assert again == row
