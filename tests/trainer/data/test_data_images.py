"""Image loading: every real odd file loads right or is refused clearly, and hostile input does no harm."""

import io
import os
import pickle
import struct
import threading
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from odd_pictures import MUST_BE_REFUSED, MUST_LOAD
from PIL import Image, ImageFile, ImageOps

from safevlm.trainer.data import ImageError, load_image, probe_image


@pytest.fixture(scope="module")
def odd(shared_data):
    return shared_data / "pillow_odd_images/Tests/images"


def as_bytes(image, format="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def mean_difference(image, other):
    return np.abs(np.asarray(image, np.float32) - np.asarray(other, np.float32)).mean()


def test_the_two_lists_cover_every_shared_file(odd):
    files = {path.relative_to(odd).as_posix() for path in odd.rglob("*") if path.is_file()}
    assert files == set(MUST_LOAD) | set(MUST_BE_REFUSED)


@pytest.mark.parametrize("name", MUST_LOAD)
def test_sound_odd_file_loads_as_plain_rgb(odd, name):
    image = load_image(odd / name)
    assert (image.mode, image.size, image.info) == ("RGB", MUST_LOAD[name], {})
    assert load_image((odd / name).read_bytes()) == image
    with Image.open(odd / name) as opened:
        assert load_image(opened) == image


@pytest.mark.parametrize("name", MUST_BE_REFUSED)
def test_unusable_file_is_refused_naming_row_path_and_reason(odd, name):
    with pytest.raises(ImageError, match=MUST_BE_REFUSED[name]) as caught:
        load_image(odd / name, row_id="row-7")
    assert "'row-7'" in str(caught.value) and str(odd / name) in str(caught.value)
    assert MUST_BE_REFUSED[name] in caught.value.reason and caught.value.row_id == "row-7"


@pytest.mark.parametrize("name", ["hopper_orientation_2.webp", "hopper_orientation_6.jpg", "hopper_orientation_8.jpg"])
def test_orientation_is_applied_once(odd, name):
    upright = load_image(odd / "hopper.png")
    image = load_image(odd / name)
    assert mean_difference(image, upright) < 10  # lossy copies of the same picture
    assert load_image(image) == image


@pytest.mark.parametrize("orientation", range(1, 9))
def test_each_orientation_matches_pil(orientation):
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (5, 7, 3), np.uint8))
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = as_bytes(picture, exif=exif)
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    assert np.array_equal(load_image(data), expected)


def test_unreadable_exif_leaves_the_picture_as_stored():
    picture = Image.new("RGB", (3, 2), "red")
    assert load_image(as_bytes(picture, exif=b"Exif\0\0garbage")).size == (3, 2)


def test_transparency_is_composited_on_white():
    clear = Image.new("RGBA", (1, 1), (10, 20, 30, 0))
    half = Image.new("LA", (1, 1), (0, 127))
    assert load_image(clear).getpixel((0, 0)) == (255, 255, 255)
    assert load_image(half).getpixel((0, 0)) == (128, 128, 128)
    palette = Image.new("P", (2, 1))
    palette.putpalette([0, 0, 0, 255, 0, 0])
    palette.putpixel((1, 0), 1)
    loaded = load_image(as_bytes(palette, transparency=0))
    assert np.asarray(loaded).tolist() == [[[255, 255, 255], [255, 0, 0]]]


def test_sixteen_bit_grey_is_scaled_not_clipped(odd):
    values = np.array([[0, 128, 250, 257, 32768, 65535]], np.uint16)
    loaded = load_image(as_bytes(Image.fromarray(values)))
    assert np.asarray(loaded)[0, :, 0].tolist() == [0, 0, 1, 1, 128, 255]
    grey = Image.open(odd / "hopper.ppm").convert("L").convert("RGB")
    assert mean_difference(load_image(odd / "hopper_16bit.pgm"), grey) < 2


def test_cmyk_keeps_its_colours(odd):
    image = load_image(odd / "pil_sample_cmyk.jpg")
    red, black = image.getpixel((0, 0)), image.getpixel((99, 99))
    assert red[0] > 200 and max(red[1:]) < 60
    assert max(black) < 60


