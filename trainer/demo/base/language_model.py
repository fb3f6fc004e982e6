"""Trains the demo base's projector and language model on packed questions, with the features of a frozen tower."""

import random
from collections.abc import Sequence

import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import LlavaForConditionalGeneration, PreTrainedTokenizerFast

from safevlm.trainer.demo.picture_world.scene import Scene

from .optimization import Muon, Optimizers, adamw
from .packing import Instruction, Packer
from .recipe import BaseRecipe
from .tower import epochs


def train_language_model(
    model: LlavaForConditionalGeneration,
    tokenizer: PreTrainedTokenizerFast,
    scenes: Sequence[Scene],
    features: torch.Tensor,
    instructions: Sequence[Instruction],
    recipe: BaseRecipe,
    seed: int,
    progress: bool,
) -> None:
    """
    Trains projector and language model in place. The loss covers the answers and their end tokens only.

    Args:
        features (`torch.FloatTensor` of shape `(num_scenes, 16, hidden_size)`): Of the frozen tower.
        instructions: Texts after a question that the model learns to follow, with the answers that follow them.
    """
    packer, rng = Packer(tokenizer, instructions, recipe), random.Random(f"questions-{seed}")
    llama, embed = model.model.language_model, model.get_input_embeddings()
    matrices = [parameter for parameter in llama.layers.parameters() if parameter.ndim == 2]
    muon = Muon(matrices, recipe.muon_learning_rate)
    muons = {id(parameter) for parameter in matrices}
    others = [p for p in model.parameters() if p.requires_grad and id(p) not in muons]
    optimizers = Optimizers([muon, adamw(others, recipe.learning_rate)], recipe.steps)
    order = epochs(len(scenes), recipe.pictures_per_step, random.Random(f"order-{seed}"))
    model.train()
    with tqdm(range(recipe.steps), desc="language model", disable=not progress) as bar:
        for step in bar:
            rows = next(order)
            batch = packer.batch([scenes[row] for row in rows], rng)
            before = embed(torch.tensor(packer.before)).expand(len(rows), -1, -1)
            image = model.model.multi_modal_projector(features[rows])
            hidden = llama(
                inputs_embeds=torch.cat([before, image, embed(batch["ids"])], dim=1),
                attention_mask=batch["mask"],
                position_ids=batch["position_ids"],
                use_cache=False,
            ).last_hidden_state
            # Each labelled token is predicted by the position before it; the others skip the output layer.
            labels = batch["labels"][:, 1:]
            predicting = hidden[:, -batch["ids"].shape[1] : -1][labels != -100]
            loss = nn.functional.cross_entropy(model.lm_head(predicting), labels[labels != -100])
            loss.backward()
            optimizers.step()
            if step % 25 == 0:
                bar.set_postfix(loss=f"{loss.item():.3f}")
    model.eval()
