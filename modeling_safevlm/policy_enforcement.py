"""Carries a policy out while the base model writes: forced refusals, no placeholders, no hints on a streamer."""

import torch
from transformers import LogitsProcessor


class EnforcePolicy(LogitsProcessor):
    """
    Writes forced refusals, token by token, and keeps the model from writing placeholders.

    It runs after all other logits processors and leaves one token possible for refused rows, whatever prompt,
    sampling, beams or other processors want. Other rows of the batch are not touched.

    Args:
        refusals (`list[list[int] | None]`): One entry per prompt; `None` lets the model answer.
        prompt_length (`int`): Number of prompt tokens.
        end_token_ids (`list[int]`): What ends an answer; the first is written after the refusal.
        pad_token_id (`int`, *optional*): What follows the end.
        forbidden_token_ids (`list[int]`): Placeholders. In an answer they would stand for images that are not there
            (prompt-lookup decoding copies them from the prompt).
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
        self.prompt_length, self.end_token_ids, self.pad_token_id = prompt_length, end_token_ids, pad_token_id
        self.forbidden_token_ids = [i for i in forbidden_token_ids if i is not None]
        if wrong := [i for i in end_token_ids if not 0 <= i < vocab_size]:
            raise ValueError(
                f"`eos_token_id` {wrong[0]} is no token of this model, whose ids are below {vocab_size}. For answers "
                f"of full length use `min_new_tokens`."
            )
        self.refused = torch.tensor([refusal is not None for refusal in refusals])
        self.script = torch.zeros(len(refusals), 0, dtype=torch.long)
        if self.refused.any():
            if not end_token_ids:
                raise ValueError("A forced refusal needs an end: set `eos_token_id` in the generation config.")
            length = max(len(refusal) for refusal in refusals if refusal is not None) + 1
            rows = [refusal or [] for refusal in refusals]
            self.script = torch.tensor([row + end_token_ids[:1] * (length - len(row)) for row in rows])

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        scores = scores.clone()
        vocab_size = scores.shape[1]
        for token_id in self.forbidden_token_ids:
            if token_id < vocab_size:  # an assistant model may have fewer tokens, and count the prompt in its own
                scores[:, token_id] = float("-inf")
        if not self.refused.any():
            return scores
        step = min(max(input_ids.shape[1] - self.prompt_length, 0), self.script.shape[1] - 1)
        copies = len(scores) // len(self.script)
        token = self.script[:, step].to(scores.device).repeat_interleave(copies).unsqueeze(1)
        refused = self.refused.to(scores.device).repeat_interleave(copies).unsqueeze(1)
        # What an assistant cannot write it need not draft: the model itself has every token of the script.
        forced = refused & (token < vocab_size)
        only = torch.full_like(scores, float("-inf")).scatter(1, token.clamp(max=vocab_size - 1), 0.0)
        return torch.where(forced, only, scores)

    def verify(self, sequences: torch.LongTensor):
        """
        Args:
            sequences (`torch.LongTensor` of shape `(batch_size * copies, sequence_length)`): Prompts and answers.

        Raises:
            `RuntimeError`: A row that was to be refused has another text, or one after its refusal: the decoding
                method (a `custom_generate`) did not apply its logits processors.
        """
        if not self.refused.any():
            return
        copies = len(sequences) // len(self.script)
        written = sequences[:, self.prompt_length :].cpu()[self.refused.repeat_interleave(copies)]
        script = self.script[self.refused].repeat_interleave(copies, dim=0)
        ends = torch.tensor([*self.end_token_ids, *[self.pad_token_id] * (self.pad_token_id is not None)])
        length = min(written.shape[1], script.shape[1])
        as_told = torch.zeros_like(written, dtype=torch.bool)
        as_told[:, :length] = written[:, :length] == script[:, :length]
        # The first end token ends the answer (a caller's may be in the midst of the text); only padding may follow.
        ended = torch.isin(written, torch.tensor(self.end_token_ids)).cumsum(dim=1) > 0
        after = torch.zeros_like(ended)
        after[:, 1:] = ended[:, :-1]
        if not torch.where(after, torch.isin(written, ends), as_told).all():
            raise RuntimeError(
                "The decoding method wrote something else than the forced refusal: it ignores logits processors. "
                "Use one that applies them, or the policy's hints only (`forced_refusal=False`)."
            )


class PromptStreamer:
    """
    Hands a streamer the caller's prompt in place of the one with the hint, and the answer once it is verified.

    Args:
        streamer: The caller's.
        input_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`): The caller's prompts.
    """

    def __init__(self, streamer, input_ids):
        self.streamer, self.input_ids = streamer, input_ids
        self.enforcement = self.sequence = None

    def start(self, enforcement: EnforcePolicy, verdict):
        """Hands the verdict on to a streamer that has a method for it; from here on answers are verified."""
        self.enforcement = enforcement
        if hasattr(self.streamer, "put_safety"):
            self.streamer.put_safety(verdict)

    def put(self, value):
        if self.sequence is None:
            self.sequence = value.reshape(len(self.input_ids), -1)
            self.streamer.put(self.input_ids.cpu())
            return
        self.sequence = torch.cat([self.sequence, value.reshape(len(self.sequence), -1).to(self.sequence)], dim=1)
        if self.enforcement is not None:
            self.enforcement.verify(self.sequence)
        self.streamer.put(value)

    def end(self):
        self.streamer.end()