def test_animation_gives_its_first_frame():
    frames = [Image.new("RGB", (2, 2), colour) for colour in ("red", "blue")]
    data = as_bytes(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert load_image(data).getpixel((0, 0)) == (255, 0, 0)


def test_pixel_limit_holds_before_decoding():
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 8000, 8000, 8, 2, 0, 0, 0)
    no_pixels = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")
    with pytest.raises(ImageError, match="8000x8000 pixels, more than 50000000; shrink it or raise `max_pixels`"):
        load_image(no_pixels)
    with pytest.raises(ImageError, match="more than 3"):
        load_image(Image.new("RGB", (2, 2)), max_pixels=3)
    assert load_image(Image.new("RGB", (2, 2)), max_pixels=4).size == (2, 2)


@pytest.mark.parametrize("format", ["TGA", "ICO", "PCX", "EPS"])
def test_formats_off_the_allow_list_are_never_decoded(format):
    with pytest.raises(ImageError, match="convert or replace it"):
        load_image(as_bytes(Image.new("RGB", (16, 16)), format))


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("no/such.png", "does not exist"),
        (os.curdir, "not a regular file"),
        ("nul\0.png", "cannot be opened"),
        ("lone\ud800.png", "cannot be opened"),
        ("x" * 5000, "cannot be opened"),
        (b"", "not a readable"),
        (None, "not a path"),
        (Image.new("RGB", (0, 3)), "empty"),
        (Image.new("F", (2, 2)), "no agreed range"),
    ],
)
def test_unusable_source_is_refused(source, reason):
    with pytest.raises(ImageError, match=reason):
        load_image(source)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_pipe_is_refused_instead_of_blocking(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(ImageError, match="not a regular file"):
        load_image(tmp_path / "pipe.png")


def test_truncated_file_is_refused_although_the_host_lets_pil_fill_it(odd, monkeypatch):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    Image.open(odd / "truncated_jpeg.jpg").load()  # PIL alone fills it
    failures = []

    def load():
        for _ in range(20):
            try:
                load_image(odd / "truncated_jpeg.jpg")
            except ImageError:
                failures.append(1)

    threads = [threading.Thread(target=load) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(failures) == 80
    assert ImageFile.LOAD_TRUNCATED_IMAGES is True


def test_process_wide_state_is_left_alone(odd):
    before = (Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES, list(warnings.filters))
    for name in [*MUST_LOAD, *MUST_BE_REFUSED]:
        try:
            load_image(odd / name)
        except ImageError:
            pass
    assert (Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES, list(warnings.filters)) == before


def test_probing_reads_the_size_but_not_the_pixels(odd):
    assert probe_image(odd / "hopper.jpg") == (128, 128)
    assert probe_image(odd / "truncated_jpeg.jpg") == (100, 100)
    with pytest.raises(ImageError, match="too large"):
        probe_image(odd / "decompression_bomb.gif")


def test_error_survives_pickling_and_worker_reraise():
    error = ImageError("text", row_id="7", source="x.png", reason="is broken")
    copy = pickle.loads(pickle.dumps(error))
    assert (str(copy), copy.row_id, copy.source, copy.reason) == ("text", "7", "x.png", "is broken")
    assert str(type(error)("text")) == "text"


def test_the_callers_image_is_neither_changed_nor_shared():
    image = Image.new("RGB", (2, 2), "red")
    image.info["key"] = "value"
    loaded = load_image(image)
    loaded.putpixel((0, 0), (0, 0, 0))
    assert image.getpixel((0, 0)) == (255, 0, 0) and image.info == {"key": "value"}


NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (16, 16), np.uint8))
SEEDS = [as_bytes(NOISE, format) for format in ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM")]


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@settings(max_examples=150, deadline=None)
@given(st.sampled_from(SEEDS), st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), max_size=8), st.data())
def test_damaged_bytes_load_or_raise_image_error(seed, changes, data):
    damaged = bytearray(seed[: data.draw(st.integers(0, len(seed)))])
    for position, value in changes:
        if position < len(damaged):
            damaged[position] = value
    try:
        assert load_image(bytes(damaged), max_pixels=10_000).mode == "RGB"
    except ImageError:
        pass


@pytest.mark.parametrize("source", ["https://example.com/a.png", Path("https://example.com/a.png")])
def test_a_web_address_is_called_one(source):
    with pytest.raises(ImageError, match="is a web address, which is not fetched; save the picture and name its file"):
        load_image(source)
