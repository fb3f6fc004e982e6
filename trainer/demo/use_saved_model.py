"""A script of its own that uses a saved SafeVLM as a stranger would: with transformers alone, safevlm blocked.

    python use_saved_model.py MODEL REQUESTS

REQUESTS is a JSON list of `{"image": path, "question": text}`. The last line of the output is `ANSWERS` and the
requests as JSON, each with its `answer` and `safety`.
"""

import json
import sys


class NoSafeVlm:
    """An import finder that fails on safevlm."""

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "safevlm":
            raise ModuleNotFoundError(f"{name} is blocked: the saved model must not need it")


def main(model: str, requests: list[dict]) -> list[dict]:
    from PIL import Image
    from transformers import pipeline

    pipe = pipeline("image-text-to-text", model=model, trust_remote_code=True)
    answered = []
    for request in requests:
        image = {"type": "image", "image": Image.open(request["image"])}
        chat = [{"role": "user", "content": [image, {"type": "text", "text": request["question"]}]}]
        answer = pipe(text=chat, max_new_tokens=48, return_full_text=False)[0]
        answered.append({**request, "answer": answer["generated_text"].strip(), "safety": answer["safety"]})
    return answered


if __name__ == "__main__":
    sys.meta_path.insert(0, NoSafeVlm())
    sys.stdout.write("ANSWERS " + json.dumps(main(sys.argv[1], json.loads(sys.argv[2]))) + "\n")
