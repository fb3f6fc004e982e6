"""Containers: csv, parquet, folders and zips, streamed and hostile ones."""

import io
import json
import os
import pickle
import stat
import struct
import zipfile

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from safevlm.processing import pictures
from safevlm.trainer.data import (
    ArchivedImage,
    DataError,
    ImageError,
    images,
    iter_rows,
    load_image,
    probe_image,
    read_rows,
    split_holdout,
    write_safevlm_jsonl,
)
from safevlm.trainer.data.containers import data_files, folders

TALK = [{"from": "human", "value": "<image>Hi"}, {"from": "gpt", "value": "Ho"}]


def png(colour="red", size=(4, 4)):
    file = io.BytesIO()
    Image.new("RGB", size, colour).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def zipped(tmp_path):
    """`zipped({"name": content})` writes a zip; content is bytes or JSON."""

    def write(members, name="set.zip", compression=zipfile.ZIP_DEFLATED):
        path = tmp_path / name
        with zipfile.ZipFile(path, "w", compression) as archive:
            for member, content in members.items():
                archive.writestr(member, content if isinstance(content, bytes) else json.dumps(content))
        return path

    return write


def llava(*names):
    return [{"image": name, "conversations": TALK} for name in names]


# --- tables


@pytest.fixture
def siuo_csv(tmp_path):
    def write(text, name="rows.csv"):
        path = tmp_path / name
        path.write_bytes(text.encode() if isinstance(text, str) else text)
        return path

    return write


HEADER = "question_id,image,question,category,safety_warning,reference_answer\n"


def test_csv_with_quotes_newlines_and_a_byte_order_mark_reads(siuo_csv):
    path = siuo_csv("\ufeff" + HEADER + '1,,"Two\nlines, ""quoted""",morality,w,Answer\n\n2,,Q,morality,w,A\n')
    rows = read_rows(path)
    assert rows[0].messages[0]["content"][0]["text"] == 'Two\nlines, "quoted"'
    assert [row.row_id for row in rows] == ["1", "2"] and rows[0].images == ()


def test_bad_csv_row_is_named_and_skipped_on_request(siuo_csv):
    path = siuo_csv(HEADER + "1,,Q,morality,w\n2,,Q,morality,w,A\n")
    with pytest.raises(DataError, match="rows.csv, row 1: 5 fields, but the first line names 6 columns"):
        read_rows(path)
    rows = read_rows(path, on_error="skip")
    assert [row.row_id for row in rows] == ["2"] and rows.skipped[0][0] == "rows.csv:1"


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("", "has no rows"),
        (HEADER, "has no rows"),
        ("a,a\n1,2\n", "name the columns, each once"),
        (HEADER.encode() + b"\xff,,,,,\n", "cannot be read .*UnicodeDecodeError"),
        (HEADER + '1,"open', "cannot be read .*Error"),
        (HEADER + "1,," + "x" * 200_000 + ",,,\n", "field larger than field limit"),
    ],
)
def test_unreadable_csv_is_an_error_in_any_case(siuo_csv, content, reason):
    for on_error in ("raise", "skip"):
        with pytest.raises(DataError, match=reason):
            read_rows(siuo_csv(content), on_error=on_error)


def test_tab_separated_values_read(siuo_csv):
    path = siuo_csv(HEADER.replace(",", "\t") + "1\t\tQ\tmorality\tw\tA, b\n", "rows.tsv")
    assert read_rows(path)[0].messages[1]["content"][0]["text"] == "A, b"


@pytest.fixture
def parquet(tmp_path):
    def write(records, name="rows.parquet", **options):
        import pyarrow.parquet

        path = tmp_path / name
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), path, **options)
        return path

    return write


def test_parquet_gives_embedded_images_and_paths(parquet, image_folder):
    records = [
        {"images": [{"bytes": png("blue"), "path": "x.png"}], "messages": []},
        {"images": [{"bytes": None, "path": "a.png"}], "messages": []},
    ]
    for record in records:
        record["messages"] = [
            {"role": "user", "content": [{"type": "image", "text": None}, {"type": "text", "text": "Hi"}]},
            {"role": "assistant", "content": [{"type": "text", "text": "Ho"}]},
        ]
    rows = read_rows(parquet(records), image_folder)
    assert rows[0].images == (png("blue"),) and rows[1].images == (image_folder / "a.png",)
    assert rows[0].load_images()[0].getpixel((0, 0)) == (0, 0, 255)
    assert rows[0].row_id == "rows.parquet:1"


