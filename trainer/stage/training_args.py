"""Arguments of [`SafeVlmTrainer`]: those of `TrainingArguments`, and those that the safety stages add."""

import importlib.util
import json
from dataclasses import dataclass, field
from pathlib import Path

from transformers import TrainingArguments

from .argument_checks import LABEL_NAMES, check_arguments, check_reporting

TRAINABLE = {"safety_alignment": ("safety",), "joint_finetuning": ("safety", "language_model")}
"""The stages, and what each trains by default."""
STAGES = tuple(TRAINABLE)
DEEPSPEED_CONFIGS = Path(__file__).parents[1] / "recipes"


@dataclass
class SafeVlmTrainingArguments(TrainingArguments):
    """
    Args:
        > Parameters that control the stage

        stage (`str`): `"safety_alignment"` (stage 1: the safety modules learn, the base is frozen) or
            `"joint_finetuning"` (stage 2: the language model learns, too).
        trainable (`list[str]`, *optional*): The parts that learn: `"safety"`, `"language_model"` or prefixes of
            parameter names. Defaults to the stage's.
        lora_r (`int`): Rank of LoRA on the language model's linear layers; 0 trains it in full. It has no effect in
            a stage that does not train the language model.
        lora_alpha (`int`), lora_dropout (`float`): Scale and dropout of LoRA.

        > Parameters that control the safety losses and the conditioning

        safety_level_loss_coef, safety_category_loss_coef (`float`, *optional*): Override the model's configuration.
        label_conditioning_start, label_conditioning_end (`float` in [0, 1]): Share of rows whose safety embeddings are
            conditioned on their label instead of the head's prediction. It changes linearly during the stage.
        hint_probability (`float` in [0, 1]): Share of risky rows that get the policy's hint for their label.

        > Parameters that control the distribution over devices

        fsdp (`bool`, *optional*), fsdp_config (`dict`, *optional*): FSDP version 2, as in `TrainingArguments`, but
            with sharded checkpoints.
        deepspeed (`str` or `dict`, *optional*): `"zero2"` for the shipped configuration (the paper's engine), or a
            DeepSpeed configuration or its file.

        > Parameters that control the data

        max_length (`int`, *optional*): A row with more tokens than this is an error, found before training. No row is
            truncated.
        cache_encoded (`bool`): Keep encoded rows in memory after the first epoch, for data that fits.
    """

    stage: str = field(default="safety_alignment", metadata={"help": f"One of {', '.join(STAGES)}."})
    trainable: list[str] | None = field(default=None, metadata={"help": "Parts that learn; defaults to the stage's."})
    lora_r: int = field(default=0, metadata={"help": "Rank of LoRA on the language model; 0 trains it in full."})
    lora_alpha: int = field(default=16, metadata={"help": "LoRA scale."})
    lora_dropout: float = field(default=0.05, metadata={"help": "LoRA dropout."})
    safety_level_loss_coef: float | None = field(default=None, metadata={"help": "Overrides the model's."})
    safety_category_loss_coef: float | None = field(default=None, metadata={"help": "Overrides the model's."})
    label_conditioning_start: float = field(
        default=1.0, metadata={"help": "Share of label-conditioned rows at the start."}
    )
    label_conditioning_end: float = field(
        default=0.0, metadata={"help": "Share of label-conditioned rows at the end."}
    )
    hint_probability: float = field(default=0.5, metadata={"help": "Share of risky rows with the policy's hint."})
    max_length: int | None = field(default=None, metadata={"help": "Longest row allowed, in tokens."})
    cache_encoded: bool = field(default=False, metadata={"help": "Keep encoded rows in memory."})
    # `Trainer` would drop inputs that `forward` takes through **kwargs.
    remove_unused_columns: bool = False
    # Some vision towers have parameters that the features never reach (CLIP's `post_layernorm`).
    ddp_find_unused_parameters: bool | None = True

    def __post_init__(self):
        if self.stage not in STAGES:
            raise ValueError(f"`stage` must be one of {', '.join(map(repr, STAGES))}, got {self.stage!r}.")
        for name, kind in self.__dataclass_fields__.items():
            if kind.type in (float, float | None) and isinstance(value := getattr(self, name), str):
                setattr(self, name, float(value))  # YAML 1.1 reads 1e-3 as a string
        for name in ("label_conditioning_start", "label_conditioning_end", "hint_probability"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"`{name}` must be in [0, 1], got {getattr(self, name)!r}.")
        if self.trainable is None:
            self.trainable = list(TRAINABLE[self.stage])
        if self.uses_lora and not set(self.trainable) <= {"safety", "language_model"}:
            raise ValueError(
                f"With `lora_r={self.lora_r}`, `trainable` can hold 'safety' and 'language_model' only, "
                f"got {self.trainable}; set `lora_r=0` to train other parts."
            )
        for name in ("save_strategy", "eval_strategy", "logging_strategy"):
            if getattr(self, name) is False:  # YAML 1.1 reads a plain `no` as false
                setattr(self, name, "no")
        # By default `Trainer` collects every argument of `forward` with "label" in its name and, if one is absent
        # from the batch, silently reports no evaluation loss.
        if self.label_names is None:
            self.label_names = list(LABEL_NAMES)
        if self.fsdp and not isinstance(self.fsdp_config, str):
            # Each process saves its shard: a full state dict would go through the model's `save_pretrained`, which
            # cannot save a sharded model.
            self.fsdp_config = {"state_dict_type": "SHARDED_STATE_DICT", **(self.fsdp_config or {})}
        if isinstance(self.deepspeed, str):
            self.deepspeed = _deepspeed_file(self.deepspeed)
        super().__post_init__()
        if self.accelerator_config.dispatch_batches is None:  # accelerate's default for data sets without a length
            self.accelerator_config.dispatch_batches = False
        check_arguments(self)
        check_reporting(self.report_to)

    @property
    def trains_head(self) -> bool:
        """Whether the safety head learns. It needs labelled rows."""
        return any(part.split(".")[0] == "safety" for part in self.trainable)

    @property
    def uses_lora(self) -> bool:
        """Whether the language model is trained through LoRA."""
        return self.lora_r > 0 and "language_model" in self.trainable


def _deepspeed_file(name: str) -> str:
    """The file of a shipped DeepSpeed configuration, or of the user's own."""
    shipped = {path.stem.removeprefix("deepspeed_"): path for path in DEEPSPEED_CONFIGS.glob("deepspeed_*.json")}
    path = shipped.get(name, Path(name))
    try:
        json.loads(path.read_text(encoding="utf-8"))
    except OSError:
        raise ValueError(
            f"`deepspeed` {name!r} is neither a file nor a shipped configuration ({', '.join(sorted(shipped))})."
        ) from None
    except ValueError as error:
        raise ValueError(f"`deepspeed` {name!r} is not valid JSON: {error}") from None
    if importlib.util.find_spec("deepspeed") is None:
        raise ImportError("`deepspeed` needs DeepSpeed: pip install deepspeed.")
    return str(path)
