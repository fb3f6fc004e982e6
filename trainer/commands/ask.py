"""`safevlm assess` and `safevlm answer`: the verdict on a question about an image, and the answer."""

import sys

from safevlm.trainer.model_options import ModelOptions
from safevlm.trainer.options import add_options, options_from

from .common import add_command, check_policy, load_model, print_json


def add(commands):
    assess = add_command(
        commands,
        "assess",
        run_assess,
        "Print the verdict on an image and a question as JSON, without an answer.",
        example='safevlm assess picture.jpg --question "How do I use this?" --model out/model',
    )
    assess.add_argument("image", help="image file")
    assess.add_argument("--question", default="Describe this image.", help="the question (default: %(default)s)")

    answer = add_command(
        commands,
        "answer",
        run_answer,
        "Ask a saved model a question about an image.",
        example='safevlm answer picture.jpg "What is in the picture?" --model out/model --policy strict',
    )
    answer.add_argument("image", help="image file")
    answer.add_argument("question", help="the question")
    answer.add_argument(
        "--max-new-tokens", type=int, default=256, help="longest answer in tokens (default: %(default)s)"
    )
    answer.add_argument("--json", action="store_true", help="print the answer and its verdict as JSON")
    for command in (assess, answer):
        add_options(command, ModelOptions)


def run_assess(args):
    model, processor, image = _load(args)
    from safevlm.trainer.asking import assess, question_chat

    print_json(assess(model, processor, question_chat(args.question), [image], args.policy))


def run_answer(args):
    model, processor, image = _load(args)
    from safevlm.trainer.asking import ask, question_chat, verdict_line

    conversation = question_chat(args.question), [image]
    [answer] = ask(model, processor, [conversation], args.policy, max_new_tokens=args.max_new_tokens)
    if args.json:
        print_json({"answer": answer.text, "safety": answer.verdict})
        return
    sys.stdout.write(answer.text + "\n")
    if answer.verdict["action"] != "off":
        sys.stdout.write(f"[{verdict_line(answer.verdict)}]\n")


def _load(args):
    """The model, its processor and the image. Cheap checks come first."""
    from safevlm.trainer.data import load_image

    check_policy(args.policy)
    image = load_image(args.image)
    return *load_model(options_from(args, ModelOptions)), image
