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
    ids = {text: _hint_ids(processor, text) for text in texts["hints"]}
    ids |= {text: _answer_ids(processor, text) for text in texts["refusals"]}
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


def _hint_ids(processor, text: str) -> list[int]:
    if not getattr(processor, "chat_template", None):
        return _encode(processor, " " + text)
    plain = _render(processor, [_user("a")], add_generation_prompt=True)
    hinted = _render(processor, [_user(f"a {text}")], add_generation_prompt=True)
    start = _common_prefix(plain, hinted)
    end = len(plain) - start  # what follows the user's words: end of turn, generation prompt
    return hinted[start : len(hinted) - end]


def _answer_ids(processor, text: str) -> list[int]:
    """What is to be written after the generation prompt, so that `text` is the answer that a user sees."""
    if not getattr(processor, "chat_template", None):
        return _encode(processor, " " + text)
    prompt, answer = [_user("a")], {"role": "assistant", "content": [{"type": "text", "text": text}]}
    ids, full = _render(processor, prompt, add_generation_prompt=True), _render(processor, [*prompt, answer])
    if full[: len(ids)] == ids:
        # What the template writes after an answer (white space, end of turn) is not part of the text.
        tokenizer = getattr(processor, "tokenizer", processor)
        ids, length = full[len(ids) :], 1
        while length < len(ids) and not _ends_with(tokenizer.decode(ids[:length], skip_special_tokens=True), text):
            length += 1
        return ids[:length]
    # Behind an open tag of thoughts other text makes other tokens, and some templates close it after thoughts only.
    opening = _rendered(processor, prompt, add_generation_prompt=True)
    for thought in ("", "b"):
        full = _rendered(processor, [*prompt, {**answer, "reasoning_content": thought}])
        if full.startswith(opening + thought) and text in full:
            return _encode(processor, full[len(opening + thought) : full.rindex(text) + len(text)])
    tag = re.search(r"<(\w+)>\s*$", opening)
    return _encode(processor, " " + text if tag is None else f"\n</{tag[1]}>\n\n{text}")


def _ends_with(written: str, text: str) -> bool:
    return written.rstrip().endswith(text)


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
