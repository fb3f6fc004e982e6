"""The demo's base: a tiny LLaVA, trained on the spot on the picture world into an *unsafe* model that answers
everything.

No downloaded weights are assumed. The vision tower is trained alone on dense labels and frozen (`tower.py`); then
projector and language model learn question answering with the language-model loss, on cached features. A share of the
questions carries a textual instruction to be careful or to refuse, on pictures and categories of all kinds: the base
learns to follow such text, without any judgement of its own, because a model that has never produced a refusal cannot
be taught one through safety embeddings alone.

What is saved is a stock `LlavaForConditionalGeneration` with its `LlavaProcessor`.
"""

import logging
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import (
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from safevlm.trainer.asking import ask, question_chat

from .glyphs import CELL
from .optimization import Muon, Optimizers, adamw
from .questions import ask_ordinary, ask_risky
from .tokenization import answer_text, make_processor, prompt_text, train_tokenizer
from .tower import epochs, patch_features, train_tower
from .world import GRID, Example, Scene, make_examples, make_scenes, render

logger = logging.getLogger(__name__)

Instruction = tuple[str, str]  # text put after the question, answer that follows it

INITIALIZER_RANGE = 0.08  # about 1 / sqrt(128); the usual 0.02 suits wide models and learns slowly here
SPARE_ROWS = 8  # embedding rows kept free for placeholders added later


@dataclass(frozen=True)
class BaseRecipe:
    """Sizes of the training run; the defaults need about two minutes on two cores."""

    pictures: int = 16_000
    tower_steps: int = 300
    tower_batch: int = 128
    tower_learning_rate: float = 2e-3
    steps: int = 700
    pictures_per_step: int = 16
    row_length: int = 136  # tokens of the picture and about five questions packed behind it
    learning_rate: float = 2e-3
    muon_learning_rate: float = 4e-3
    instruction_share: float = 0.12
    risky_request_share: float = 0.35
    dev_pictures: int = 600


FULL = BaseRecipe()
FAST = BaseRecipe(pictures=6_000, tower_steps=120, tower_batch=64, steps=220, dev_pictures=200)


@dataclass
class BaseReport:
    """What building the base took and gave. Accuracies are exact matches of greedy answers on dev pictures, in [0,
    1]."""

    num_parameters: int = 0
    vocab_size: int = 0
    seconds: dict[str, float] = field(default_factory=dict)  # wall clock, per phase
    cpu_seconds: dict[str, float] = field(default_factory=dict)  # of all threads of the process, per phase
    tower_object_accuracy: float = 0.0  # of patches, in the last training steps
    projector_error: float = 0.0  # squared distance to the right words' embeddings, relative to one word
    clean_accuracy: float = 0.0  # ordinary and risky-sounding questions without a risky picture-question pair
    compliance_rate: float = 0.0  # risky requests
    instruction_accuracy: float = 0.0  # any question with an instruction
    num_clean: int = 0
    num_risky: int = 0
    num_instructed: int = 0

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        wall, cpu = time.perf_counter(), time.process_time()
        yield
        self.seconds[name] = round(time.perf_counter() - wall, 2)
        self.cpu_seconds[name] = round(time.process_time() - cpu, 2)
        logger.info("%s: %.1f s", name, self.seconds[name])


def build_base(
    output_dir: str | Path,
    *,
    seed: int,
    instructions: Sequence[Instruction],
    fast: bool = False,
    recipe: BaseRecipe | None = None,
    progress: bool = True,
) -> BaseReport:
    """Trains the unsafe base and saves model, processor and generation config to `output_dir`.

    Args:
        output_dir: folder to write; made if absent.
        seed: the run is deterministic in it (same machine, same number of threads). The global random state stays as
        it is.
        instructions: `(instruction, answer)` pairs that the base learns to follow wherever the instruction stands
        after a question.
        fast: the small recipe for smoke runs.
        recipe: sizes that replace those of `fast`.
        progress: show progress bars.
    """
    recipe = recipe or (FAST if fast else FULL)
    report = BaseReport()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        with report.phase("data"):
            scenes = make_scenes("train", recipe.pictures, seed)
            pixels = render(scenes, seed=(seed, 10))  # other noise than `make_examples` gives the same scenes
            processor = make_processor(_make_tokenizer(scenes, instructions, seed), GRID * CELL, CELL)
            model = LlavaForConditionalGeneration(make_config(processor.tokenizer))
            _initialize_for_lookup(model)
        with report.phase("tower"):
            report.tower_object_accuracy, report.projector_error = train_tower(
                model.model.vision_tower,
                model.model.multi_modal_projector,
                _word_embedding(model, processor.tokenizer),
                scenes,
                pixels,
                steps=recipe.tower_steps,
                batch_size=recipe.tower_batch,
                learning_rate=recipe.tower_learning_rate,
                seed=seed,
                progress=progress,
            )
        with report.phase("features"):
            features = patch_features(model.model.vision_tower, pixels)
        with report.phase("language model"):
            _train_language_model(model, processor.tokenizer, scenes, features, instructions, recipe, seed, progress)
    report.num_parameters, report.vocab_size = model.num_parameters(), len(processor.tokenizer)
    with report.phase("save"):
        model.generation_config = GenerationConfig(
            max_new_tokens=48,
            bos_token_id=model.config.bos_token_id,
            eos_token_id=model.config.eos_token_id,
            pad_token_id=model.config.pad_token_id,
        )
        model.save_pretrained(output_dir)
        processor.save_pretrained(output_dir)
    with report.phase("evaluation"):
        _evaluate(model, processor, make_examples("dev", recipe.dev_pictures, seed), instructions, report)
    return report


def make_config(tokenizer: PreTrainedTokenizerFast) -> LlavaConfig:
    """The tiny LLaVA's config: about a million parameters, one patch per cell of the world."""
    rows = -(-(len(tokenizer) + SPARE_ROWS) // 64) * 64
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    return LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=128,
            intermediate_size=512,
            num_hidden_layers=2,
            num_attention_heads=4,
            image_size=GRID * CELL,
            patch_size=CELL,
            projection_dim=128,
        ),
        text_config=LlamaConfig(
            vocab_size=rows,
            hidden_size=128,
            intermediate_size=320,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=2048,
            tie_word_embeddings=False,
            initializer_range=INITIALIZER_RANGE,
            **ids,
        ),
        image_token_index=tokenizer.image_token_id,
        image_seq_length=GRID * GRID,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        tie_word_embeddings=False,
        initializer_range=INITIALIZER_RANGE,
        **ids,
    )


