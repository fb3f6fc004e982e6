"""A model's own policy, and its texts as token ids: making them, checking them, looking up what each row gets.

`set_safety_policy` renders the texts with the processor's chat template and saves their token ids in the
configuration, so that the model can write hints and refusals without a tokenizer.
"""

import os.path
import re
import unicodedata

import torch

from .safety_policy import ACTIONS, POLICY_PRESETS, UNKNOWN_RISK, SafetyPolicy


class PolicyMixin:
    """A model's own safety policy: stored in its configuration with its texts as token ids, resolved for each call."""

    def set_safety_policy(self, policy, processor=None):
        """
        Makes `policy` the model's own, which is saved with it.

        Args:
            policy (`SafetyPolicy`, `dict`, file or preset name)
            processor (*optional*): Needed if the policy has texts that the model has no token ids for.

        Raises:
            `ValueError`: The policy does not fit the model's labels, or the tokenizer cannot write one of its texts.
        """
        policy = SafetyPolicy.from_value(policy).for_labels(self.config.labels)
        if processor is not None:
            store_policy_texts(self.config, policy, processor, self.control_token_ids())
        self.config.safety_policy = policy.to_dict()

    def resolve_policy(self, policy=None) -> SafetyPolicy:
        """
        The policy that a call asks for, by default the model's own. A preset name always means the preset, whatever
        the model's own policy is called; only the calibration of the head (the temperatures) is the model's.
        """
        own = SafetyPolicy.from_value(self.config.safety_policy, files=False)
        if isinstance(policy, str) and policy in POLICY_PRESETS:
            policy = POLICY_PRESETS[policy].replace(
                level_temperature=own.level_temperature, category_temperature=own.category_temperature
            )
        policy = own if policy is None else SafetyPolicy.from_value(policy)
        return policy.for_labels(self.config.labels)

    def policy_weaknesses(self) -> list[str]:
        """How the model's own policy is milder than the preset `"default"`; see [`SafetyPolicy.weaknesses`]."""
        return self.resolve_policy().weaknesses(self.config.labels)

    def check_policy_texts(self, processor=None):
        """
        Raises `ValueError` if the stored token ids of the policy's texts cannot be right. Only with a `processor` (or
        tokenizer) can it check what the ids say, and that both have the same placeholder.
        """
        check_policy_texts(self.config, self.control_token_ids(), processor)

    def control_token_ids(self) -> set[int | None]:
        """Ids that no text of a policy may have."""
        settings, eos = self.generation_config, self.generation_config.eos_token_id
        ends = [] if eos is None else torch.as_tensor(eos).flatten().tolist()
        placeholders = {self.config.safety_token_id, self.backbone.image_token_id}
        return placeholders | {*ends, settings.pad_token_id, settings.bos_token_id}


# -- making ----------------------------------------------------------------------------------------------------------


def store_policy_texts(config, policy: SafetyPolicy, processor, control_ids: set[int]):
    """Adds the token ids of all texts of `policy` to `config`, once they are checked. See [`check_policy_texts`]."""
    texts = policy_token_ids(processor, policy.texts(config.labels))
    for text, ids in texts.items():
        _check_ids(text, _parse(ids), config, control_ids, getattr(processor, "tokenizer", processor))
    config.policy_token_ids = {**config.policy_token_ids, **texts}
    config.generation_prompt_token_ids = generation_prompt_token_ids(processor)
    config.answer_opening_token_ids = answer_opening_token_ids(processor)


def policy_token_ids(processor, texts: dict[str, list[str]]) -> dict[str, str]:
    """
    Args:
        processor: A processor or tokenizer. Without a chat template each text is encoded alone.
        texts (`dict[str, list[str]]`): From [`SafetyPolicy.texts`].

    Returns:
        `dict[str, str]`: text -> its token ids, separated by spaces (which keeps `config.json` readable).
    """
    if _has_template(processor):
        opening = _answer_opening(processor)
        ids = {hint: _hint_ids(processor, hint) for hint in texts["hints"]}
        ids |= {refusal: _refusal_ids(processor, refusal, opening) for refusal in texts["refusals"]}
    else:
        ids = {text: _encode_alone(processor, text) for text in (*texts["hints"], *texts["refusals"])}
    return {text: " ".join(map(str, tokens)) for text, tokens in ids.items()}


