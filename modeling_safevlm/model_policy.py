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
            processor (processor or tokenizer, *optional*): Needed if the policy has texts that the model has no token
                ids for. Without a chat template each text is encoded alone.

        Raises:
            `ValueError`: The policy does not fit the model's labels, or the tokenizer cannot write one of its texts.
        """
        policy = SafetyPolicy.from_value(policy).for_labels(self.config.labels)
        if processor is not None:
            opening, texts = _answer_opening(processor), policy.texts(self.config.labels)
            token_ids = {hint: _hint_ids(processor, hint) for hint in texts["hints"]}
            token_ids |= {refusal: _refusal_ids(processor, refusal, opening) for refusal in texts["refusals"]}
            for text, ids in token_ids.items():
                self._check_ids(text, ids, getattr(processor, "tokenizer", processor))
            saved = {text: " ".join(map(str, ids)) for text, ids in token_ids.items()}  # keeps `config.json` readable
            self.config.policy_token_ids = {**self.config.policy_token_ids, **saved}
            self.config.generation_prompt_token_ids = _generation_prompt_ids(processor)
            self.config.answer_opening_token_ids = _encode(processor, opening)
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
        Raises `ValueError` if the saved token ids cannot be the policy's texts: a refusal must not be empty, end early
        or say something else. Only with a `processor` (or tokenizer) can it check what the ids say, and that
        placeholder and chat template are the model's.
        """
        config = self.config
        placeholder = getattr(processor, "safety_token_id", config.safety_token_id)
        if placeholder != config.safety_token_id:
            raise ValueError(
                f"The processor's placeholder has the token id {placeholder}, the model's {config.safety_token_id}: "
                f"use the processor that was saved with the model."
            )
        opening = config.answer_opening_token_ids
        if opening and hasattr(processor, "chat_template"):
            if opening != _encode(processor, _answer_opening(processor)):
                raise ValueError(
                    "`answer_opening_token_ids` are not what the processor's template writes before an answer: store "
                    "the policy again with `model.set_safety_policy(policy, processor)`."
                )
        if opening:
            self._check_ids(None, opening)
        for text, ids in saved_token_ids(config).items():
            self._check_ids(text, ids, getattr(processor, "tokenizer", processor))

    def row_texts(self, verdict, policy: SafetyPolicy, tokenizer=None):
        """
        The token ids of each row's hint and of its forced refusal: two lists, with `None` where there is none.

        Rows on which the head failed are refused under every policy, since no hint could name their risk.

        Args:
            tokenizer (*optional*): Encodes texts that were not saved with the model, and checks those that were.

        Raises:
            `ValueError`: A text has no token ids, or wrong ones.
        """
        hints, refusals = [], []
        rows = zip(verdict.action.tolist(), verdict.category.tolist(), verdict.failed.tolist(), strict=True)
        for action, category, failed in rows:
            name, hint, refusal = self.config.category_names[category], None, None
            if failed:
                refusal = policy.refusal(UNKNOWN_RISK)
                if tokenizer is None and refusal not in self.config.policy_token_ids:
                    refusal = policy.refusal(name)  # earlier releases saved the categories' texts only
            elif ACTIONS[action] == "refuse" and policy.forced_refusal:
                refusal = policy.refusal(name)
            else:
                hint = policy.hint(ACTIONS[action], name)
            hints.append(None if hint is None else self._text_ids(hint, tokenizer))
            refusals.append(None if refusal is None else self._text_ids(refusal, tokenizer))
        return hints, refusals

    def _text_ids(self, text: str, tokenizer) -> list[int]:
        opening = self.config.answer_opening_token_ids
        if text in self.config.policy_token_ids:
            ids = saved_token_ids(self.config)[text]
        elif tokenizer is not None:
            ids = _encode_alone(tokenizer, text, opening)
        else:
            raise ValueError(
                f"The policy's text {text!r} has no token ids in this model. Pass `tokenizer=processor.tokenizer` to "
                f"`generate`, or store the policy with `model.set_safety_policy(policy, processor)`."
            )
        self._check_ids(text, ids, tokenizer)
        if opening:
            self._check_ids(None, opening)
        return ids

    def _check_ids(self, text: str | None, ids: list[int], tokenizer=None):
        """
        Args:
            text (`str`, *optional*): `None` for the opening of an answer, which has no text to compare with.
            tokenizer (*optional*): Needed to compare the ids with `text`.
        """
        control_ids, vocab_size = self._control_token_ids(), self.config.get_text_config().vocab_size
        readable, problem = tokenizer is not None and text is not None, None
        if readable:
            control_ids |= set(tokenizer.all_special_ids)
        if not ids:
            problem = "no tokens at all"
        elif strange := [i for i in ids if not isinstance(i, int)]:
            problem = f"{strange[0]!r}, which is not a token id"
        elif outside := [i for i in ids if not 0 <= i < vocab_size]:
            problem = f"the token id {outside[0]}, outside the vocabulary of {vocab_size}"
        elif control := [i for i in ids if i in control_ids]:
            problem = f"the special token {control[0]}"
        elif readable:
            decoded = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
            if _letters(decoded) != _letters(text):
                problem = f"tokens that say {decoded!r}"
        if problem:
            opening = "What opens an answer (`answer_opening_token_ids`)"
            subject = opening if text is None else f"The policy's text {text!r}"
            raise ValueError(
                f"{subject} has {problem}. Use another text, or store the policy again with "
                f"`model.set_safety_policy(policy, processor)`."
            )

    def _control_token_ids(self) -> set[int | None]:
        """Ids that no text may have: placeholders, padding, starts and ends of sequences."""
        settings, eos = self.generation_config, self.generation_config.eos_token_id
        ends = [] if eos is None else torch.as_tensor(eos).flatten().tolist()
        placeholders = {self.config.safety_token_id, self.backbone.image_token_id}
        return placeholders | {*ends, settings.pad_token_id, settings.bos_token_id}


