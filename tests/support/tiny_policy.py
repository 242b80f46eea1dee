# SPDX-License-Identifier: Apache-2.0
"""A policy that TRL trains in milliseconds a step, saved to disk as users have it."""

from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


WORDS = ["<pad>", "<bos>", "<eos>", "<unk>", "<user>", "<assistant>", "<system>", *"abcdefghijkl"]
CHAT_TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}> {{ m.content }} {% if m.role == 'assistant' %}<eos>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def save_tiny_policy(path: Path, **config: float) -> None:
    backend = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    backend.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        unk_token="<unk>",
        additional_special_tokens=["<user>", "<assistant>", "<system>"],
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    torch.manual_seed(1)  # about half of its completions of 8 tokens are finished
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(WORDS),
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=64,
            initializer_range=0.3,  # so that probabilities differ: 1/19 for every token would hide mistakes
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
            **config,
        )
    )
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
