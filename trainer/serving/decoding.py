"""What the server adds to `generate`: OpenAI's penalties and biases, stopping on demand, and text from tokens."""

from collections.abc import Callable

import torch
from transformers import LogitsProcessor, StoppingCriteria

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class OpenAiPenalties(LogitsProcessor):
    """
    OpenAI's formula: a token's logit is lowered by `frequency` times its count in the answer so far and, if it has
    occurred at all, by `presence`; then `bias` is added. The policy's forced refusals come later and are unaffected.

    Args:
        frequency, presence (`float`): Penalties in [-2, 2].
        bias (`dict[int, float]`): Token id -> what is added to its logit.
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
    Stops the generation once `ended()` is true.

    Args:
        ended (`Callable[[], bool]`): Called after each token.
    """

    def __init__(self, ended: Callable[[], bool]):
        self.ended = ended

    def __call__(self, input_ids, scores, **kwargs):
        return torch.full((len(input_ids),), self.ended(), dtype=torch.bool, device=input_ids.device)


class AnswerStreamer:
    """
    Sends the verdict and then the answer's text as soon as it is final: whole characters only, and nothing that could
    be the start of a stop text.

    Args:
        tokenizer: The processor's tokenizer.
        stop (`list[str]`): Texts that end the answer; they are not part of it.
        send (`Callable`): Receives `(verdict,)`, then pieces of text.
    """

    def __init__(self, tokenizer, stop: list[str], send: Callable):
        self.tokenizer, self.stop, self.send = tokenizer, stop, send
        self.ids, self.stopped = [], False
        self._prompt_seen, self._begun = False, False
        # `ids[:_read]` have been decoded; `ids[_start:_read]` are decoded again as context for the next tokens.
        self._start = self._read = 0
        self._held = ""  # text that could be the start of a stop text

    def put_safety(self, verdict):
        self.send((verdict.to_list()[0],))

    def put(self, tokens: torch.Tensor):
        if self._prompt_seen:
            self.ids.extend(tokens.flatten().tolist())
            self.send_text()
        self._prompt_seen = True

    def end(self):
        """Required by `generate`; the answer ends with `flush`."""

    def flush(self):
        """Sends the text that is still held back."""
        self.send_text(last=True)

    def send_text(self, last: bool = False):
        """Sends what has become final since the last call; everything if this is the last one."""
        if self.stopped:
            return
        text = self._held + self._decoded(last)
        if not self._begun:
            text = text.lstrip()
        positions = [position for position in map(text.find, self.stop) if position >= 0]
        self.stopped = bool(positions)
        if positions:
            keep = min(positions)
        elif last:
            keep = len(text)
        else:  # a stop text may have started in the last characters
            keep = max(len(text) - max(map(len, self.stop), default=1) + 1, 0)
        self._held = text[keep:]
        if keep:
            self._begun = True
            self.send(text[:keep])

    def _decoded(self, last: bool) -> str:
        """The text of new tokens. They are decoded along with earlier ones, on which spaces and characters depend."""
        context, text = self._decode(self.ids[self._start : self._read]), self._decode(self.ids[self._start :])
        if len(text) <= len(context) or (text.endswith(REPLACEMENT) and not last):
            return ""
        self._start, self._read = self._read, len(self.ids)
        return text[len(context) :]

    def _decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
