"""One picture gives the model the same pixels on every road: processor, chat, pipeline, training, CLI, server."""

import base64
import io
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from odd_pictures import MUST_BE_REFUSED, MUST_LOAD
from PIL import Image
from tiny import chat

from safevlm import SafeVlmPipeline
from safevlm.processing.pictures import MAX_PIXELS, PictureError, find_picture, load_picture
from safevlm.safety_verdict import SafetyVerdict
from safevlm.trainer.asking import encode_chats
from safevlm.trainer.commands import ask
from safevlm.trainer.data import SafetyRow
from safevlm.trainer.encoding.row_encoder import encode_row
from safevlm.trainer.serving.answering import decode_image
from safevlm.trainer.serving.errors import RequestError

QUESTION = "What is it?"
SETTINGS = dict(add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt")


@pytest.fixture(scope="module")
def pipe(model, processor):
    return SafeVlmPipeline(model=model, processor=processor)


def part(**source):
    return [{"role": "user", "content": [{"type": "image", **source}, {"type": "text", "text": QUESTION}]}]


def data_url(path):
    return f"data:image/png;base64,{base64.b64encode(Path(path).read_bytes()).decode()}"


def roads(path, model, processor, pipe):
    """For each road, a function that gives the pixels of the picture at `path`."""
    prompt = processor.apply_chat_template(chat(QUESTION), add_generation_prompt=True)
    url = data_url(path)

    def called(source):
        return processor(images=[source], text=[prompt], return_tensors="pt")

    def templated(messages):
        return processor.apply_chat_template(messages, **SETTINGS)

    def served():
        return encode_chats(processor, [chat(QUESTION)], [[decode_image(url, 1, MAX_PIXELS)]], model)

    def asked():
        args = SimpleNamespace(image=Path(path), question=QUESTION, model="m", policy=None, device=None)
        inputs = {}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ask, "load_model", lambda *_: (model, processor))
            patch.setattr(
                model,
                "assess",
                lambda **given: inputs.update(given) or SafetyVerdict.unassessed(1, model.config.labels),
            )
            ask.run_assess(args)
        return inputs

    def trained():
        messages = [*chat(QUESTION), {"role": "assistant", "content": [{"type": "text", "text": "yes"}]}]
        return encode_row(SafetyRow("row", (Path(path),), messages, 0, 1), processor, model.config)

    return {
        "processor, file": lambda: called(Path(path)),
        "processor, name": lambda: called(str(path)),
        "processor, bytes": lambda: called(Path(path).read_bytes()),
        "processor, image": lambda: called(Image.open(path)),
        "processor, one image": lambda: processor(images=Image.open(path), text=prompt, return_tensors="pt"),
        "chat, image": lambda: templated(part(image=Image.open(path))),
        "chat, path": lambda: templated(part(path=str(path))),
        "chat, base64": lambda: templated(part(base64=url.split(",")[1])),
        "chat, data URL": lambda: templated(part(url=url)),
        "pipeline, path": lambda: pipe.preprocess({"images": str(path), "text": prompt}),
        "pipeline, image": lambda: pipe.preprocess({"images": [Image.open(path)], "text": prompt}),
        "training": trained,
        "CLI": asked,
        "server": served,
    }


@pytest.mark.parametrize("name", MUST_LOAD)
def test_a_picture_has_the_same_pixels_on_every_road(odd_files, model, processor, pipe, name):
    upright = Image.fromarray(np.asarray(load_picture(odd_files / name)))
    expected = processor.image_processor([upright], return_tensors="pt")["pixel_values"]
    for road, inputs in roads(odd_files / name, model, processor, pipe).items():
        assert torch.equal(inputs()["pixel_values"], expected), road


@pytest.mark.parametrize("name", sorted(MUST_BE_REFUSED.keys() - {"la.tga", "decompression_bomb.ico"}))
def test_a_picture_that_is_refused_is_refused_on_every_road(odd_files, model, processor, pipe, name):
    for road, inputs in roads(odd_files / name, model, processor, pipe).items():
        # PIL's own errors where the caller opens the file.
        with pytest.raises((ValueError, OSError, RequestError, Image.DecompressionBombError)):
            inputs()
            pytest.fail(road)


def test_arrays_and_tensors_are_taken_as_they_are(processor):
    prompt = processor.apply_chat_template(chat(QUESTION), add_generation_prompt=True)
    pixels = np.random.default_rng(0).integers(0, 255, (32, 32, 3), np.uint8)
    expected = processor(images=[Image.fromarray(pixels)], text=[prompt], return_tensors="pt")["pixel_values"]
    for picture in (pixels, torch.from_numpy(pixels.copy())):
        assert processor.load_pictures([picture])[0] is picture
        found = processor(images=[picture], text=[prompt], return_tensors="pt")["pixel_values"]
        assert torch.equal(found, expected)


@pytest.mark.parametrize(
    "mode", ["1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV"]
)
def test_every_8_bit_mode_becomes_rgb(mode):
    picture = Image.new("RGBA", (2, 2), (200, 30, 30, 255))
    for step in ({"1": "L", "La": "LA", "P": "RGB", "CMYK": "RGB", "YCbCr": "RGB", "HSV": "RGB"}.get(mode), mode):
        picture = picture if step is None else picture.convert(step)
    loaded = load_picture(picture)
    assert loaded.mode == "RGB" and loaded.info == {}
    coloured = mode not in ("1", "L", "LA", "La")
    assert abs(loaded.getpixel((0, 0))[0] - (200 if coloured else loaded.getpixel((0, 0))[1])) < 12


@pytest.mark.parametrize("mode", ["I;16", "I;16B", "I;16L"])
def test_16_bit_grey_is_scaled(mode):
    picture = Image.new(mode, (1, 1))
    picture.putpixel((0, 0), 32896)
    assert load_picture(picture).getpixel((0, 0)) == (128, 128, 128)


def test_an_oriented_picture_stays_oriented_through_copies(processor):
    exif = Image.Exif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (8, 4, 3), np.uint8)).save(buffer, "PNG", exif=exif)
    opened = Image.open(buffer)
    upright = load_picture(buffer.getvalue())
    assert upright.size == (8, 4)
    for picture in (opened, opened.copy(), opened.convert("RGB"), load_picture(opened)):
        assert load_picture(picture) == upright


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("no/such/file.png", "does not exist"),
        ("no such file", "does not exist"),
        ("x" * 200 + "!", "no path, web address or base64"),
        ("data:image/png;base64,!!", "no path, web address or base64"),
        ("A" * 200, "not a readable"),
        ("\0.png", "cannot be opened"),
        ("http://127.0.0.1:9/x.png", "cannot be fetched"),
    ],
)
def test_a_string_that_is_no_picture_is_refused(processor, name, reason):
    with pytest.raises(PictureError, match=reason):
        processor.load_pictures([name])


def test_a_web_address_is_fetched_and_read_as_a_file(tmp_path, odd_files, monkeypatch):
    import threading
    from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

    (tmp_path / "x.png").write_bytes((odd_files / "transparent.png").read_bytes())

    class Quiet(SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=tmp_path)

        def log_message(self, *args):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Quiet) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}/x.png"
        assert load_picture(find_picture(address)) == load_picture(odd_files / "transparent.png")
        with pytest.raises(PictureError, match="cannot be fetched.*404"):
            find_picture(address + "x")
        monkeypatch.setattr("safevlm.processing.pictures.MAX_FILE_BYTES", 100)
        with pytest.raises(PictureError, match="more than 100 bytes"):
            find_picture(address)
        server.shutdown()
