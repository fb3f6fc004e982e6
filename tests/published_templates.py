"""The chat templates of the supported families' published models, rewritten from their formats.

They are shorter than the originals, without tools and videos, but keep what matters: default system texts, system
texts that move, thoughts that are stripped from earlier turns, errors on an unexpected order of roles, and the text
around an answer.
"""

from families import IDEFICS

IMAGES = "{% for p in m['content'] if p['type'] == 'image' %}IMAGE{% endfor %}"
TEXTS = "{% for p in m['content'] if p['type'] == 'text' %}{{ p['text'] }}{% endfor %}"
PARTS = (
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for p in m['content'] %}"
    "{% if p['type'] == 'image' %}IMAGE{% else %}{{ p['text'] }}{% endif %}{% endfor %}{% endif %}"
)

LLAVA = (
    "{% for m in messages %}{% if m['role'] != 'system' %}{{ m['role'].upper() + ': ' }}{% endif %}"
    + IMAGES.replace("IMAGE", "{{ '<image>\n' }}")
    + TEXTS.replace("{{ p['text'] }}", "{{ p['text'] + ' ' }}")
    + "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
VIPLLAVA = (
    "{% for m in messages %}{% if m['role'] == 'system' %}" + TEXTS + "{% elif m['role'] == 'user' %}###Human: "
    "" + IMAGES.replace("IMAGE", "{{ '<image>\n' }}") + TEXTS + "{% else %}###Assistant: " + TEXTS + "{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}###Assistant:{% endif %}"
)
LLAVA_NEXT = (
    "{% for m in messages %}{% if m['role'] == 'system' %}{{ '<<SYS>>\n' }}" + TEXTS + "{{ '\n<</SYS>>\n\n' }}"
    "{% elif m['role'] == 'user' %}{{ '[INST] ' }}" + IMAGES.replace("IMAGE", "{{ '<image>\n' }}") + TEXTS + ""
    "{{ ' [/INST]' }}{% else %}{{ ' ' }}" + TEXTS + "{{ '</s> ' }}{% endif %}{% endfor %}"
)
LLAVA_ONEVISION = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + ' ' }}" + IMAGES.replace("IMAGE", "<image>") + ""
    "{% if m['role'] != 'assistant' %}" + TEXTS.replace("{{ p", "{{ '\n' + p") + "{% else %}"
    "{% for p in m['content'] if p['type'] == 'text' %}{% generation %}{{ '\n' + p['text'] }}{% endgeneration %}"
    "{% endfor %}{% endif %}{{ '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