def saved_token_ids(config) -> dict[str, list[int]]:
    """text -> token ids, for all texts that were saved with the model."""
    return {text: [int(i) for i in ids.split()] for text, ids in config.policy_token_ids.items()}


def _letters(text: str) -> str:
    """The text without what tokenizers may change: white space and the composition of characters."""
    return "".join(unicodedata.normalize("NFKC", text).split())


# -- rendering texts with the chat template --------------------------------------------------------------------------


def _generation_prompt_ids(processor) -> list[int]:
    """
    What the chat template writes between the last user's words and the answer: the end of the turn and the opening of
    the answer (`" ASSISTANT:"`, `" [/INST]"`). Empty without a template.
    """
    if not _has_template(processor):
        return []
    reversed_prompts = [_render(processor, _user(words))[::-1] for words in ("a", "b?", "c 1")]
    return os.path.commonprefix(reversed_prompts)[::-1]


def _answer_opening(processor) -> str:
    """
    What a forced answer must start with to be visible: the end of the thoughts that the generation prompt opens
    (`"\\n</think>\\n\\n"`), or an empty thought. Empty for models that do not think first.
    """
    if not _has_template(processor):
        return ""
    prompt = _render_text(processor, _user("a"))
    for thoughts in ({}, {"reasoning_content": "c"}):  # some templates close thoughts only if there are any
        full = _render_text(processor, _user("a"), {**_assistant("b?"), **thoughts})
        begun = prompt + thoughts.get("reasoning_content", "")
        if full.startswith(begun) and "b?" in full[len(begun) :]:
            opening = full[len(begun) :].partition("b?")[0]
            return opening if opening.strip() else ""
    tag = re.search(r"<(\w+)>\s*$", prompt)  # opened by the template; only the model would close it
    return f"\n</{tag[1]}>\n\n" if tag else ""


def _hint_ids(processor, hint: str) -> list[int]:
    if not _has_template(processor):
        return _encode_alone(processor, hint)
    plain, hinted = (_render(processor, _user(words)) for words in ("a", f"a {hint}"))
    start = len(os.path.commonprefix([plain, hinted]))
    num_after = len(plain) - start  # what follows the user's words: end of turn, generation prompt
    return hinted[start : len(hinted) - num_after]


def _refusal_ids(processor, refusal: str, opening: str) -> list[int]:
    if opening or not _has_template(processor):
        return _encode_alone(processor, refusal, opening)
    prompt, full = _render(processor, _user("a")), _render(processor, _user("a"), _assistant(refusal))
    if full[: len(prompt)] != prompt:  # the template renders past answers in another way
        return _encode_alone(processor, refusal)
    # The template may write more after the answer (white space, end of turn), which is not part of the text.
    answer, tokenizer = full[len(prompt) :], getattr(processor, "tokenizer", processor)
    ends = (n for n in range(len(answer)) if tokenizer.decode(answer[:n], skip_special_tokens=True).strip() == refusal)
    return answer[: next(ends, len(answer))]


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