def generation_prompt_token_ids(processor) -> list[int]:
    """
    What the chat template writes between the last user's words and the answer: the end of the turn and the opening of
    the answer (`" ASSISTANT:"`, `" [/INST]"`). Empty without a template.
    """
    if not _has_template(processor):
        return []
    reversed_prompts = [_render(processor, _user(words))[::-1] for words in ("a", "b?", "c 1")]
    return os.path.commonprefix(reversed_prompts)[::-1]


def answer_opening_token_ids(processor) -> list[int]:
    """
    What a forced answer must begin with to be visible: the end of the thoughts that the generation prompt opens
    (`"\\n</think>\\n\\n"`), or an empty thought. Empty for models that answer at once.
    """
    return _encode(processor, _answer_opening(processor)) if _has_template(processor) else []


def _hint_ids(processor, hint: str) -> list[int]:
    plain, hinted = (_render(processor, _user(words)) for words in ("a", f"a {hint}"))
    start = len(os.path.commonprefix([plain, hinted]))
    num_after = len(plain) - start  # what follows the user's words: end of turn, generation prompt
    return hinted[start : len(hinted) - num_after]


def _refusal_ids(processor, refusal: str, opening: str) -> list[int]:
    prompt, full = _render(processor, _user("a")), _render(processor, _user("a"), _assistant(refusal))
    if opening or full[: len(prompt)] != prompt:  # some templates render past answers in another way
        return _encode_alone(processor, refusal, opening)
    # The template may write more after the answer (white space, end of turn), which is not part of the text.
    answer, tokenizer = full[len(prompt) :], getattr(processor, "tokenizer", processor)
    ends = (n for n in range(len(answer)) if tokenizer.decode(answer[:n], skip_special_tokens=True).strip() == refusal)
    return answer[: next(ends, len(answer))]


def _answer_opening(processor) -> str:
    """What the template writes between its generation prompt and an answer; empty if that is only white space."""
    prompt = _render_text(processor, _user("a"))
    for thoughts in ({}, {"reasoning_content": "c"}):  # some templates close thoughts only if there are any
        full = _render_text(processor, _user("a"), {**_assistant("b?"), **thoughts})
        begun = prompt + thoughts.get("reasoning_content", "")
        if full.startswith(begun) and "b?" in full[len(begun) :]:
            opening = full[len(begun) :].partition("b?")[0]
            return opening if opening.strip() else ""
    tag = re.search(r"<(\w+)>\s*$", prompt)  # opened by the template, and closed by nobody but the model
    return f"\n</{tag[1]}>\n\n" if tag else ""


def _has_template(processor) -> bool:
    return bool(getattr(processor, "chat_template", None))


def _user(text: str) -> dict:
    return {"role": "user", "content": [{"type": "text", "text": text}]}


def _assistant(text: str) -> dict:
    return {**_user(text), "role": "assistant"}


def _render_text(processor, *messages) -> str:
    """The chat as the template writes it, with a generation prompt if the user spoke last."""
    asked = messages[-1]["role"] == "user"
    return processor.apply_chat_template(list(messages), add_generation_prompt=asked, tokenize=False)


def _render(processor, *messages) -> list[int]:
    return _encode(processor, _render_text(processor, *messages))


def _encode_alone(processor, text: str, opening="") -> list[int]:
    return _encode(processor, text if opening else " " + text)


def _encode(processor, text: str) -> list[int]:
    return getattr(processor, "tokenizer", processor)(text, add_special_tokens=False)["input_ids"]


# -- checking --------------------------------------------------------------------------------------------------------


def check_policy_texts(config, control_ids: set[int], processor=None):
    """
    Raises `ValueError` if the saved token ids cannot stand for the policy's texts. A refusal must not be empty, end
    early, or say something else.

    Args:
        control_ids (`set[int]`): Ids that no text may have: placeholders, padding, starts and ends of sequences.
        processor (processor or tokenizer, *optional*): Needed to tell whether the ids say what the texts say, and
            whether placeholder and template are those that the model knows.
    """
    placeholder = getattr(processor, "safety_token_id", config.safety_token_id)
    if placeholder != config.safety_token_id:
        raise ValueError(
            f"The processor's placeholder has the token id {placeholder}, the model's {config.safety_token_id}: use "
            f"the processor that was saved with the model."
        )
    opening = config.answer_opening_token_ids
    if opening and hasattr(processor, "chat_template") and opening != answer_opening_token_ids(processor):
        raise ValueError(
            "`answer_opening_token_ids` are not what the processor's template writes before an answer: store the "
            "policy again with `model.set_safety_policy(policy, processor)`."
        )
    _check_opening(config, control_ids)
    for text, ids in config.policy_token_ids.items():
        _check_ids(text, _parse(ids), config, control_ids, getattr(processor, "tokenizer", processor))


