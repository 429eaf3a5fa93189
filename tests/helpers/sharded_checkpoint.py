"""A checkpoint folder as authors publish one: shards, byte-level BPE, template, generation config.

The weights are random. `write_checkpoint` takes a second; the fixture `sharded_checkpoint` of
`tests/conftest.py` writes one folder for all tests.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import GraniteMoeHybridForCausalLM, PreTrainedTokenizerFast

from tests.helpers.tiny_models import tiny_model

TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|role|>{{ message.role }}<|end_role|>"
    "{{ message.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|role|>assistant<|end_role|>{% endif %}"
)
"""A template in Granite's style. It writes the beginning-of-text token itself."""

SPECIAL = ["<|pad|>", "<|bos|>", "<|end|>", "<|role|>", "<|end_role|>", "<|stop|>"]
PAD, BOS, END, ROLE, END_ROLE, STOP = range(len(SPECIAL))

GENERATION = {
    "do_sample": True,
    "temperature": 0.7,
    "top_p": 0.9,
    "repetition_penalty": 1.05,
    "max_new_tokens": 20,
    "eos_token_id": [END, STOP],
    "bos_token_id": BOS,
    "pad_token_id": PAD,
}

_CORPUS = ["the quick brown fox jumps over the lazy dog", "naïve café – 東京 🦊", "0 1 2 3 4 5"]


def byte_level_tokenizer(vocabulary: int = 320) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer that adds `<|bos|>` to a text, with a chat template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_CORPUS, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|bos|> $A", pair="<|bos|> $A $B", special_tokens=[("<|bos|>", BOS)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|bos|>",
        eos_token="<|end|>",
        pad_token="<|pad|>",
        chat_template=TEMPLATE,
    )


def write_checkpoint(folder: Path, **generation: Any) -> GraniteMoeHybridForCausalLM:
    """Write a checkpoint in at least two shards. `generation` overrides `GENERATION`.

    Returns:
        The model that was saved.
    """
    tokenizer = byte_level_tokenizer()
    model = tiny_model(vocab_size=len(tokenizer), initializer_range=0.3)
    model.save_pretrained(folder, max_shard_size="60KB")
    tokenizer.save_pretrained(folder)
    fields = json.dumps(GENERATION | generation, indent=2)
    (folder / "generation_config.json").write_text(fields, encoding="utf-8")
    return model
