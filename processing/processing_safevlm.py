"""SafeVlmProcessor: the base model's own processor, plus `<safety>` placeholders beside each image.

Pictures are read in one place (pictures.py), and user text can never become a control token (chat_texts.py).
"""

import functools
import inspect
import os

import transformers
from PIL import Image
from transformers import AddedToken, BatchFeature, ProcessorMixin
from transformers.image_utils import ImageInput
from transformers.utils.versions import require_version

from .chat_prompt import ChatPrompt, answer_mask, render_chat
from .chat_texts import ControlTokens, checked_text, plain, plain_messages
from .pictures import find_picture, load_picture

# As in configuration_safevlm.py, which lies in another package: whoever loads the processor alone needs it, too.
REQUIRED = "transformers>=5.23.dev0,<5.24.dev0"
_FIX = REQUIRED.replace(".dev0", "")
require_version(REQUIRED, f"This SafeVLM needs it: pip install --upgrade '{_FIX}' (and restart Python).")

SAFETY_TOKEN = "<safety>"
# Options of the tokenizer and the base's processor, and the outputs they give: where characters are in tokens.
OFFSETS = {
    "return_offsets_mapping": "offset_mapping",
    "return_text_replacement_offsets": "text_replacement_offsets",
}


class SafeVlmProcessor(ProcessorMixin):
    """
    Args:
        image_processor, tokenizer: The base processor's parts; the tokenizer knows the placeholder.
        tokens_per_image (`int`): `<safety>` placeholders after each image's tokens. Must be the model's
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
        safety_token: str = SAFETY_TOKEN,
        chat_template=None,
        **kwargs,
    ):
        if tokens_per_image < 0:
            raise ValueError(f"`tokens_per_image` must be 0 or more, got {tokens_per_image}.")
        self.tokens_per_image = tokens_per_image
        self.base_processor_class = base_processor_class
        self.base_processor_kwargs = dict(base_processor_kwargs or {})
        self.safety_token = safety_token
        super().__init__(image_processor, tokenizer, chat_template=chat_template)
        self._add_safety_token()
        self.base = self._make_base()

    def _add_safety_token(self):
        if self.safety_token not in self.tokenizer.get_vocab():
            self.tokenizer.add_tokens(
                [AddedToken(self.safety_token, special=True, normalized=False)], special_tokens=True
            )
        self.safety_token_id = self.tokenizer.convert_tokens_to_ids(self.safety_token)

    def _make_base(self):
        """The base's processor with one change: each image's tokens are followed by the placeholders."""
        processor_class = base_processor_class(self.base_processor_class, self.safety_token * self.tokens_per_image)
        return processor_class(
            image_processor=self.image_processor,
            tokenizer=self.tokenizer,
            chat_template=self.chat_template,
            **self.base_processor_kwargs,
        )

    @property
    def image_token(self) -> str:
        return self.base.image_token

    @property
    def image_token_id(self) -> int:
        return self.base.image_token_id

    @property
    def model_input_names(self) -> list[str]:
        return self.base.model_input_names

    def _get_num_multimodal_tokens(self, **kwargs):
        # Image tokens alone, without placeholders, as `mm_token_type_ids` marks them.
        return self.base._get_num_multimodal_tokens(**kwargs)

    def __getstate__(self):
        return {name: value for name, value in self.__dict__.items() if name != "base"}

    def __setstate__(self, state):
        self.__dict__.update(state)
        self.base = self._make_base()

    def to_dict(self):
        base = self.__dict__.pop("base", None)  # made from the other fields, and holds the tokenizer again
        try:
            return super().to_dict()
        finally:
            if base is not None:
                self.base = base

    def __call__(self, images: ImageInput | None = None, text: str | list[str] | None = None, answers=None, **kwargs):
        """
        As the base's processor, with placeholders beside each image.

        `text` is a rendered prompt, where the image token stands for an image. Prompts that hold user text belong in
        [`apply_chat_template`], which neutralises special tokens in it. For its prompts there is one more output,
        `safety_question_mask`: 1 where no assistant wrote the text, which is what the safety head reads. A prompt that
        begins with the BOS token gets no other one.

        `images` are paths, web addresses, base64 or PIL images, which become upright 8-bit RGB over white, as
        everywhere in safevlm ([`load_picture`]). Arrays and tensors are passed on as they are.

        Args:
            answers (`list[list[tuple[int, int]]]`, *optional*): For each prompt, start and end of the assistant's
                texts in characters. Prompts of [`apply_chat_template`] bring them along.
        """
        images = self.load_pictures(images)
        if text is not None:
            prompts = [text] if isinstance(text, str) else text
            self._check_prompts(prompts)
            if self._begin_with_bos(prompts):
                kwargs["add_special_tokens"] = False
            images = self._per_prompt(images, prompts)
            rendered = any(isinstance(prompt, ChatPrompt) for prompt in prompts)
            if answers is None and rendered and self.tokenizer.is_fast:  # others do not know where tokens come from
                answers = [getattr(prompt, "answers", None) for prompt in prompts]
        offsets = {} if answers is None else dict.fromkeys(OFFSETS, True)
        inputs = self.base(images=images, text=text, **{**kwargs, **offsets})
        if "suffix" not in kwargs:
            inputs.pop("labels", None)  # PaliGemma's; all of them ignored where there is no suffix
        if answers is not None:
            self._add_question_mask(inputs, answers)
        for option in offsets:
            if not kwargs.get(option):
                inputs.pop(OFFSETS[option], None)
        return inputs

    def _add_question_mask(self, inputs, answers):
        ids, offsets = inputs["input_ids"], inputs["offset_mapping"]
        offsets = offsets if isinstance(offsets, list) else offsets.tolist()
        replacements = inputs.get("text_replacement_offsets")  # PaliGemma's may be an empty tensor
        replacements = [[]] * len(ids) if replacements is None or len(replacements) == 0 else replacements
        is_answer = map(answer_mask, offsets, replacements, [row or [] for row in answers])
        attended = inputs.get("attention_mask", [[1] * len(row) for row in ids])
        mask = [[int(a) * (1 - b) for a, b in zip(*row, strict=True)] for row in zip(attended, is_answer, strict=True)]
        tensor_type = None if isinstance(ids, list) else "pt" if hasattr(ids, "new_tensor") else "np"
        inputs.update(BatchFeature({"safety_question_mask": mask}, tensor_type=tensor_type))

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
        """Whether the prompts have the BOS token (behind images): many templates write it, many tokenizers add it."""
        bos, image = self.tokenizer.bos_token, self.image_token
        texts = [prompt for prompt in prompts if isinstance(prompt, str)] if bos else []
        begin = {text.replace(image, "").startswith(bos) for text in texts}
        if len(begin) > 1:
            raise ValueError(f"Either all prompts in `text` begin with {bos!r}, or none.")
        return begin == {True}

    def _per_prompt(self, images, prompts):
        """A list of images as one list per prompt, by the prompts' image tokens: some families insist on it."""
        if not isinstance(images, (list, tuple)) or any(isinstance(image, (list, tuple)) for image in images):
            return images
        counts = [prompt.count(self.image_token) for prompt in prompts]
        if sum(counts) != len(images):
            return images  # the base's own error says what is wrong
        images = iter(images)
        return [[next(images) for _ in range(count)] for count in counts]

    def apply_chat_template(self, conversation, chat_template=None, tokenize=False, processor_kwargs=None, **kwargs):
        """
        As in the base's processor; special tokens in the messages' text, and in whatever else the template gets, such
        as `tools`, are neutralised first, and the prompt knows which text an assistant wrote (see [`ChatPrompt`]).
        With `sanitize_control_tokens=True` so are the tokenizer's other added tokens, such as `<think>`.

        Raises:
            `ValueError`: Something in the messages is neither text nor an image, or becomes a control token by what
                the template does to it; or `chat_template` is not the processor's own. Servers hand over what a
                request brings, and another template can write a question where the safety head does not look for one.
        """
        templates = self.chat_template if isinstance(self.chat_template, dict) else {"default": self.chat_template}
        if chat_template is not None and chat_template not in (*templates, *templates.values()):
            raise ValueError(
                f"`chat_template` {chat_template[:40]!r} is not this processor's own, which the model was made safe "
                f"with. To change it for good, set `processor.chat_template`."
            )
        if "safety_policy" in kwargs:  # transformers' own pipeline hands it over, and would go on with the model's
            raise ValueError(
                "`safety_policy` is an argument of `generate` and of SafeVlmPipeline. Make the pipeline with "
                "`pipeline_class=safevlm.SafeVlmPipeline`, or with `trust_remote_code=True` and the model's name."
            )
        tokens = self._control_tokens(everything=kwargs.pop("sanitize_control_tokens", False))
        conversation = getattr(conversation, "messages", conversation)  # the pipeline's Chat
        first = conversation[0] if isinstance(conversation, (list, tuple)) and conversation else None
        batched = isinstance(first, (list, tuple)) or hasattr(first, "messages")
        chats = [getattr(chat, "messages", chat) for chat in (conversation if batched else [conversation])]
        chats = [plain_messages(chat, tokens) for chat in chats]
        kwargs = {name: plain(value, name, tokens) for name, value in kwargs.items()}
        settings = {name: value for name, value in kwargs.items() if not name.startswith("return_")}
        flags = {
            name: settings.pop(name)
            for name in ("add_generation_prompt", "continue_final_message")
            if name in settings
        }
        template = functools.partial(super().apply_chat_template, chat_template=chat_template)
        render = functools.partial(template, tokenize=False, **settings)
        prompts = [render_chat(chat, render, tokens, **flags) for chat in chats]
        if not tokenize:
            return prompts if batched else prompts[0]
        processor_kwargs = {**(processor_kwargs or {}), "answers": [prompt.answers for prompt in prompts]}
        return template(chats if batched else chats[0], tokenize=True, processor_kwargs=processor_kwargs, **kwargs)

    def neutralise(self, *texts: str) -> list[str]:
        """
        `texts` with a space inside whatever spells a special token: `"<image>"` becomes `"< image>"`.

        Templates may join texts without anything between them: `"<ima", "ge>"` becomes `"< ima", "ge>"`.
        """
        return self._control_tokens().neutralise(list(texts))

    def _control_tokens(self, everything: bool = False) -> ControlTokens:
        """The special tokens; all added ones (tags of thoughts and tool calls) if `everything` is asked for."""
        added = self.tokenizer.added_tokens_decoder.values()
        special = {token.content for token in added if token.special or everything}
        special |= {*self.tokenizer.all_special_tokens, self.safety_token, self.image_token}
        # Few tokenizers look for special tokens in what their normaliser made of a text.
        normaliser = getattr(getattr(self.tokenizer, "backend_tokenizer", None), "normalizer", None)
        normalised = normaliser is not None and any(t.normalized for t in added if t.content in special)
        return ControlTokens(special, normaliser.normalize_str if normalised else None)


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
            f"`base_processor_class` {name!r} is no processor of transformers {transformers.__version__}."
        )

    class BaseProcessor(original):
        def __init__(self, image_processor=None, tokenizer=None, **settings):
            if "video_processor" in inspect.signature(original.__init__).parameters:
                settings["video_processor"] = None
            super().__init__(image_processor=image_processor, tokenizer=tokenizer, **settings)

        # What is saved follows from these two.
        __init__.__signature__ = inspect.signature(original.__init__)

        @classmethod
        def get_attributes(cls) -> list[str]:
            return [name for name in super().get_attributes() if name != "video_processor"]

        def replace_image_token(self, *args, **kwargs) -> str:
            return super().replace_image_token(*args, **kwargs) + placeholders

    if name == "PaliGemmaProcessor":
        BaseProcessor.prepare_inputs_layout = ProcessorMixin.prepare_inputs_layout
        BaseProcessor.validate_inputs = ProcessorMixin.validate_inputs
    # Errors and `to_dict` show the base's name.
    BaseProcessor.__name__ = BaseProcessor.__qualname__ = name
    return BaseProcessor