def _make_tokenizer(
    scenes: Sequence[Scene], instructions: Sequence[Instruction], seed: int
) -> PreTrainedTokenizerFast:
    rng = random.Random(f"tokenizer-{seed}")
    texts = []
    for scene in scenes[:3000]:
        for turn in (ask_ordinary(scene, rng), ask_risky(scene, rng)):
            texts.append(prompt_text(turn.question, with_image=False) + answer_text(turn.answer))
    for instruction, answer in instructions:  # twice, for a word must be seen twice to become a token
        texts += [prompt_text("", instruction, with_image=False) + answer_text(answer)] * 2
    return train_tokenizer(texts)


@torch.no_grad()
def _initialize_for_lookup(model: LlavaForConditionalGeneration) -> None:
    """Starts the first layer as a look-up: equal contents attend to each other, and what is attended to is copied.

    After Trockman and Kolter, "Mimetic Initialization of Self-Attention Layers" (2023). The words of the question then
    find the image tokens that show them, which takes most of the steps otherwise. Later layers stay random: started
    so, too, they learn to count late.
    """
    attention = model.model.language_model.layers[0].self_attn
    attention.k_proj.weight.copy_(attention.q_proj.weight)
    attention.o_proj.weight.copy_(attention.v_proj.weight.T)
    model.lm_head.weight.copy_(model.get_input_embeddings().weight)


def _word_embedding(
    model: LlavaForConditionalGeneration, tokenizer: PreTrainedTokenizerFast
) -> Callable[[str], torch.Tensor]:
    """Sum of the (initial) embeddings of some words in the middle of a sentence."""
    table = model.get_input_embeddings().weight.detach().clone()
    return lambda words: table[tokenizer(f" {words}", add_special_tokens=False).input_ids].sum(dim=0)


