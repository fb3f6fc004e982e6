"""Run in a process that cannot import safevlm: loads a model from the Hub by its id, and runs its card's example."""

import contextlib
import io
import json
import re
import sys


class Block:
    """Hides the installed safevlm, so that it is missing as on a user's machine."""

    def find_spec(self, name, path=None, target=None):
        if name == "safevlm" or name.startswith("safevlm."):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


sys.meta_path.insert(0, Block())

import torch  # noqa: E402
from huggingface_hub import hf_hub_download  # noqa: E402
from PIL import Image  # noqa: E402
from transformers import AutoModel, AutoModelForImageTextToText, AutoProcessor, pipeline  # noqa: E402


def run(repo_id: str, revision: str, question: str) -> dict:
    torch.set_num_threads(1)
    options = {"trust_remote_code": True, "revision": revision}
    image = Image.open("picture.png")
    content = [{"type": "image", "image": image}, {"type": "text", "text": question}]
    chat = [{"role": "user", "content": content}]
    processor = AutoProcessor.from_pretrained(repo_id, **options)
    prompt = processor.apply_chat_template(chat, add_generation_prompt=True)
    inputs = processor(images=[image], text=[prompt], return_tensors="pt")
    result = {"input_ids": inputs["input_ids"].tolist()}
    for auto in (AutoModel, AutoModelForImageTextToText):
        model = auto.from_pretrained(repo_id, **options).eval()
        with torch.no_grad():
            output = model(**inputs)
        result[auto.__name__] = {
            "module": type(model).__module__,
            "logits": output.logits.tolist(),
            "safety_level_logits": output.safety_level_logits.tolist(),
            "sequences": model.generate(**inputs).tolist(),
        }
    pipe = pipeline("image-text-to-text", model=repo_id, **options)
    answer = pipe(text=chat, return_full_text=False, max_new_tokens=8)[0]
    result["pipeline"] = {name: answer[name] for name in ("generated_text", "safety")}
    with open(hf_hub_download(repo_id, "README.md", revision=revision), encoding="utf-8") as file:
        (example,) = re.findall(r"```python\n(.*?)```", file.read(), re.DOTALL)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(example, "README.md", "exec"), {})
    result["example"] = printed.getvalue().splitlines()
    return result


if __name__ == "__main__":
    result = run(*sys.argv[1:])
    assert not any(name.split(".")[0] == "safevlm" for name in sys.modules)
    sys.stdout.write("\nRESULT " + json.dumps(result) + "\n")
