"""Run by test_remote_code.py in a process that cannot import safevlm: loads a saved model and prints what it does."""

import json
import sys
from pathlib import Path


class Block:
    """Makes safevlm, installed here, as absent as on a user's machine."""

    def find_spec(self, name, path=None, target=None):
        if name == "safevlm" or name.startswith("safevlm."):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


sys.meta_path.insert(0, Block())

import torch  # noqa: E402
from PIL import Image  # noqa: E402
from transformers import AutoModel, AutoModelForImageTextToText, AutoProcessor, pipeline  # noqa: E402


def run(folder: Path) -> dict:
    """Everything in `request.json`, as JSON."""
    torch.set_num_threads(1)
    request = json.loads((folder / "request.json").read_text())
    images = [Image.open(folder / name) for name in request["images"]]
    chats = [
        [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": question}]}]
        for image, question in zip(images, request["questions"], strict=True)
    ]
    result = {}

    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    prompts = [processor.apply_chat_template(chat, add_generation_prompt=True) for chat in chats]
    inputs = processor(images=images, text=prompts, return_tensors="pt", padding=True)
    result["prompts"], result["input_ids"] = prompts, inputs["input_ids"].tolist()
    for auto in (AutoModel, AutoModelForImageTextToText):
        model = auto.from_pretrained(folder, trust_remote_code=True).eval()
        with torch.no_grad():
            output = model(**inputs)
        sequences = model.generate(**inputs)
        result[auto.__name__] = {
            "class": type(model).__name__,
            "module": type(model).__module__,
            "logits": output.logits.tolist(),
            "safety_level_logits": output.safety_level_logits.tolist(),
            "sequences": sequences.tolist(),
        }

    pipe = pipeline("image-text-to-text", model=str(folder), trust_remote_code=True)
    call = dict(return_full_text=False, max_new_tokens=80)
    result["pipeline"] = {
        "class": type(pipe).__name__,
        "single": pipe(text=chats[0], **call),
        "list": pipe(text=chats, **call),
        "batched": pipe(text=chats, batch_size=2, **call),
        "full": pipe(text=chats[0], max_new_tokens=80)[0]["generated_text"][-1],
        "off": pipe(text=chats[0], generate_kwargs={"safety_policy": "off"}, **call),
        "policy": pipe(text=chats, batch_size=2, generate_kwargs={"safety_policy": request["policy"]}, **call),
        "beams": pipe(text=chats, batch_size=2, generate_kwargs={"num_beams": 2, "num_return_sequences": 2}, **call),
    }
    return result


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    (folder / "result.json").write_text(json.dumps(run(folder), default=lambda value: None))
    assert not any(name.split(".")[0] == "safevlm" for name in sys.modules)