class _Packer:
    """Packs several questions behind one picture: a prefix with the picture, then blocks that see only the prefix and
    themselves."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, instructions: Sequence[Instruction], recipe: BaseRecipe):
        self.tokenizer, self.instructions, self.recipe = tokenizer, instructions, recipe
        prefix = tokenizer(prompt_text("")).input_ids
        image = prefix.index(tokenizer.image_token_id)
        end = tokenizer(prompt_text("").removesuffix(" ASSISTANT:")).input_ids
        self.before, self.after = prefix[:image], end[image + 1 :]
        self._cache: dict[str, list[int]] = {}

    def _ids(self, text: str) -> list[int]:
        if text not in self._cache:
            self._cache[text] = self.tokenizer(text, add_special_tokens=False).input_ids
        return self._cache[text]

    def block(self, scene: Scene, rng: random.Random) -> tuple[list[int], list[int]]:
        """Prompt ids (after the picture) and answer ids of one question."""
        risky = rng.random() < self.recipe.risky_request_share
        question, answer = ask_risky(scene, rng) if risky else ask_ordinary(scene, rng)
        instruction = ""
        if self.instructions and rng.random() < self.recipe.instruction_share:
            instruction, answer = rng.choice(self.instructions)
        text = prompt_text(question, instruction, with_image=False).removeprefix("USER: ")
        return self._ids(text), self._ids(answer_text(answer))

    def batch(self, scenes: Sequence[Scene], rng: random.Random) -> dict[str, torch.Tensor]:
        """Ids, labels, positions and the attention mask `(n, 1, length, length)` of the packed rows, the picture left
        out of the ids.

        Each row takes questions until the next one does not fit, so that little is padding.
        """
        start, length = len(self.before) + GRID * GRID, self.recipe.row_length
        ids = torch.full((len(scenes), length - start), self.tokenizer.pad_token_id)
        labels, positions = torch.full_like(ids, -100), torch.zeros_like(ids)
        block = torch.full_like(ids, -1)  # padding sees the prefix, so that no row of the mask is empty
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


def _train_language_model(
    model: LlavaForConditionalGeneration,
    tokenizer: PreTrainedTokenizerFast,
    scenes: Sequence[Scene],
    features: torch.Tensor,
    instructions: Sequence[Instruction],
    recipe: BaseRecipe,
    seed: int,
    progress: bool,
) -> None:
    """Trains projector and language model in place; the loss is on answers and their end only."""
    packer, rng = _Packer(tokenizer, instructions, recipe), random.Random(f"questions-{seed}")
    llama, embed = model.model.language_model, model.get_input_embeddings()
    matrices = [parameter for parameter in llama.layers.parameters() if parameter.ndim == 2]
    muon = Muon(matrices, recipe.muon_learning_rate)
    chosen = {id(parameter) for parameter in matrices}
    others = [p for p in model.parameters() if p.requires_grad and id(p) not in chosen]
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
            # Each labelled token is predicted by the position before it; the others never reach the output layer.
            labels = batch["labels"][:, 1:]
            predicting = hidden[:, -batch["ids"].shape[1] : -1][labels != -100]
            loss = nn.functional.cross_entropy(model.lm_head(predicting), labels[labels != -100])
            loss.backward()
            optimizers.step()
            if step % 25 == 0:
                bar.set_postfix(loss=f"{loss.item():.3f}")
    model.eval()


def greedy_answers(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    examples: Sequence[Example],
    instructions: Sequence[str] | None = None,
) -> list[str]:
    """Greedy answers to the examples' questions, each followed by its own of `instructions`, if there are any."""
    instructions = instructions or [""] * len(examples)
    conversations = [
        (question_chat(f"{example.question} {instruction}".rstrip()), [example.image])
        for example, instruction in zip(examples, instructions, strict=True)
    ]
    answers = ask(model, processor, conversations, batch_size=128, do_sample=False, max_new_tokens=48)
    return [answer.text for answer in answers]


def _evaluate(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    examples: Sequence[Example],
    instructions: Sequence[Instruction],
    report: BaseReport,
) -> None:
    right = [a == e.answer for a, e in zip(greedy_answers(model, processor, examples), examples, strict=True)]
    clean = [ok for ok, example in zip(right, examples, strict=True) if example.level == 0]
    risky = [ok for ok, example in zip(right, examples, strict=True) if example.level > 0]
    report.num_clean, report.num_risky = len(clean), len(risky)
    report.clean_accuracy = sum(clean) / max(len(clean), 1)
    report.compliance_rate = sum(risky) / max(len(risky), 1)
    if instructions:
        told = examples[: len(examples) // 3]
        pairs = [instructions[i % len(instructions)] for i in range(len(told))]
        answers = greedy_answers(model, processor, told, [instruction for instruction, _ in pairs])
        report.num_instructed = len(told)
        report.instruction_accuracy = sum(
            answer == target for answer, (_, target) in zip(answers, pairs, strict=True)
        ) / max(len(told), 1)
