"""A policy's texts as token ids, exactly as the chat template would put them, so that the model needs no tokenizer."""

import re


def policy_token_ids(processor, texts: dict[str, list[str]]) -> dict[str, str]:
    """
    Args:
        processor: A processor with a chat template (or a tokenizer; then texts are encoded on their own).
        texts (`dict[str, list[str]]`): From [`SafetyPolicy.texts`].

    Returns:
        `dict[str, str]`: text -> its token ids, space separated (which keeps `config.json` readable).
    """
    opening = _answer_opening(processor)
    ids = {text: _hint_ids(processor, text) for text in texts["hints"]}
    ids |= {text: _answer_ids(processor, text, opening) for text in texts["refusals"]}
    return {text: " ".join(map(str, tokens)) for text, tokens in ids.items()}


def generation_prompt_token_ids(processor) -> list[int]:
    """
    Token ids that the chat template puts between the last user's words and the answer: the end of the turn and what
    opens the answer (`" ASSISTANT:"`, `" [/INST]"`). Empty without a template.
    """
    if not getattr(processor, "chat_template", None):
        return []
    prompts = [_render(processor, [_user(words)], add_generation_prompt=True) for words in ("a", "b?", "c 1")]
    backwards = [prompt[::-1] for prompt in prompts]
    shared = min(_common_prefix(backwards[0], other) for other in backwards[1:])
    return prompts[0][len(prompts[0]) - shared :]


def answer_opening_token_ids(processor) -> list[int]:
    """
    Token ids that a forced answer begins with, so that it is what a user sees: the end of the thoughts that the
    generation prompt opens (`"\\n</think>\\n\\n"`), or an empty thought. Empty for models that answer at once.
    """
    return _encode(processor, _answer_opening(processor))


def _hint_ids(processor, text: str) -> list[int]:
    if not getattr(processor, "chat_template", None):
        return _encode(processor, " " + text)
    plain = _render(processor, [_user("a")], add_generation_prompt=True)
    hinted = _render(processor, [_user(f"a {text}")], add_generation_prompt=True)
    start = _common_prefix(plain, hinted)
    end = len(plain) - start  # what follows the user's words: end of turn, generation prompt
    return hinted[start : len(hinted) - end]


def _answer_opening(processor) -> str:
    """What the template writes between its generation prompt and an answer, unless it is white space."""
    if not getattr(processor, "chat_template", None):
        return ""
    asked = _rendered(processor, [_user("a")], add_generation_prompt=True)
    for thought in ({}, {"reasoning_content": "c"}):  # some templates close thoughts only behind some
        full = _rendered(processor, [_user("a"), {**_assistant("b?"), **thought}])
        begun = asked + thought.get("reasoning_content", "")
        if full.startswith(begun) and "b?" in full[len(begun) :]:
            opening = full[len(begun) : full.index("b?", len(begun))]
            return opening if opening.strip() else ""
    tag = re.search(r"<(\w+)>\s*$", asked)  # opened, and closed by the model alone
    return "" if tag is None else f"\n</{tag[1]}>\n\n"


def _answer_ids(processor, text: str, opening: str) -> list[int]:
    if opening:
        return _encode(processor, text)
    if not getattr(processor, "chat_template", None):
        return _encode(processor, " " + text)
    prompt = _render(processor, [_user("a")], add_generation_prompt=True)
    full = _render(processor, [_user("a"), _assistant(text)])
    if full[: len(prompt)] != prompt:  # a template that renders past answers differently
        return _encode(processor, " " + text)
    # What the template writes after an answer (white space, end of turn) is not part of the text.
    tokenizer = getattr(processor, "tokenizer", processor)
    answer, length = full[len(prompt) :], 1
    while tokenizer.decode(answer[:length], skip_special_tokens=True).strip() != text and length < len(answer):
        length += 1
    return answer[:length]


def _assistant(text: str) -> dict:
    return {**_user(text), "role": "assistant"}


def _user(text: str) -> dict:
    return {"role": "user", "content": [{"type": "text", "text": text}]}


def _render(processor, messages, add_generation_prompt=False) -> list[int]:
    return _encode(processor, _rendered(processor, messages, add_generation_prompt))


def _rendered(processor, messages, add_generation_prompt=False) -> str:
    return processor.apply_chat_template(messages, add_generation_prompt=add_generation_prompt, tokenize=False)


def _encode(processor, text: str) -> list[int]:
    return getattr(processor, "tokenizer", processor)(text, add_special_tokens=False)["input_ids"]


def _common_prefix(a: list[int], b: list[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
