"""Enforces a policy while the base model writes: forced refusals, no placeholders, no hints on a streamer."""

import torch
from torch.nn import functional as F
from transformers import LogitsProcessor


class EnforcePolicy(LogitsProcessor):
    """
    Writes forced refusals token by token, and keeps the model from writing placeholders.

    It runs after all other logits processors and leaves refused rows one possible token, whatever prompt, sampling,
    beams or other processors prefer. It does not touch the other rows of the batch.

    Args:
        refusals (`list[list[int] | None]`): Token ids per prompt; `None` lets the model answer.
        prompt_length (`int`): Number of prompt tokens.
        end_token_ids (`list[int]`): Tokens that end an answer; the first one is written after the refusal.
        pad_token_id (`int`, *optional*): What follows the end.
        forbidden_token_ids (`list[int | None]`): Placeholders. In an answer they would stand for images that do not
            exist (prompt-lookup decoding copies them from the prompt).
        vocab_size (`int`): Of the model that answers.
    """

    def __init__(
        self,
        refusals: list[list[int] | None],
        prompt_length: int,
        end_token_ids: list[int],
        pad_token_id: int | None,
        forbidden_token_ids: list[int | None],
        vocab_size: int,
    ):
        if wrong := [i for i in end_token_ids if not 0 <= i < vocab_size]:
            raise ValueError(
                f"`eos_token_id` {wrong[0]} is not a token of this model, whose ids are below {vocab_size}. To get "
                f"answers of full length use `min_new_tokens`."
            )
        if not end_token_ids and any(refusals):
            raise ValueError("A forced refusal needs an end: set `eos_token_id` in the generation config.")
        self.prompt_length, self.end_token_ids, self.pad_token_id = prompt_length, end_token_ids, pad_token_id
        self.forbidden_token_ids = [i for i in forbidden_token_ids if i is not None]
        length = max(len(refusal or []) for refusal in refusals) + 1
        # What each row must write, up to its end token; -1 where the model has the choice.
        self.script = torch.tensor(  # (batch_size, length)
            [[-1] * length if ids is None else ids + end_token_ids[:1] * (length - len(ids)) for ids in refusals]
        )

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        scores, vocab_size = scores.clone(), scores.shape[1]
        # An assistant model may have a smaller vocabulary. What it cannot write it need not draft: the main model
        # writes it.
        scores[:, [i for i in self.forbidden_token_ids if i < vocab_size]] = float("-inf")
        step = min(max(input_ids.shape[1] - self.prompt_length, 0), self.script.shape[1] - 1)
        tokens = self.script[:, step].repeat_interleave(len(scores) // len(self.script))  # (batch_size * copies,)
        forced = ((tokens >= 0) & (tokens < vocab_size)).nonzero().squeeze(1)
        scores[forced] = float("-inf")
        scores[forced, tokens[forced]] = 0.0
        return scores

    def verify(self, sequences: torch.LongTensor):
        """
        Args:
            sequences (`torch.LongTensor` of shape `(batch_size * copies, sequence_length)`): Prompts and answers.

        Raises:
            `RuntimeError`: A refused row has other text, or text after its refusal: the decoding method (a
                `custom_generate`) did not apply its logits processors.
        """
        refused = self.script[:, 0] >= 0
        if not refused.any():
            return
        written = sequences[:, self.prompt_length :].cpu().unflatten(0, (len(refused), -1))[refused]
        script = F.pad(self.script[refused], (0, written.shape[2]))[:, None, : written.shape[2]]
        # The first end token ends the answer (a caller's may be in the middle of the text); only padding may follow.
        is_end = torch.isin(written, torch.tensor(self.end_token_ids))  # (num_refused, copies, num_new_tokens)
        is_after = is_end.cumsum(dim=2) > is_end.int()
        is_padding = is_end if self.pad_token_id is None else is_end | (written == self.pad_token_id)
        if not torch.where(is_after, is_padding, written == script).all():
            raise RuntimeError(
                "The decoding method wrote something other than the forced refusal: it ignores logits processors. "
                "Use one that applies them, or the policy's hints only (`forced_refusal=False`)."
            )


class PromptStreamer:
    """
    Streams the caller's prompt in place of the one with the hint, and answers once they are verified.

    Args:
        streamer: The caller's.
        input_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`): The caller's prompts.
    """

    def __init__(self, streamer, input_ids: torch.LongTensor):
        self.streamer, self.input_ids = streamer, input_ids
        self.enforcement = self.sequence = None

    def start(self, enforcement: EnforcePolicy, verdict):
        """From here on answers are verified. A streamer with a method `put_safety` gets the verdict."""
        self.enforcement = enforcement
        if hasattr(self.streamer, "put_safety"):
            self.streamer.put_safety(verdict)

    def put(self, value):
        tokens = value.reshape(len(self.input_ids), -1)
        if self.sequence is None:  # the first call brings the prompt
            self.sequence = tokens
            self.streamer.put(self.input_ids.cpu())
            return
        self.sequence = torch.cat([self.sequence, tokens.to(self.sequence)], dim=1)
        if self.enforcement is not None:
            self.enforcement.verify(self.sequence)
        self.streamer.put(value)

    def end(self):
        self.streamer.end()
