"""What a request adds to `generate`: OpenAI's penalties and biases, an end from outside, and text from tokens."""

from collections.abc import Callable

import torch
from transformers import LogitsProcessor, StoppingCriteria

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class OpenAiPenalties(LogitsProcessor):
    """
    OpenAI's formula: of a token's logit, `frequency` times its count in the answer so far and, where there is any,
    `presence` are taken; `bias` is added. The policy's forced refusals come after it and are not touched.

    Args:
        frequency, presence (`float` in [-2, 2])
        bias (`dict[int, float]`): By token id.
    """

    def __init__(self, frequency: float, presence: float, bias: dict[int, float]):
        self.frequency, self.presence = frequency, presence
        self.ids, self.values = torch.tensor(list(bias), dtype=torch.long), torch.tensor([*bias.values()])
        self.prompt_length = None

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        if self.prompt_length is None:
            self.prompt_length = input_ids.shape[1]
        written = input_ids[:, self.prompt_length :]
        counts = torch.zeros_like(scores).scatter_add_(1, written, torch.ones_like(written, dtype=scores.dtype))
        scores = scores - self.frequency * counts - self.presence * (counts > 0)
        if len(self.ids):
            scores = scores.index_add(1, self.ids.to(scores.device), self.values.to(scores).expand(len(scores), -1))
        return scores


class Until(StoppingCriteria):
    """
    Args:
        ended (`Callable[[], bool]`): Asked after each token.
    """

    def __init__(self, ended: Callable[[], bool]):
        self.ended = ended

    def __call__(self, input_ids, scores, **kwargs):
        return torch.full((len(input_ids),), self.ended(), dtype=torch.bool, device=input_ids.device)


class AnswerStreamer:
    """
    Hands on the verdict and then the answer's text, as far as it is certain: whole characters, and nothing of a stop
    text, where the answer ends.

    Args:
        stop (`list[str]`)
        send (`Callable`): Gets `(verdict,)`, then pieces of text.
    """

    def __init__(self, tokenizer, stop: list[str], send: Callable):
        self.tokenizer, self.stop, self.send = tokenizer, stop, send
        self.ids, self.stopped = [], False
        self._prompt_seen, self._begun = False, False
        self._start = self._read = 0  # tokens that give the next ones their context; those whose text is out
        self._held = ""  # may be the beginning of a stop text

    def put_safety(self, verdict):
        self.send((verdict.to_list()[0],))

    def put(self, tokens: torch.Tensor):
        if self._prompt_seen:
            self.ids.extend(tokens.flatten().tolist())
            self._hand_on()
        self._prompt_seen = True

    def end(self):
        """Of the interface; `flush` is the end of the answer."""

    def flush(self):
        self._hand_on(last=True)

    def _hand_on(self, last: bool = False):
        if self.stopped:
            return
        text = self._held + self._decoded(last)
        if not self._begun:
            text = text.lstrip()
        places = [at for at in map(text.find, self.stop) if at >= 0]
        self.stopped = bool(places)
        # A stop text may have begun in the last characters.
        keep = min(places) if places else len(text) if last else len(text) - max(map(len, self.stop), default=1) + 1
        keep = max(keep, 0)
        self._held = text[keep:]
        if keep:
            self._begun = True
            self.send(text[:keep])

    def _decoded(self, last: bool) -> str:
        """The text of new tokens. They are decoded with those before, on which spaces and characters depend."""
        known, all_of_it = self._decode(self.ids[self._start : self._read]), self._decode(self.ids[self._start :])
        if len(all_of_it) <= len(known) or (all_of_it.endswith(REPLACEMENT) and not last):
            return ""
        self._start, self._read = self._read, len(self.ids)
        return all_of_it[len(known) :]

    def _decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
