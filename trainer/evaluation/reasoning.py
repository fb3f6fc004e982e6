"""Separates a model's reasoning from its answer: only the answer refuses, complies or judges."""

import re

# Begin and end of a block of reasoning, as published models write them. Some are special tokens, which decoding drops;
# the last pair is what remains of gpt-oss's.
_NAMES = "think|thinking|thought|reasoning|analysis|reflection|seed:think"  # DeepSeek, Qwen, GLM, EXAONE, Keye, Seed
_MARKERS = (
    *((f"<{name}>", f"</{name}>") for name in _NAMES.split("|")),
    (r"<summary>", r"</summary>"),  # LLaVA-CoT, with <reasoning>
    (r"<caption>", r"</caption>"),
    (r"\[think\]", r"\[/think\]"),  # Magistral
    (r"◁think▷", r"◁/think▷"),  # Kimi-VL
    (r"<\|begin_of_thought\|>", r"<\|end_of_thought\|>"),  # Sky-T1, OpenThinker
    (r"<\|start_thinking\|>", r"<\|end_thinking\|>"),  # Command A
    (r"<\|inner_prefix\|>", r"<\|inner_suffix\|>"),  # Apertus
    (r"<\|channel>thought\b", r"<channel\|>"),  # Gemma
    (r"<unused94>thought\b", r"<unused95>"),  # MedGemma
    (r"here(?: is|'s) my thought process:", r"here(?: is|'s) my response:"),  # Granite
    (r"<\|channel\|>analysis<\|message\|>", r"<\|channel\|>final<\|message\|>"),  # gpt-oss
    (r"\Aanalysis(?-i:(?=[A-Z]))", r"assistantfinal"),
)
_BLOCKS = tuple(tuple(re.compile(marker, re.IGNORECASE) for marker in pair) for pair in _MARKERS)

_AROUND_ANSWER = re.compile(
    r"\A(?:<(?:answer|response|output|conclusion)>|<\|begin_of_solution\|>|<\|start_response\|>|<\|begin_of_box\|>)"
    r"|(?:</(?:answer|response|output|conclusion)>|<\|end_of_solution\|>|<\|end_response\|>|<\|end_of_box\|>"
    r"|<\|return\|>)\Z",
    re.IGNORECASE,
)


def split_reasoning(text: str) -> tuple[str, bool]:
    """
    The answer in a model's output, without the reasoning before and inside it, and whether the reasoning ended.

    If the chat template opens the reasoning, the output holds only its end. An output that was cut off in its
    reasoning has no answer: `("", False)`.
    """
    for begin, end in _BLOCKS:
        text = _without_blocks(text.strip(), begin, end)
        if begin.match(text):
            return "", False
    while (bare := _AROUND_ANSWER.sub("", text).strip()) != text:
        text = bare
    return text, True


def _without_blocks(text: str, begin: re.Pattern, end: re.Pattern) -> str:
    """`text` without its closed blocks. Everything before an end marker that has no beginning is reasoning, too."""
    kept, position = "", 0
    for closing in end.finditer(text):
        opening = begin.search(text, position, closing.start())
        kept = "" if opening is None else kept + text[position : opening.start()]
        position = closing.end()
    return (kept + text[position:]).strip()
