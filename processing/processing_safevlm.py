"""SafeVlmProcessor: the base model's own processor, plus `<safety>` placeholders beside each image.

Pictures are read in one place (pictures.py), and user text can never become a control token (chat_prompt.py).
"""

import functools
import inspect
import os

import transformers
from PIL import Image
from transformers import AddedToken, BatchFeature, ProcessorMixin
from transformers.image_utils import ImageInput
from transformers.utils.versions import require_version

from .chat_prompt import ChatPrompt, ControlTokens, answer_mask, checked_text, plain, plain_messages, render_chat
from .pictures import find_picture, load_picture

# As in configuration_safevlm.py, which is in another package, for programs that load only the processor.
REQUIRED = "transformers>=5.23.dev0,<5.24.dev0"
_FIX = REQUIRED.replace(".dev0", "")
require_version(REQUIRED, f"This SafeVLM needs it: pip install --upgrade '{_FIX}' (and restart Python).")

# Options of the base's processor, and what they return: which characters each token and each image token stand for.
OFFSETS = {
    "return_offsets_mapping": "offset_mapping",
    "return_text_replacement_offsets": "text_replacement_offsets",
}


class SafeVlmProcessor(ProcessorMixin):
    """
    Args:
        image_processor, tokenizer: The parts of the base's processor. The placeholder is added to the tokenizer.
        tokens_per_image (`int`): Number of `<safety>` placeholders after each image's tokens. Must be the model's
            `config.tokens_per_image`.
        base_processor_class (`str`): Class name of the base's processor in transformers.
        base_processor_kwargs (`dict`): Its settings, such as `patch_size`.
        safety_token (`str`): The placeholder.
        chat_template (`str`): The base's.
    """

    def __init__(
        self,
        image_processor=None,
        tokenizer=None,
        tokens_per_image: int = 8,
        base_processor_class: str = "LlavaProcessor",
        base_processor_kwargs: dict | None = None,
        safety_token: str = "<safety>",
        chat_template=None,
        **kwargs,
    ):
        if tokens_per_image < 0:
            raise ValueError(f"`tokens_per_image` must be 0 or more, got {tokens_per_image}.")
        super().__init__(image_processor, tokenizer, chat_template=chat_template)
        self.tokens_per_image = tokens_per_image
        self.base_processor_class = base_processor_class
        self.base_processor_kwargs = dict(base_processor_kwargs or {})
        self.safety_token = safety_token
        if safety_token not in tokenizer.get_vocab():
            tokenizer.add_tokens([AddedToken(safety_token, special=True, normalized=False)], special_tokens=True)
        self.safety_token_id = tokenizer.convert_tokens_to_ids(safety_token)
        self.image_token, self.image_token_id = self.base.image_token, self.base.image_token_id

    @functools.cached_property
    def base(self) -> ProcessorMixin:
        """The base's processor, which writes the placeholders behind each image's tokens."""
        processor_class = base_processor_class(self.base_processor_class, self.safety_token * self.tokens_per_image)
        return processor_class(
            image_processor=self.image_processor,
            tokenizer=self.tokenizer,
            chat_template=self.chat_template,
            **self.base_processor_kwargs,
        )

    # The base's processor is made anew where it is needed: its class cannot be pickled, its tokenizer is slow to copy.

    def __getstate__(self):
        return {name: value for name, value in self.__dict__.items() if name != "base"}

    def to_dict(self):
        self.__dict__.pop("base", None)
        return super().to_dict()

    @property
    def model_input_names(self) -> list[str]:
        return self.base.model_input_names

    def _get_num_multimodal_tokens(self, **kwargs):
        # Image tokens alone, without placeholders, as `mm_token_type_ids` marks them.
        return self.base._get_num_multimodal_tokens(**kwargs)

    def __call__(self, images: ImageInput | None = None, text: str | list[str] | None = None, answers=None, **kwargs):
        """
        Like the base's processor, with placeholders beside each image.

        `text` is a rendered prompt, where the image token stands for an image. Prompts that hold user text belong in
        [`apply_chat_template`], which neutralises special tokens in it. For its prompts there is one more output,
        `safety_question_mask`, which is 1 on the tokens that the safety head reads: those not written by the
        assistant. A prompt that begins with the BOS token gets no second one.

        `images` are paths, web addresses, base64 or PIL images, which become upright 8-bit RGB over white, as
        everywhere in safevlm ([`load_picture`]). Arrays and tensors are passed on unchanged.

        Args:
            answers (`list[list[tuple[int, int]]]`, *optional*): Start and end, in characters, of the assistant's
                texts in each prompt. Prompts from [`apply_chat_template`] bring their own.
        """
        images = self.load_pictures(images)
        if text is not None:
            prompts = [text] if isinstance(text, str) else text
            self._check_prompts(prompts)
            if self._begin_with_bos(prompts):
                kwargs["add_special_tokens"] = False
            images = self._per_prompt(images, prompts)
            if answers is None and any(isinstance(prompt, ChatPrompt) for prompt in prompts):
                answers = [getattr(prompt, "answers", None) for prompt in prompts]
        if not self.tokenizer.is_fast:  # slow tokenizers do not say where tokens come from: the head reads everything
            answers = None
        offsets = {} if answers is None else dict.fromkeys(OFFSETS, True)
        inputs = self.base(images=images, text=text, **{**kwargs, **offsets})
        if "suffix" not in kwargs:
            inputs.pop("labels", None)  # PaliGemma's; without a suffix they are all -100
        if answers is not None:
            self._add_question_mask(inputs, answers)
        for option in offsets:
            if not kwargs.get(option):
                inputs.pop(OFFSETS[option], None)
        return inputs

    def load_pictures(self, images, timeout: float | None = None):
        """`images`, nested in lists or not, with each picture read by [`load_picture`]; arrays and tensors stay."""
        if isinstance(images, (list, tuple)):
            return [self.load_pictures(image, timeout) for image in images]
        if isinstance(images, str):
            images = find_picture(images, timeout)
        return load_picture(images) if isinstance(images, (str, bytes, os.PathLike, Image.Image)) else images

    def _check_prompts(self, prompts):
        for row, prompt in enumerate(prompts):
            if isinstance(prompt, str) and self.safety_token in checked_text(prompt, f"text[{row}]"):
                raise ValueError(
                    f"`text` of row {row} holds the reserved token {self.safety_token!r}, which only the "
                    f"processor may write. Pass user text through `apply_chat_template`, or remove it."
                )

    def _begin_with_bos(self, prompts) -> bool:
        """Whether the prompts have the BOS token (after images): many templates write it, many tokenizers add it."""
        bos = self.tokenizer.bos_token
        texts = [prompt for prompt in prompts if isinstance(prompt, str)] if bos else []
        begin = {text.replace(self.image_token, "").startswith(bos) for text in texts}
        if len(begin) > 1:
            raise ValueError(f"Either all prompts in `text` begin with {bos!r}, or none.")
        return begin == {True}

    def _per_prompt(self, images, prompts):
        """A flat list of images as one list per prompt, by the prompts' image tokens: some families require it."""
        if not isinstance(images, (list, tuple)) or any(isinstance(image, (list, tuple)) for image in images):
            return images
        counts = [prompt.count(self.image_token) for prompt in prompts]
        if sum(counts) != len(images):
            return images  # the base's own error says what is wrong
        images = iter(images)
        return [[next(images) for _ in range(count)] for count in counts]

    def _add_question_mask(self, inputs, answers):
        """Adds `safety_question_mask`, of the shape and type of `input_ids`: 0 on answers and padding, else 1."""
        ids, offsets = inputs["input_ids"], inputs["offset_mapping"]
        offsets = offsets if isinstance(offsets, list) else offsets.tolist()
        replacements = inputs.get("text_replacement_offsets")  # PaliGemma's may be an empty tensor
        replacements = [[]] * len(ids) if replacements is None or len(replacements) == 0 else replacements
        is_answer = map(answer_mask, offsets, replacements, [row or [] for row in answers])
        attended = inputs.get("attention_mask", [[1] * len(row) for row in ids])
        mask = [[int(a) * (1 - b) for a, b in zip(*row, strict=True)] for row in zip(attended, is_answer, strict=True)]
        tensor_type = None if isinstance(ids, list) else "pt" if hasattr(ids, "new_tensor") else "np"
        inputs.update(BatchFeature({"safety_question_mask": mask}, tensor_type=tensor_type))

    def apply_chat_template(
        self,
        conversation,
        chat_template=None,
        tokenize: bool = False,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
        sanitize_control_tokens: bool = False,
        processor_kwargs: dict | None = None,
        **kwargs,
    ):
        """
        Like the base's processor, but special tokens in the messages, and in whatever else the template gets (such as
        `tools`), are neutralised first, and the prompt knows which text the assistant wrote ([`ChatPrompt`]).

        Args:
            sanitize_control_tokens (`bool`): Also neutralise the tokenizer's other added tokens, such as `<think>`.

        Raises:
            `ValueError`: Something in the messages is neither text nor an image, or becomes a control token through
                the template; or `chat_template` is not the processor's own. (Servers pass on what a request brings,
                and another template can write a question where the safety head does not look for one.)
        """
        self._check_template(chat_template)
        if "safety_policy" in kwargs:  # passed by transformers' own pipeline, which would use the model's policy
            raise ValueError(
                "`safety_policy` is an argument of `generate` and of SafeVlmPipeline. Make the pipeline with "
                "`pipeline_class=safevlm.SafeVlmPipeline`, or with `trust_remote_code=True` and the model's name."
            )
        tokens = self._control_tokens(everything=sanitize_control_tokens)
        chats, batched = _as_batch(conversation)
        chats = [plain_messages(chat, tokens) for chat in chats]
        kwargs = {name: plain(value, name, tokens) for name, value in kwargs.items()}
        flags = dict(add_generation_prompt=add_generation_prompt, continue_final_message=continue_final_message)

        template = functools.partial(super().apply_chat_template, chat_template=chat_template)
        variables = {name: value for name, value in kwargs.items() if not name.startswith("return_")}
        render = functools.partial(template, tokenize=False, **variables)
        prompts = [render_chat(chat, render, tokens, **flags) for chat in chats]
        if not tokenize:
            return prompts if batched else prompts[0]
        processor_kwargs = {**(processor_kwargs or {}), "answers": [prompt.answers for prompt in prompts]}
        chats = chats if batched else chats[0]
        return template(chats, tokenize=True, processor_kwargs=processor_kwargs, **flags, **kwargs)

    def neutralise(self, *texts: str) -> list[str]:
        """
        `texts` with a space inside whatever spells a special token: `"<image>"` becomes `"< image>"`.

        Templates may join texts without anything between them: `"<ima", "ge>"` becomes `"< ima", "ge>"`.
        """
        return self._control_tokens().neutralise(list(texts))

    def _check_template(self, chat_template):
        own = self.chat_template if isinstance(self.chat_template, dict) else {"default": self.chat_template}
        if chat_template is not None and chat_template not in (*own, *own.values()):
            raise ValueError(
                f"`chat_template` {chat_template[:40]!r} is not this processor's own, which the model was made safe "
                f"with. To change it for good, set `processor.chat_template`."
            )

    def _control_tokens(self, everything: bool = False) -> ControlTokens:
        """The special tokens, or, with `everything`, all added tokens (tags of thoughts and tool calls)."""
        added = self.tokenizer.added_tokens_decoder.values()
        special = {token.content for token in added if token.special or everything}
        special |= {*self.tokenizer.all_special_tokens, self.safety_token, self.image_token}
        # Few tokenizers look for special tokens in the normalised text.
        normaliser = getattr(getattr(self.tokenizer, "backend_tokenizer", None), "normalizer", None)
        normalised = normaliser is not None and any(t.normalized for t in added if t.content in special)
        return ControlTokens(special, normaliser.normalize_str if normalised else str)


