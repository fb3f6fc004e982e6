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
        end_token_id (`int`): Written after the refusal.
        forbidden_token_ids (`list[int]`): Placeholders. In an answer they would stand for images that are not there
            (prompt-lookup decoding copies them from the prompt).
    """

    def __init__(
        self,
        refusals: list[list[int] | None],
        prompt_length: int,
        end_token_id: int | None,
        forbidden_token_ids: list[int | None],
    ):
        self.prompt_length, self.end_token_id = prompt_length, end_token_id
        self.forbidden_token_ids = [i for i in forbidden_token_ids if i is not None]
        self.script = None
        if any(refusal is not None for refusal in refusals):
            if end_token_id is None:
                raise ValueError("A forced refusal needs an end: set `eos_token_id` in the generation config.")
            length = max(len(refusal) for refusal in refusals if refusal is not None) + 1
            self.script = torch.tensor(
                [
                    [-1] * length if refusal is None else refusal + [end_token_id] * (length - len(refusal))
                    for refusal in refusals
                ]
            )

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        scores = scores.clone()
        for token_id in self.forbidden_token_ids:
            if token_id < scores.shape[1]:  # an assistant model may have fewer tokens, and count the prompt in its own
                scores[:, token_id] = float("-inf")
        if self.script is None:
            return scores
        self.script = self.script.to(scores.device)
        step = min(max(input_ids.shape[1] - self.prompt_length, 0), self.script.shape[1] - 1)
        forced = self.script[:, step].repeat_interleave(len(scores) // len(self.script)).unsqueeze(1)
        only = torch.full_like(scores, float("-inf")).scatter(1, forced.clamp(min=0), 0.0)
        return torch.where(forced >= 0, only, scores)

    def verify(self, sequences: torch.LongTensor):
        """
        Args:
            sequences (`torch.LongTensor` of shape `(batch_size * copies, sequence_length)`): Prompts and answers.

        Raises:
            `RuntimeError`: A row that was to be refused has another text: the decoding method (a `custom_generate`)
                did not apply its logits processors.
        """
        if self.script is None:
            return
        written = sequences[:, self.prompt_length :][:, : self.script.shape[1]]
        script = self.script.to(written.device)[:, : written.shape[1]]
        script = script.repeat_interleave(len(written) // len(script), dim=0)
        # After its end a shorter refusal is followed by padding.
        ended = (script == self.end_token_id).cumsum(dim=1) > 1
        if bool(((written != script) & (script >= 0) & ~ended).any()):
            raise RuntimeError(
                "The decoding method wrote something else than the forced refusal: it ignores logits processors. "
                "Use one that applies them, or the policy's hints only (`forced_refusal=False`)."
            )


class PromptStreamer:
    """Hands a streamer the caller's prompt in place of the one with the hint; everything else goes through."""

    def __init__(self, streamer, input_ids):
        self.streamer, self.input_ids, self.started = streamer, input_ids, False

    def put(self, value):
        self.streamer.put(value if self.started else self.input_ids.cpu())
        self.started = True

    def end(self):
        self.streamer.end()
