"""Hub data sets, offline: `datasets.load_dataset` is given local files, everything after it is real."""

import io
import json

import pytest
from PIL import Image

from safevlm.trainer.data import DataError, iter_rows, read_rows

datasets = pytest.importorskip("datasets")

RECORD = {
    "id": 5,
    "query": "How?",
    "category": "hate",
    "subcategory": "race",
    "type": "SUU",
}


def png(colour="red"):
    file = io.BytesIO()
    Image.new("RGB", (4, 4), colour).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """`hub(files)` serves local files as any repository, and returns the list of calls made."""
    load_dataset = datasets.load_dataset

    def serve(files, kind="parquet"):
        calls = []

        def load(path, **options):
            calls.append({"path": path, **options})
            return load_dataset(
                kind,
                data_files=files,
                split=options["split"],
                streaming=options["streaming"],
                cache_dir=str(tmp_path / "cache"),
            )

        monkeypatch.setattr(datasets, "load_dataset", load)
        return calls

    return serve


@pytest.fixture
def table(tmp_path):
    """A parquet file of HoliSafe-like records with embedded images, as `datasets` writes it."""

    def write(records, name="test.parquet"):
        features = {
            key: datasets.Value("string" if isinstance(value, str) else "int64") for key, value in RECORD.items()
        }
        columns = {key: [record[key] for record in records] for key in RECORD}
        columns["image"] = [{"bytes": record.get("png", png()), "path": None} for record in records]
        dataset = datasets.Dataset.from_dict(columns, datasets.Features({**features, "image": datasets.Image()}))
        path = tmp_path / name
        dataset.to_parquet(path)
        return str(path)

    return write


@pytest.mark.parametrize("read", [read_rows, iter_rows])
def test_hub_id_goes_through_datasets_with_its_choices(hub, table, read):
    calls = hub({"test": table([RECORD])})
    (row,) = read("owner/name", subset="s", split="test", revision="abc", require_answer=False)
    streaming = read is iter_rows
    assert calls == [{"path": "owner/name", "name": "s", "split": "test", "revision": "abc", "streaming": streaming}]
    assert (row.row_id, row.split, row.source, row.category, row.level) == ("5", "test", "holisafe", 3, 3)
    assert row.images == (png(),)


def test_images_are_handed_over_undecoded_and_pass_our_own_checks(hub, table):
    hub({"test": table([{**RECORD, "png": png()[:-30]}])})
    for read in (read_rows, iter_rows):
        with pytest.raises(DataError, match="owner/name, row 1: .*truncated or corrupt"):
            list(read("owner/name", require_answer=False))