def test_parquet_with_raw_image_bytes_and_paths_that_leave_the_folder(parquet, image_folder):
    (row,) = read_rows(parquet([{"image": png(), "conversations": TALK}]), image_folder)
    assert row.images == (png(),)
    path = parquet([{"image": {"bytes": None, "path": "/etc/hostname"}, "conversations": TALK}])
    with pytest.raises(DataError, match="leaves `image_folder`"):
        read_rows(path, image_folder)


def test_embedded_images_have_the_same_defences_as_files(parquet, monkeypatch):
    with pytest.raises(ImageError, match="rows.parquet, row 1: .*truncated or corrupt"):
        read_rows(parquet([{"image": png()[:-30], "conversations": TALK}]))
    with pytest.raises(ImageError, match="is not a readable"):
        read_rows(parquet([{"image": b"%!PS-Adobe-3.0 EPSF-3.0", "conversations": TALK}]))
    with pytest.raises(ImageError, match="`max_pixels`"):
        read_rows(parquet([{"image": png(), "conversations": TALK}]), max_pixels=15)
    monkeypatch.setattr(pictures, "MAX_FILE_BYTES", 50)
    with pytest.raises(ImageError, match="more than 50"):
        read_rows(parquet([{"image": png(), "conversations": TALK}]))


def test_damaged_parquet_is_a_data_error(parquet):
    path = parquet(llava("a.png") * 50)
    content = path.read_bytes()
    for damaged in (content[:-20], content[:100] + bytes(50) + content[150:], b"PAR1"):
        path.write_bytes(damaged)
        with pytest.raises(DataError, match="rows.parquet"):
            read_rows(path, check_images="none")


def test_shards_of_one_table_are_read_together(parquet, tmp_path):
    for number in (0, 1):
        parquet([{"conversations": TALK, "image": "a.png"}], f"train-0000{number}-of-00002.parquet")
    rows = read_rows(tmp_path, check_images="none")
    assert [row.row_id for row in rows] == [f"train-0000{number}-of-00002.parquet:1" for number in (0, 1)]
    assert {row.split for row in rows} == {"train"}


# --- one by one


