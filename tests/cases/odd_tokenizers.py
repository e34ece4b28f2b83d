"""Tokenizers with what the one of `tests.tiny_model` lacks: tokens around a text, a chat template."""

from __future__ import annotations

from pathlib import Path

from tokenizers import processors
from transformers import PreTrainedTokenizerFast

BOS, EOS = "<s>", "</s>"
TEMPLATE = "{% for m in messages %}[{{ m.role }}]{{ m.content }}\n{% endfor %}"
"""A chat template without tokens of its own."""
TEMPLATE_WITH_BOS = "{{ bos_token }}" + TEMPLATE


def change_tokenizer(folder: Path, template: str | None = None, bos: bool = False, eos: bool = False) -> Path:
    """Give the tokenizer in a model folder a chat template, or tokens that it puts before and after each text."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    if bos or eos:
        tokenizer.add_special_tokens({"bos_token": BOS, "eos_token": EOS})
        single = f"{BOS if bos else ''} $A {EOS if eos else ''}".strip()
        tokens = [(token, tokenizer.convert_tokens_to_ids(token)) for token in (BOS, EOS)]
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single, None, tokens)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return folder