def test_rows_of_a_stream_come_one_by_one(hub, tmp_path):
    good = json.dumps({"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]})
    # `datasets` itself looks at the first five rows, to see what columns there are.
    (tmp_path / "0.jsonl").write_text(f"{good}\n" * 8, encoding="utf-8")
    (tmp_path / "1.jsonl").write_text("{broken", encoding="utf-8")
    hub({"train": [str(tmp_path / "0.jsonl"), str(tmp_path / "1.jsonl")]}, "json")
    rows = iter_rows("owner/name")
    assert [next(rows).row_id for _ in range(8)] == [f"owner/name:{number}" for number in range(1, 9)]
    with pytest.raises(DataError, match="'owner/name': row 9 cannot be read"):  # only now is the broken file opened
        next(rows)


def test_split_must_be_chosen_where_there_are_several(hub, table):
    hub({"train": table([RECORD], "a.parquet"), "test": table([RECORD, RECORD], "b.parquet")})
    with pytest.raises(DataError, match=r"has the splits \['test', 'train'\]; choose one with `split`"):
        read_rows("owner/name", require_answer=False)
    assert len(read_rows("owner/name", split="test", require_answer=False)) == 2


def test_unmapped_labels_of_a_stream_are_listed_without_reading_it_to_the_end(hub, table, monkeypatch):
    from safevlm.trainer.data import row_builder

    monkeypatch.setattr(row_builder, "SCAN_WHEN_REMOTE", 1)
    hub({"test": table([{**RECORD, "subcategory": name} for name in ("new", "newer", "newest", "last")])})
    with pytest.raises(DataError) as caught:
        list(iter_rows("owner/name", require_answer=False))
    assert "'new'" in str(caught.value) and "'newer'" in str(caught.value) and "'last'" not in str(caught.value)
    with pytest.raises(DataError, match="lacks 4 of the labels"):
        read_rows("owner/name", require_answer=False)


def test_named_images_need_a_folder(hub, tmp_path, image_folder):
    record = {"image": "a.png", "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]}
    (tmp_path / "rows.jsonl").write_text(json.dumps(record), encoding="utf-8")
    hub({"train": str(tmp_path / "rows.jsonl")}, "json")
    with pytest.raises(DataError, match="names the image 'a.png' instead of holding it; download"):
        read_rows("owner/name")
    assert read_rows("owner/name", image_folder)[0].images == (image_folder / "a.png",)


def test_chat_format_with_a_list_of_images_streams(hub, tmp_path):
    messages = [
        {"role": "user", "content": [{"type": "image", "text": None}, {"type": "text", "text": "Hi"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "Ho"}]},
    ]
    part = {"type": datasets.Value("string"), "text": datasets.Value("string")}
    features = datasets.Features(
        {
            "messages": datasets.List({"role": datasets.Value("string"), "content": datasets.List(part)}),
            "images": datasets.List(datasets.Image()),
        }
    )
    dataset = datasets.Dataset.from_dict(
        {"messages": [messages], "images": [[{"bytes": png("blue"), "path": None}]]}, features
    )
    dataset.to_parquet(tmp_path / "train.parquet")
    hub({"train": str(tmp_path / "train.parquet")})
    for read in (read_rows, iter_rows):
        (row,) = read("owner/name")
        assert row.images == (png("blue"),) and row.messages == [
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Hi"}]},
            {"role": "assistant", "content": [{"type": "text", "text": "Ho"}]},
        ]


@pytest.mark.parametrize("error", [FileNotFoundError("gone"), ValueError("Config name"), RuntimeError("scripts")])
def test_what_the_hub_refuses_is_a_clear_error(monkeypatch, error):
    def load(path, **options):
        raise error

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(DataError, match="'owner/name' is not a file here and cannot be loaded from the Hub"):
        read_rows("owner/name")


def test_a_script_in_a_repository_is_never_run(monkeypatch, tmp_path):
    """A folder stands for the repository, which `datasets` treats alike."""
    ran = tmp_path / "ran"
    repository = tmp_path / "name"
    repository.mkdir()
    (repository / "name.py").write_text(f"open({str(ran)!r}, 'w')\n", encoding="utf-8")
    load_dataset = datasets.load_dataset
    monkeypatch.setattr(datasets, "load_dataset", lambda path, **options: load_dataset(str(repository), **options))
    with pytest.raises(DataError, match="cannot be loaded from the Hub"):
        read_rows("owner/name")
    assert not ran.exists()


@pytest.mark.parametrize("name", ["rows.jsonl", "owner/rows.jsonl", "owner/name/more", "owner/set.zip", "../name"])
def test_missing_files_are_not_looked_up_on_the_hub(monkeypatch, tmp_path, name):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **options: pytest.fail("asked the Hub"))
    with pytest.raises(DataError, match="cannot be read|is not a folder"):
        read_rows(name)


def test_existing_folder_of_the_form_of_an_id_is_read_from_disk(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner/name").mkdir(parents=True)
    record = {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]}
    (tmp_path / "owner/name/train.json").write_text(json.dumps([record]), encoding="utf-8")
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **options: pytest.fail("asked the Hub"))
    assert len(read_rows("owner/name")) == 1


def test_without_a_network_the_hub_is_asked_once(monkeypatch):
    def unreachable(*args, **kwargs):
        raise OSError("Name or service not known")

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", unreachable)
    monkeypatch.setattr("datasets.load_dataset", lambda *args, **kwargs: pytest.fail("asked again"))
    with pytest.raises(DataError, match="'owner/name' is not a file here and the Hub cannot be reached"):
        read_rows("owner/name")
