"""Hostile uploads, request rates per address, and errors that give nothing away."""

import io
import logging
import struct
import zipfile
import zlib

import numpy as np
import pytest
from odd_pictures import MUST_LOAD
from PIL import Image

from safevlm.processing.pictures import load_picture

LIMITS = {"max_mb": 2, "max_megapixels": 40}
SECRETS = ("/", "\\", "0x", "PIL", "Error", "image file <")


@pytest.fixture
def read(modules, tmp_path):
    """Reads a file's content as an upload."""

    def read_upload(content: bytes, name="upload", **limits):
        path = tmp_path / name
        path.write_bytes(content)
        return modules.limits.read_picture(str(path), str(tmp_path), **{**LIMITS, **limits})

    return read_upload


def refused(modules, function, *args, **kwargs) -> str:
    with pytest.raises(modules.limits.Refused) as caught:
        function(*args, **kwargs)
    return str(caught.value)


def png(width: int, height: int) -> bytes:
    """A valid, all-black 1-bit PNG of any dimensions, a few kB in size."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    packer = zlib.compressobj(9)
    rows = b"".join(packer.compress(b"\0" * ((width + 7) // 8 + 1)) for _ in range(height)) + packer.flush()
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


REFUSED = {
    "16bit.s.tif": "pixel format is unusual",
    "broken.png": "not a picture we can read",
    "broken_data_stream.png": "damaged or incomplete",
    "decompression_bomb.gif": "too many pixels",
    "decompression_bomb.ico": "not a picture we can read",
    "truncated_image.png": "damaged or incomplete",
    "truncated_jpeg.jpg": "damaged or incomplete",
    "zero_width.gif": "not a picture we can read",
}


@pytest.mark.parametrize("name", MUST_LOAD)
def test_a_sound_odd_file_has_the_pixels_that_it_has_everywhere(read, odd_files, name):
    image = read((odd_files / name).read_bytes())
    assert (image.mode, image.info) == ("RGB", {}) and image == load_picture(odd_files / name)


@pytest.mark.parametrize("name", REFUSED)
def test_a_bad_file_is_refused_in_plain_words(modules, read, odd_files, name):
    message = refused(modules, read, (odd_files / name).read_bytes())
    assert REFUSED[name] in message
    assert not [secret for secret in SECRETS if secret in message]


def test_a_photograph_is_turned_upright(read, odd_files):
    upright = np.asarray(read((odd_files / "hopper.png").read_bytes()), np.float32)
    turned = np.asarray(read((odd_files / "hopper_orientation_6.jpg").read_bytes()), np.float32)
    assert np.abs(upright - turned).mean() < 10


def test_a_hundred_megapixels_are_refused_before_they_are_decoded(modules, read):
    bomb = png(10_000, 10_000)
    assert len(bomb) < 50_000
    assert "too many pixels; 40 megapixels" in refused(modules, read, bomb)


def test_a_picture_keeps_its_pixels_as_on_every_other_road(read):
    assert read(png(5000, 1000)).size == (5000, 1000)


def test_a_thin_picture_is_refused(modules, read):
    for size in ((1, 50_000), (50_000, 1)):
        assert "too thin" in refused(modules, read, png(*size))


def test_a_polyglot_gives_its_pixels_only(read, tmp_path):
    picture = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(picture, "PNG")
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as zipped:
        zipped.writestr("page.html", "<script>alert(1)</script>")
    image = read(picture.getvalue() + b"<script>alert(1)</script>" + archive.getvalue(), "x.png.html")
    assert image.size == (8, 8) and image.getpixel((0, 0)) == (255, 0, 0) and image.info == {}


@pytest.mark.parametrize(
    "content",
    [b"", b"<svg xmlns='http://www.w3.org/2000/svg'/>", b"%!PS-Adobe-3.0 EPSF-3.0\n", b"%PDF-1.4", b"PK\3\4"],
)
def test_other_formats_are_refused(modules, read, content):
    assert "not a picture we can read" in refused(modules, read, content, "x.png")


def test_a_large_file_is_refused(modules, read):
    assert "larger than 1 MB" in refused(modules, read, b"\0" * (2**20 + 1), max_mb=1)


def test_only_uploads_are_read(modules, tmp_path, odd_files):
    uploads = tmp_path / "uploads"
    uploads.mkdir()
    (uploads / "link.png").symlink_to(odd_files / "hopper.png")
    for path in (odd_files / "hopper.png", uploads / "link.png", uploads / ".." / "x", "/etc/passwd", uploads):
        message = refused(modules, modules.limits.read_picture, str(path), str(uploads), **LIMITS)
        assert message == "The picture did not arrive. Upload it again."


def test_requests_are_limited_per_address_within_the_window(modules):
    now = [0.0]
    limiter = modules.limits.RateLimiter(3, window=60, clock=lambda: now[0])
    for _ in range(3):
        limiter.check("a")
    limiter.check("b", cost=3)
    assert "3 a minute" in refused(modules, limiter.check, "a")
    now[0] = 59.9
    refused(modules, limiter.check, "a")
    now[0] = 60.0
    limiter.check("a", cost=2)
    refused(modules, limiter.check, "a", cost=2)
    limiter.check("a")  # refused requests were not counted


def test_addresses_are_forgotten_oldest_first(modules, monkeypatch):
    monkeypatch.setattr(modules.limits, "MAX_ADDRESSES", 2)
    limiter = modules.limits.RateLimiter(1)
    for address in "abc":
        limiter.check(address)
    limiter.check("a")
    refused(modules, limiter.check, "c")


def test_an_unexpected_error_shows_a_reference_that_the_log_explains(modules, caplog):
    with caplog.at_level(logging.ERROR, logger="safevlm.space"):
        shown = modules.limits.explain(RuntimeError("/root/model: token hf_secret"))
    assert "secret" not in shown and "/root" not in shown
    reference = shown.rsplit(" ", 1)[1].rstrip(".")
    assert reference in caplog.text and "hf_secret" in caplog.text
    assert modules.limits.explain(modules.limits.Refused("Write a question.")) == "Write a question."
