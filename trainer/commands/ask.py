"""`safevlm assess` and `safevlm answer`: one question about one image."""

import sys

from .common import add_command, add_model_arguments, check_policy, load_model, print_json


def add(commands):
    assess = add_command(
        commands,
        "assess",
        run_assess,
        "The verdict on an image and a question, as JSON; the language model does not run.",
        example='safevlm assess picture.jpg --question "How do I use this?" --model out/model',
    )
    assess.add_argument("image", help="file to look at")
    assess.add_argument("--question", default="Describe this image.", help="what is asked (default: a description)")

    answer = add_command(
        commands,
        "answer",
        run_answer,
        "Ask a saved model a question about an image.",
        example='safevlm answer picture.jpg "What is in the picture?" --model out/model --policy strict',
    )
    answer.add_argument("image", help="file to look at")
    answer.add_argument("question", help="what is asked")
    answer.add_argument("--max-new-tokens", type=int, default=256, help="longest answer (default: 256)")
    answer.add_argument("--json", action="store_true", help="print answer and verdict as JSON")
    for command in (assess, answer):
        add_model_arguments(command)


def run_assess(args):
    model, processor, inputs = _load(args, args.question)
    verdict = model.assess(**inputs, safety_policy=args.policy)
    print_json(verdict.to_list()[0])


def run_answer(args):
    model, processor, inputs = _load(args, args.question)
    output = model.generate(
        **inputs,
        safety_policy=args.policy,
        tokenizer=processor.tokenizer,
        max_new_tokens=args.max_new_tokens,
        return_dict_in_generate=True,
    )
    text = processor.decode(output.sequences[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
    safety = output["safety"].to_list()[0]
    if args.json:
        print_json({"answer": text, "safety": safety})
    else:
        sys.stdout.write(text + "\n")
        if safety["action"] != "off":
            verdict = safety.get("error")  # the head failed
            if verdict is None:
                verdict = f"{safety['category']}, {safety['level']}; risk {safety['score']:.3f}"
            sys.stdout.write(f"[{safety['action']}; {verdict}]\n")


def _load(args, question: str):
    """A saved model, its processor, and one question about one image as model inputs."""
    from safevlm.trainer.data import load_image

    check_policy(args.policy)
    image = load_image(args.image)
    model, processor = load_model(args.model, args.device)
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
    prompt = processor.apply_chat_template(chat, add_generation_prompt=True)
    inputs = processor(images=[image], text=[prompt], return_tensors="pt").to(model.device, model.dtype)
    return model, processor, inputs