def _check_opening(config, control_ids: set[int]):
    if config.answer_opening_token_ids:
        _check_ids(None, config.answer_opening_token_ids, config, control_ids)


def _check_ids(text: str | None, ids: list[int], config, control_ids: set[int], tokenizer=None):
    """
    Args:
        text (`str`, *optional*): `None` for the opening of an answer, which nobody reads.
        tokenizer (*optional*): Needed to compare the ids with `text`.
    """
    readable = tokenizer is not None and text is not None
    if readable:
        control_ids = control_ids | set(tokenizer.all_special_ids)
    vocab_size, problem = config.get_text_config().vocab_size, None
    if not ids:
        problem = "no tokens at all"
    elif strange := [i for i in ids if not isinstance(i, int)]:
        problem = f"{strange[0]!r}, which is no token id"
    elif outside := [i for i in ids if not 0 <= i < vocab_size]:
        problem = f"the token id {outside[0]}, outside the vocabulary of {vocab_size}"
    elif control := [i for i in ids if i in control_ids]:
        problem = f"the special token {control[0]}"
    elif readable:
        decoded = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        if _letters(decoded) != _letters(text):
            problem = f"tokens that say {decoded!r}"
    if problem:
        subject = (
            "What opens an answer (`answer_opening_token_ids`)" if text is None else f"The policy's text {text!r}"
        )
        raise ValueError(
            f"{subject} has {problem}. Use another text, or store the policy again with "
            f"`model.set_safety_policy(policy, processor)`."
        )


def _letters(text: str) -> str:
    """What tokenizers keep of a text: its characters, but neither its white space nor how they are composed."""
    return "".join(unicodedata.normalize("NFKC", text).split())


# -- looking up ------------------------------------------------------------------------------------------------------


def row_texts(verdict, policy: SafetyPolicy, config, control_ids: set[int], tokenizer=None):
    """
    Token ids of each row's hint and of its forced refusal, two lists with `None` where there is none.

    Rows that the head could not judge are refused under every policy: nobody knows what a hint would have to say.

    Args:
        tokenizer (*optional*): Encodes texts that `config` has no token ids for, and checks those that it has.

    Raises:
        `ValueError`: A text has no token ids, or ids that cannot stand for it.
    """
    hints, refusals = [], []
    rows = zip(verdict.action.tolist(), verdict.category.tolist(), verdict.failed.tolist(), strict=True)
    for action, category, failed in rows:
        name, hint, refusal = config.category_names[category], None, None
        if failed:
            refusal = policy.refusal(UNKNOWN_RISK)
            if tokenizer is None and refusal not in config.policy_token_ids:
                refusal = policy.refusal(name)  # earlier releases saved the categories' texts only
        elif ACTIONS[action] == "refuse" and policy.forced_refusal:
            refusal = policy.refusal(name)
        else:
            hint = policy.hint(ACTIONS[action], name)
        hints.append(_text_ids(hint, config, control_ids, tokenizer))
        refusals.append(_text_ids(refusal, config, control_ids, tokenizer))
    return hints, refusals


def _text_ids(text: str | None, config, control_ids: set[int], tokenizer) -> list[int] | None:
    if text is None:
        return None
    if text in config.policy_token_ids:
        ids = _parse(config.policy_token_ids[text])
    elif tokenizer is not None:
        ids = _encode_alone(tokenizer, text, config.answer_opening_token_ids)
    else:
        raise ValueError(
            f"The policy's text {text!r} has no token ids in this model. Pass `tokenizer=processor.tokenizer` to "
            f"`generate`, or store the policy with `model.set_safety_policy(policy, processor)`."
        )
    _check_ids(text, ids, config, control_ids, tokenizer)
    _check_opening(config, control_ids)
    return ids


def _parse(ids: str) -> list[int]:
    return [int(i) for i in ids.split()]