def test_jsonl_and_parquet_are_not_read_ahead(tmp_path, parquet, monkeypatch):
    path = tmp_path / "rows.jsonl"
    good = json.dumps({"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]})
    path.write_text(f"{good}\n{good}\nbroken\n", encoding="utf-8")
    rows = iter_rows(path)
    assert next(rows).row_id == "rows.jsonl:1" and next(rows).row_id == "rows.jsonl:2"
    with pytest.raises(DataError, match="line 3: invalid JSON"):
        next(rows)

    import pyarrow.parquet

    read = []
    original = pyarrow.parquet.ParquetFile.iter_batches

    def counting(self, *args, **options):
        for batch in original(self, *args, **options):
            read.append(batch.num_rows)
            yield batch

    monkeypatch.setattr(pyarrow.parquet.ParquetFile, "iter_batches", counting)
    rows = iter_rows(parquet(llava("a.png") * 100), check_images="none")
    next(rows)
    assert sum(read) <= 16
    assert len(list(rows)) == 99 and sum(read) == 100


def test_skipped_rows_of_an_iteration_are_listed(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("broken\n" + json.dumps({"conversations": TALK[1:]}) + "\n", encoding="utf-8")
    skipped = []
    assert list(iter_rows(path, on_error="skip", skipped=skipped)) == []
    assert [row_id for row_id, _ in skipped] == ["rows.jsonl:1", "rows.jsonl:2"]


def test_options_are_checked_when_called_not_when_iterated(write):
    path = write(llava("a.png"))
    for option in ({"on_error": "x"}, {"format": "x"}, {"subset": "x"}, {"revision": "x"}, {"format": "flat"}):
        with pytest.raises(ValueError, match=f"`{next(iter(option))}"):
            iter_rows(path, **option)


def test_endless_line_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(data_files, "MAX_LINE_BYTES", 1000)
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"a": "' + b"x" * 2000)
    with pytest.raises(DataError, match="line 1 has more than 1000 bytes"):
        read_rows(path)


# --- folders


def test_folder_with_one_data_file_reads_and_names_are_relative_to_the_folder(tmp_path, image_folder):
    (tmp_path / "labels").mkdir()
    (tmp_path / "labels/train.json").write_text(json.dumps(llava("images/a.png")), encoding="utf-8")
    (tmp_path / ".cache.json").write_text("{}", encoding="utf-8")
    (row,) = read_rows(tmp_path)
    assert row.images == (image_folder / "a.png",) and row.split == "train"


def test_split_chooses_among_the_files_of_a_folder(tmp_path):
    for split, names in (("train", ["a.png", "b.png"]), ("test", ["c.png"])):
        (tmp_path / f"{split}.json").write_text(json.dumps(llava(*names)), encoding="utf-8")
    rows = read_rows(tmp_path, split="test", check_images="none")
    assert [(len(rows), row.split) for row in rows] == [(1, "test")]
    with pytest.raises(DataError, match="holds 2 data files; pass one of them"):
        read_rows(tmp_path, check_images="none")
    with pytest.raises(DataError, match="is of split 'train', `split` is 'test'"):
        read_rows(tmp_path / "train.json", split="test", check_images="none")


def test_folder_without_data_is_an_error(image_folder):
    with pytest.raises(DataError, match="holds no data file"):
        read_rows(image_folder)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here")
def test_pipe_is_refused_instead_of_waited_for(tmp_path):
    os.mkfifo(tmp_path / "rows.jsonl")
    with pytest.raises(DataError, match="not a regular file"):
        read_rows(tmp_path / "rows.jsonl")


def test_other_json_objects_are_named_as_such(tmp_path):
    path = tmp_path / "info.json"
    path.write_text(json.dumps({"a": {"b": 1}}, indent=1), encoding="utf-8")
    with pytest.raises(DataError, match="is one JSON object"):
        read_rows(path)


# --- zips


def test_zip_with_rows_and_images_reads_without_unpacking(zipped, tmp_path):
    path = zipped({"set/train.json": llava("img/a.png"), "set/img/a.png": png("blue"), "__MACOSX/._train.json": b"x"})
    before = sorted(tmp_path.rglob("*"))
    (row,) = read_rows(path / "set")
    assert row.images == (ArchivedImage(str(path), "set/img/a.png"),) and row.split == "train"
    assert row.load_images()[0].getpixel((0, 0)) == (0, 0, 255) and probe_image(row.images[0]) == (4, 4)
    assert sorted(tmp_path.rglob("*")) == before
    assert read_rows(path / "set/train.json") == [row]
    assert load_image(pickle.loads(pickle.dumps(row.images[0]))).size == (4, 4)  # as DataLoader workers get it


def test_images_may_lie_in_a_zip_beside_the_rows(zipped, write):
    archive = zipped({"img/a.png": png()}, "img.zip")
    assert read_rows(write(llava("img/a.png")), archive)[0].images == (ArchivedImage(str(archive), "img/a.png"),)
    assert read_rows(write(llava("a.png")), archive / "img")[0].images == (ArchivedImage(str(archive), "img/a.png"),)
    with pytest.raises(ImageError, match="img.zip/img/b.png' does not exist"):
        read_rows(write(llava("b.png")), archive / "img")


@pytest.mark.parametrize("name", ["../secret.png", "/etc/hostname", "x/../../secret.png", "..", "../set2/a.png"])
def test_image_names_may_not_leave_the_folder_in_the_zip(zipped, write, name):
    archive = zipped({"set/a.png": png(), "secret.png": png(), "set2/a.png": png()})
    with pytest.raises(DataError, match="leaves `image_folder`"):
        read_rows(write(llava(name)), archive / "set", check_images="none")


@pytest.mark.parametrize("name", ["../a.png", "/a.png", "x/../../a.png"])
def test_image_names_may_not_leave_the_zip(zipped, write, name):
    with pytest.raises(DataError, match="leaves `image_folder`"):
        read_rows(write(llava(name)), zipped({"a.png": png()}), check_images="none")


@pytest.mark.parametrize("name", ["/a.png", "../a.png", "x/../../a.png", "x\\..\\a.png"])
def test_archive_with_unsafe_names_is_refused_whole(zipped, name):
    with pytest.raises(DataError, match="holds the unsafe name"):
        read_rows(zipped({"rows.json": llava("a.png"), name: png()}))


def test_archive_with_a_name_twice_is_refused(tmp_path):
    path = tmp_path / "set.zip"
    with pytest.warns(UserWarning, match="Duplicate"), zipfile.ZipFile(path, "w") as archive:
        archive.writestr("rows.json", "[]")
        archive.writestr("rows.json", json.dumps(llava("a.png")))
    with pytest.raises(DataError, match="holds 'rows.json' twice"):
        read_rows(path)


def test_links_in_zips_are_refused(tmp_path, write):
    path = tmp_path / "img.zip"
    with zipfile.ZipFile(path, "w") as archive:
        link = zipfile.ZipInfo("a.png")
        link.external_attr = (stat.S_IFLNK | 0o777) << 16
        archive.writestr(link, "/etc/passwd")
    with pytest.raises(ImageError, match="is a symbolic link"):
        read_rows(write(llava("a.png")), path)


def test_zip_bomb_is_refused_by_its_size_before_it_is_unpacked(zipped, write, monkeypatch):
    archive = zipped({"a.png": bytes(10_000_000)}, "img.zip")
    assert archive.stat().st_size < 20_000
    monkeypatch.setattr(images, "MAX_FILE_BYTES", 1_000_000)
    with pytest.raises(ImageError, match="unpacks to 10000000 bytes, more than 1000000"):
        read_rows(write(llava("a.png")), archive)
    monkeypatch.setattr(folders, "MAX_DATA_BYTES", 1000)
    with pytest.raises(DataError, match="unpacks to .* bytes, more than 1000"):
        read_rows(zipped({"rows.json": llava(*["a.png"] * 100)}))


def test_bomb_that_lies_about_its_size_gives_no_more_bytes_than_it_declared(zipped, write):
    path = zipped({"a.png": bytes(1_000_000)}, "img.zip")
    content = path.read_bytes()
    assert content.count(struct.pack("<I", 1_000_000)) == 2  # local header and directory
    path.write_bytes(content.replace(struct.pack("<I", 1_000_000), struct.pack("<I", 10)))
    with pytest.raises(DataError, match="is damaged"):
        ArchivedImage(str(path), "a.png").read(100)
    with pytest.raises(ImageError, match="cannot be read"):
        read_rows(write(llava("a.png")), path)


def test_encrypted_and_damaged_members_are_errors(zipped, write):
    path = zipped({"a.png": png()}, "img.zip")
    content = bytearray(path.read_bytes())
    directory = content.index(b"PK\x01\x02")
    content[6] |= 1
    content[directory + 8] |= 1
    path.write_bytes(content)
    with pytest.raises(ImageError, match="is encrypted"):
        read_rows(write(llava("a.png")), path)
    path = zipped({"a.png": png()}, "img2.zip", zipfile.ZIP_STORED)
    content = bytearray(path.read_bytes())
    content[60] ^= 1
    path.write_bytes(content)
    with pytest.raises(ImageError, match="is damaged"):
        read_rows(write(llava("a.png")), path)


def test_truncated_zip_is_a_data_error(zipped):
    path = zipped({"rows.json": llava("a.png")})
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(DataError, match="not a readable zip file"):
        read_rows(path)


def test_jsonl_csv_and_parquet_in_a_zip_read(zipped, parquet):
    line = json.dumps({"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]}).encode()
    assert len(read_rows(zipped({"a.jsonl": line + b"\n" + line}))) == 2
    assert len(read_rows(zipped({"a.csv": (HEADER + "1,,Q,morality,w,A\n").encode()}, "b.zip"))) == 1
    table = parquet([{"image": png(), "conversations": TALK}]).read_bytes()
    assert read_rows(zipped({"a.parquet": table}, "c.zip"))[0].images == (png(),)


def test_damaged_jsonl_in_a_zip_is_a_data_error_not_a_short_read(zipped):
    line = json.dumps({"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]}).encode()
    path = zipped({"a.jsonl": (line + b"\n") * 5}, compression=zipfile.ZIP_STORED)
    content = path.read_bytes()
    path.write_bytes(content.replace(b'"Ho"', b'"Hu"', 1))
    with pytest.raises(DataError, match="cannot be read .*CRC"):
        read_rows(path)


def test_rows_of_zips_can_be_split_and_are_not_written_as_if_they_were_files(zipped, tmp_path):
    path = zipped({"rows.json": llava("a.png", "b.png", "a.png"), "a.png": png(), "b.png": png("blue")})
    rows = read_rows(path, assume_safe=True)
    rest, held_out = split_holdout(rows, 0.4)
    assert not {row.images[0] for row in rest} & {row.images[0] for row in held_out}
    with pytest.raises(DataError, match="lies in a zip file; unpack it"):
        write_safevlm_jsonl(rows, tmp_path / "out.jsonl")


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_damage_to_a_zip_or_table_raises_only_data_error(zipped, parquet, data):
    kind = data.draw(st.sampled_from(["zip", "parquet"]))
    path = (
        zipped({"rows.json": llava("a.png"), "a.png": png()})
        if kind == "zip"
        else parquet([{"image": png(), "conversations": TALK}])
    )
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    try:
        read_rows(path)
    except DataError as error:
        assert path.name in str(error)
