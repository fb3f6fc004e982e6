"""SafeVlmProcessor: the base model's own processor, plus `<safety>` placeholders beside each image.

User text can never become a control token: in chat messages, anything that spells a special token (`<image>`,
`<safety>`, `</s>`, ...), be it across several texts of a message, gets a space after its first character before the
template is applied.
"""

import copy
import re

import transformers
from transformers import AddedToken, AutoProcessor, ProcessorMixin

SAFETY_TOKEN = "<safety>"


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

    @classmethod
    def from_base(cls, base, config=None, tokens_per_image: int | None = None, **kwargs) -> "SafeVlmProcessor":
        """
        Extends a base model's processor.

        Args:
            base (`str`, `Path` or `ProcessorMixin`): Hub id, folder or a loaded processor (which is not changed).
            config (`SafeVlmConfig`, *optional*): The model's configuration; gives `tokens_per_image`.
            tokens_per_image (`int`, *optional*): Used without `config`; the default fits `SafeVlmConfig`'s defaults.
            kwargs: For loading the base's processor.
        """
        if not isinstance(base, ProcessorMixin):
            base = AutoProcessor.from_pretrained(base, **kwargs)
        if not isinstance(base, ProcessorMixin) or not hasattr(base, "image_processor"):
            raise ValueError(
                f"The base's processor is a {type(base).__name__} without images: it is not a vision-language model."
            )
        if config is not None:
            tokens_per_image = config.tokens_per_image
        settings = base.to_dict()
        parts = set(base.get_attributes()) | {"processor_class", "auto_map", "chat_template"}
        return cls(
            image_processor=copy.deepcopy(base.image_processor),  # saving notes the remote code in it
            tokenizer=copy.deepcopy(base.tokenizer),
            tokens_per_image=8 if tokens_per_image is None else tokens_per_image,
            base_processor_class=type(base).__name__,
            base_processor_kwargs={name: value for name, value in settings.items() if name not in parts},
            chat_template=base.chat_template,
        )

    def _add_safety_token(self):
        if self.safety_token not in self.tokenizer.get_vocab():
            self.tokenizer.add_tokens(
                [AddedToken(self.safety_token, special=True, normalized=False)], special_tokens=True
            )
        self.safety_token_id = self.tokenizer.convert_tokens_to_ids(self.safety_token)

    def _make_base(self):
        """The base's processor with one change: each image's tokens are followed by the placeholders."""
        base_class = getattr(transformers, self.base_processor_class, None)
        if base_class is None:
            raise ValueError(
                f"`base_processor_class` {self.base_processor_class!r} is not in transformers "
                f"{transformers.__version__}."
            )
        placeholders = self.safety_token * self.tokens_per_image

        class BaseProcessor(base_class):
            def replace_image_token(self, *args, **kwargs) -> str:
                return super().replace_image_token(*args, **kwargs) + placeholders

        BaseProcessor.__name__ = self.base_processor_class
        return BaseProcessor(
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

    def __call__(self, images=None, text=None, **kwargs):
        """
        As the base's processor, with placeholders beside each image.

        `text` is a rendered prompt, where the image token stands for an image. Prompts that hold user text belong in
        [`apply_chat_template`], which neutralises special tokens in it.
        """
        if text is not None:
            for row, prompt in enumerate([text] if isinstance(text, str) else text):
                if isinstance(prompt, str) and self.safety_token in prompt:
                    raise ValueError(
                        f"`text` of row {row} holds the reserved token {self.safety_token!r}, which only the "
                        f"processor may write. Pass user text through `apply_chat_template`, or remove it."
                    )
        return self.base(images=images, text=text, **kwargs)

    def apply_chat_template(self, conversation, *args, **kwargs):
        """As in the base's processor; special tokens in the messages' text are neutralised first."""
        return super().apply_chat_template(self._neutralised(conversation), *args, **kwargs)

    def neutralise(self, *texts: str) -> list[str]:
        """
        `texts` with a space inside whatever spells a special token: `"<image>"` becomes `"< image>"`.

        Templates may join texts without anything between them: `"<ima", "ge>"` becomes `"< ima", "ge>"`.
        """
        special = {token.content for token in self.tokenizer.added_tokens_decoder.values() if token.special}
        special |= {*self.tokenizer.all_special_tokens, self.safety_token, self.image_token}
        starts = re.compile(
            "(?=" + "|".join(re.escape(token) for token in special if len(token) > 1) + ").", re.DOTALL
        )
        pieces = [starts.sub(r"\g<0> ", text) for text in texts]
        offset = 0
        for i, piece in enumerate(pieces):
            at = {match.start() - offset for match in starts.finditer("".join(pieces))}
            pieces[i] = "".join(c + " " if j in at else c for j, c in enumerate(piece))
            offset += len(pieces[i])
        return pieces

    def _neutralised(self, value):
        """Messages with every text in them neutralised; images and the like are passed on."""
        if hasattr(value, "messages"):  # the pipeline's Chat
            value = value.messages
        if isinstance(value, (list, tuple)):
            return [self._neutralised(item) for item in value]
        content = value.get("content") if isinstance(value, dict) else None
        if isinstance(content, str):
            return {**value, "content": self.neutralise(content)[0]}
        if not isinstance(content, (list, tuple)):
            return value
        items = [dict(item) if isinstance(item, dict) else item for item in content]
        texts = [item for item in items if isinstance(item, dict) and isinstance(item.get("text"), str)]
        for item, text in zip(texts, self.neutralise(*(item["text"] for item in texts)), strict=True):
            item["text"] = text
        return {**value, "content": items}