def _as_batch(conversation) -> tuple[list, bool]:
    """The chats in `conversation`, and whether it is a batch of them. Either may be the pipeline's `Chat` objects."""
    conversation = getattr(conversation, "messages", conversation)
    first = conversation[0] if isinstance(conversation, (list, tuple)) and conversation else None
    batched = isinstance(first, (list, tuple)) or hasattr(first, "messages")
    return [getattr(chat, "messages", chat) for chat in (conversation if batched else [conversation])], batched


def base_processor_class(name: str, placeholders: str = "") -> type[ProcessorMixin]:
    """
    The base model's own processor class, `name` in transformers, with the three changes that SafeVLM needs.

    - Each image's tokens are followed by `placeholders`.
    - It has no video processor: the safety head does not see videos, so it must not accept any. (A video processor
      would also need torchvision.)
    - PaliGemma's does not rearrange the prompt: prompts arrive fully rendered.
    """
    original = getattr(transformers, name, None)
    if not isinstance(original, type) or not issubclass(original, ProcessorMixin):
        raise ValueError(
            f"`base_processor_class` {name!r} is not a processor of transformers {transformers.__version__}."
        )
    arguments = dict(inspect.signature(original.__init__).parameters)
    no_videos = {"video_processor": None} if arguments.pop("video_processor", None) else {}

    class BaseProcessor(original):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **no_videos, **kwargs)

        # transformers reads from it which parts a processor has and what is saved.
        __init__.__signature__ = inspect.Signature(list(arguments.values()))

        def replace_image_token(self, *args, **kwargs) -> str:
            return super().replace_image_token(*args, **kwargs) + placeholders

    if name == "PaliGemmaProcessor":
        BaseProcessor.prepare_inputs_layout = ProcessorMixin.prepare_inputs_layout
        BaseProcessor.validate_inputs = ProcessorMixin.validate_inputs
    # Errors and `to_dict` show the base's name.
    BaseProcessor.__name__ = BaseProcessor.__qualname__ = name
    return BaseProcessor