QWEN2 = (
    "{% set count = namespace(value=0) %}{% for m in messages %}{% if loop.first and m['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}<|im_start|>{{ m['role'] }}\n"
    + PARTS.replace(
        "IMAGE",
        "{% set count.value = count.value + 1 %}{% if add_vision_id %}Picture {{ count.value }}: {% endif %}"
        "<|vision_start|><|image_pad|><|vision_end|>",
    )
    + "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
QWEN3_TEXTS = TEXTS.replace("{% for", "{% if m.content is string %}{{ m.content }}{% else %}{% for") + "{% endif %}"
QWEN3 = (
    "{% set m = messages[0] %}{% if m.role == 'system' %}{{ '<|im_start|>system\n' }}" + QWEN3_TEXTS + ""
    "{{ '<|im_end|>\n' }}{% endif %}"
    "{% for m in messages %}{% if m.role == 'user' %}{{ '<|im_start|>' + m.role + '\n' }}"
    + PARTS.replace("IMAGE", "<|vision_start|><|image_pad|><|vision_end|>")
    + "{{ '<|im_end|>\n' }}{% elif m.role == 'assistant' %}{{ '<|im_start|>' + m.role + '\n' }}"
    + QWEN3_TEXTS
    + ""
    "{{ '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Qwen3.5 and 3.6 think by default: thoughts are stripped from earlier turns, and the last turn always has some.
QWEN3_5 = (
    "{% macro read(content) %}{% if content is string %}{{ content }}{% elif content is iterable %}"
    "{% for p in content %}{% if p.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif 'text' in p %}{{ p.text }}{% else %}{{ raise_exception('Unexpected item type in content.') }}{% endif %}"
    "{% endfor %}{% endif %}{% endmacro %}"
    "{% set ns = namespace(searching=true, last=-1) %}{% for m in messages[::-1] %}"
    "{% if ns.searching and m.role == 'user' %}{% set content = read(m.content) | trim %}"
    "{% if not (content.startswith('<tool_response>') and content.endswith('</tool_response>')) %}"
    "{% set ns.searching = false %}{% set ns.last = messages | length - 1 - loop.index0 %}{% endif %}{% endif %}"
    "{% endfor %}{% if ns.searching %}{{ raise_exception('No user query found in messages.') }}{% endif %}"
    "{% for m in messages %}{% set content = read(m.content) | trim %}"
    "{% if m.role == 'system' %}{% if not loop.first %}"
    "{{ raise_exception('System message must be at the beginning.') }}{% endif %}"
    "{{ '<|im_start|>system\n' + content + '<|im_end|>\n' }}"
    "{% elif m.role == 'user' %}{{ '<|im_start|>user\n' + content + '<|im_end|>\n' }}"
    "{% elif m.role == 'assistant' %}{% set thoughts = '' %}"
    "{% if m.reasoning_content is string %}{% set thoughts = m.reasoning_content %}{% elif '</think>' in content %}"
    "{% set thoughts = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}"
    "{% set content = content.split('</think>')[-1].lstrip('\n') %}{% endif %}{% set thoughts = thoughts | trim %}"
    "{% if loop.index0 > ns.last %}"
    "{{ '<|im_start|>assistant\n<think>\n' + thoughts + '\n</think>\n\n' + content }}"
    "{% else %}{{ '<|im_start|>assistant\n' + content }}{% endif %}{{ '<|im_end|>\n' }}"
    "{% else %}{{ raise_exception('Unexpected message role.') }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is defined and enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}"
    "{% else %}{{ '<think>\n' }}{% endif %}{% endif %}"
)
GEMMA3 = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% if messages[0]['content'] is string %}"
    "{% set prefix = messages[0]['content'] + '\n\n' %}{% else %}"
    "{% set prefix = messages[0]['content'][0]['text'] + '\n\n' %}{% endif %}{% set turns = messages[1:] %}"
    "{% else %}{% set prefix = '' %}{% set turns = messages %}{% endif %}{% for m in turns %}"
    "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{{ '<start_of_turn>' + ('model' if m['role'] == 'assistant' else m['role']) + '\n' "
    "+ (prefix if loop.first else '') }}{% if m['content'] is string %}{{ m['content'] | trim }}{% else %}"
    "{% for p in m['content'] %}{% if p['type'] == 'image' %}{{ '<start_of_image>' }}"
    "{% elif p['type'] == 'text' %}{{ p['text'] | trim }}{% endif %}{% endfor %}{% endif %}"
    "{{ '<end_of_turn>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
SMOLVLM = (
    "<|im_start|>{% for m in messages %}{{ m['role'] | capitalize }}"
    "{% if m['content'][0]['type'] == 'image' %}{{ ':' }}{% else %}{{ ': ' }}{% endif %}"
    "{% for p in m['content'] %}{% if p['type'] == 'text' %}{{ p['text'] }}"
    "{% elif p['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}<end_of_utterance>\n{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
INTERNVL = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    + PARTS.replace("IMAGE", "{{ '<IMG_CONTEXT>\n' }}")
    + "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

PUBLISHED: dict[str, str | None] = {
    "llava": LLAVA,
    "llava_next": LLAVA_NEXT,
    "llava_onevision": LLAVA_ONEVISION,
    "qwen2_vl": QWEN2,
    "qwen2_5_vl": QWEN2,
    "qwen3_vl": QWEN3,
    "qwen3_vl_moe": QWEN3,
    "qwen3_5": QWEN3_5,
    "vipllava": VIPLLAVA,
    "gemma3": GEMMA3,
    "paligemma": None,  # published without a template; the processor provides ours
    "idefics3": IDEFICS,
    "smolvlm": SMOLVLM,
    "internvl": INTERNVL,
}
# Templates that handle thoughts in other ways, with the tokens of Qwen.
THINKING = {
    "thoughts in the last turn only": QWEN3_5,
    "no thoughts in a chat": QWEN3_5.replace("loop.index0 > ns.last", "loop.index0 > ns.last and thoughts"),
    "thoughts closed by nothing": QWEN3.replace("assistant\n' }}{% endif %}", "assistant\n<think>\n' }}{% endif %}"),
    "an answer without thoughts": QWEN3_5.replace("{{ '<think>\n' }}{% endif %}{% endif %}", "{% endif %}{% endif %}"),
}
