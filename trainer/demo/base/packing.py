"""Packs several questions behind one picture, so that the picture is computed once for all of them."""

import random
from collections.abc import Sequence

import torch
from transformers import PreTrainedTokenizerFast

from safevlm.trainer.demo.picture_world.questions import ask_ordinary, ask_risky
from safevlm.trainer.demo.picture_world.scene import GRID, Scene

from .recipe import BaseRecipe
from .tokenization import answer_text, prompt_text

Instruction = tuple[str, str]  # a text put after the question, and the answer that follows it


class Packer:
    """
    Makes rows of a prefix with the picture and of blocks, each a question with its answer. A block sees the prefix and
    itself, but no other block.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, instructions: Sequence[Instruction], recipe: BaseRecipe):
        self.tokenizer, self.instructions, self.recipe = tokenizer, instructions, recipe
        prefix = tokenizer(prompt_text("")).input_ids
        image = prefix.index(tokenizer.image_token_id)
        end = tokenizer(prompt_text("").removesuffix(" ASSISTANT:")).input_ids
        self.before, self.after = prefix[:image], end[image + 1 :]  # the prefix around the picture
        self._cache: dict[str, list[int]] = {}

    def _ids(self, text: str) -> list[int]:
        if text not in self._cache:
            self._cache[text] = self.tokenizer(text, add_special_tokens=False).input_ids
        return self._cache[text]

    def block(self, scene: Scene, rng: random.Random) -> tuple[list[int], list[int]]:
        """The ids of a random question, without the picture before it, and of its answer."""
        risky = rng.random() < self.recipe.risky_request_share
        question, answer = ask_risky(scene, rng) if risky else ask_ordinary(scene, rng)
        instruction = ""
        if self.instructions and rng.random() < self.recipe.instruction_share:
            instruction, answer = rng.choice(self.instructions)
        text = prompt_text(question, instruction, with_image=False).removeprefix("USER: ")
        return self._ids(text), self._ids(answer_text(answer))

    def batch(self, scenes: Sequence[Scene], rng: random.Random) -> dict[str, torch.Tensor]:
        """
        Ids, labels, positions and attention mask of packed rows.

        Each row takes questions until the next one does not fit, so there is little padding.

        Returns:
            `dict` of `ids` and `labels` of shape `(num_scenes, length - prefix)`, which lack the picture and what
            comes before it, `position_ids` of shape `(num_scenes, length)` and `mask` of shape
            `(num_scenes, 1, length, length)`.
        """
        start, length = len(self.before) + GRID * GRID, self.recipe.row_length
        ids = torch.full((len(scenes), length - start), self.tokenizer.pad_token_id)
        labels, positions = torch.full_like(ids, -100), torch.zeros_like(ids)
        block = torch.full_like(ids, -1)  # padding sees the prefix, so no row of the mask is empty
        first = len(self.after)
        ids[:, :first], block[:, :first] = torch.tensor(self.after), 0
        positions[:, :first] = torch.arange(start, start + first)
        for row, scene in enumerate(scenes):
            at, number = first, 1
            prompt, answer = self.block(scene, rng)
            while (end := at + len(prompt) + len(answer)) <= ids.shape[1]:
                ids[row, at:end] = torch.tensor(prompt + answer)
                labels[row, at + len(prompt) : end] = torch.tensor(answer)
                positions[row, at:end] = torch.arange(start + first, start + first + end - at)
                block[row, at:end] = number
                at, number = end, number + 1
                prompt, answer = self.block(scene, rng)
        block = torch.cat([torch.zeros(len(scenes), start, dtype=block.dtype), block], dim=1)
        positions = torch.cat([torch.arange(start).expand(len(scenes), -1), positions], dim=1)
        mask = (block[:, :, None] == block[:, None, :]) | (block[:, None, :] == 0)
        return {"ids": ids, "labels": labels, "position_ids": positions, "mask": mask.tril()[:, None]}
