"""The demo's base: a tiny LLaVA, trained on the spot into an *unsafe* model of the picture world that answers
everything.

No downloaded weights are needed. First the vision tower is trained alone on dense labels and frozen (`tower.py`). Then
projector and language model learn to answer questions from its cached features (`language_model.py`). Some questions
carry a written instruction to be careful or to refuse, whatever the picture and the category. So the base learns to
follow such texts without any judgement of its own: a model that has never produced a refusal cannot be taught one
through safety embeddings alone.

The result is saved as a stock `LlavaForConditionalGeneration` with its `LlavaProcessor`.
"""

import logging
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
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
from safevlm.trainer.demo.picture_world.examples import Example, make_examples, render
from safevlm.trainer.demo.picture_world.glyphs import CELL
from safevlm.trainer.demo.picture_world.questions import ask_ordinary, ask_risky
from safevlm.trainer.demo.picture_world.scene import GRID, Scene, make_scenes

from .language_model import train_language_model
from .packing import Instruction
from .recipe import FAST, FULL, BaseRecipe
from .tokenization import answer_text, make_processor, prompt_text, train_tokenizer
from .tower import patch_features, train_tower

logger = logging.getLogger(__name__)

INITIALIZER_RANGE = 0.08  # about 1 / sqrt(128); the usual 0.02 suits wide models, and this one learns slowly with it
SPARE_ROWS = 8  # of the embedding table, for placeholders that are added later


@dataclass
class BaseReport:
    """
    The cost and the quality of a base. Accuracies are shares of greedy answers on dev pictures that match exactly, in
    [0, 1].
    """

    num_parameters: int = 0
    vocab_size: int = 0
    seconds: dict[str, float] = field(default_factory=dict)  # wall clock, per phase
    cpu_seconds: dict[str, float] = field(default_factory=dict)  # of all threads, per phase
    tower_object_accuracy: float = 0.0  # share of patches, in the last training steps
    projector_error: float = 0.0  # squared distance to the right words' embeddings, relative to one word
    clean_accuracy: float = 0.0  # on questions that are not risky with their picture
    compliance_rate: float = 0.0  # on risky requests
    instruction_accuracy: float = 0.0  # on questions of all kinds followed by an instruction
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
    """
    Trains the unsafe base and saves model, processor and generation config.

    Args:
        output_dir (`str` or `Path`): Folder to write; made if missing.
        seed (`int`): The run is deterministic in it (same machine, same number of threads). The global random state
            is left as it is.
        instructions: `(instruction, answer)` pairs. The base learns to follow an instruction after any question.
        fast (`bool`): Take the small recipe for smoke tests.
        recipe (`BaseRecipe`, *optional*): Replaces the one that `fast` chooses.
        progress (`bool`): Show progress bars.
    """
    recipe = recipe or (FAST if fast else FULL)
    report = BaseReport()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        with report.phase("data"):
            scenes = make_scenes("train", recipe.pictures, seed)
            pixels = render(scenes, seed=(seed, 10))  # not the noise of `make_examples`
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
                recipe,
                seed,
                progress,
            )
        with report.phase("features"):
            features = patch_features(model.model.vision_tower, pixels)
        with report.phase("language model"):
            train_language_model(model, processor.tokenizer, scenes, features, instructions, recipe, seed, progress)
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
    """The tiny LLaVA's config: about a million parameters, one patch per cell of a picture."""
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
    for instruction, answer in instructions:  # twice: a word must be seen twice to become a token
        texts += [prompt_text("", instruction, with_image=False) + answer_text(answer)] * 2
    return train_tokenizer(texts)


@torch.no_grad()
def _initialize_for_lookup(model: LlavaForConditionalGeneration) -> None:
    """
    Initialises the first layer as a look-up: tokens attend to tokens of the same content and copy them.

    After Trockman and Kolter, "Mimetic Initialization of Self-Attention Layers" (2023). So the words of the question
    find the image tokens that show them from the start, which otherwise takes most of the steps. The other layers
    stay random: initialised this way they learn to count late.
    """
    attention = model.model.language_model.layers[0].self_attn
    attention.k_proj.weight.copy_(attention.q_proj.weight)
    attention.o_proj.weight.copy_(attention.v_proj.weight.T)
    model.lm_head.weight.copy_(model.get_input_embeddings().weight)


def _word_embedding(
    model: LlavaForConditionalGeneration, tokenizer: PreTrainedTokenizerFast
) -> Callable[[str], torch.Tensor]:
    """Gives the sum of the initial embeddings of words in the middle of a sentence."""
    table = model.get_input_embeddings().weight.detach().clone()
    return lambda words: table[tokenizer(f" {words}", add_special_tokens=False).input_ids].sum(dim=0)


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
    """Writes the accuracies into `report`."""
    answers = greedy_answers(model, processor, examples)
    right = [answer == example.answer for answer, example in zip(answers, examples, strict=True)]
    clean = [ok for ok, example in zip(right, examples, strict=True) if example.level == 0]
    risky = [ok for ok, example in zip(right, examples, strict=True) if example.level > 0]
    report.num_clean, report.num_risky = len(clean), len(risky)
    report.clean_accuracy = sum(clean) / max(len(clean), 1)
    report.compliance_rate = sum(risky) / max(len(risky), 1)
    if instructions:
        instructed = examples[: len(examples) // 3]
        pairs = [instructions[i % len(instructions)] for i in range(len(instructed))]
        answers = greedy_answers(model, processor, instructed, [instruction for instruction, _ in pairs])
        followed = [answer == target for answer, (_, target) in zip(answers, pairs, strict=True)]
        report.num_instructed = len(instructed)
        report.instruction_accuracy = sum(followed) / max(len(instructed), 1)
