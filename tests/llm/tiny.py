"""A tiny Qwen2 with a byte tokenizer, and text that it can learn something of: made in a moment, the same each time."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

CHAT = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
TEXT = "".join(f"{a} and {b} make {a + b}. " for a in range(60) for b in range(60))


def tokenizer() -> PreTrainedTokenizerFast:
    """One token for each byte, and some special ones."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE({letter: index for index, letter in enumerate(alphabet)}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    special = ["<|end|>", "<|pad|>", "<|user|>", "<|assistant|>"]
    made = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        eos_token=special[0],
        pad_token=special[1],
        additional_special_tokens=special[2:],
    )
    made.chat_template = CHAT
    return made


def config(*, tied: bool = True, heads: int = 4, layers: int = 2) -> Qwen2Config:
    """64 wide, grouped queries."""
    return Qwen2Config(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=2,
        vocab_size=260,
        tie_word_embeddings=tied,
        max_position_embeddings=512,
        eos_token_id=256,
        pad_token_id=257,
        bos_token_id=None,
    )


def model(*, tied: bool = True, steps: int = 120) -> Qwen2ForCausalLM:
    """Trained for some steps, so that what it puts out depends on what it reads."""
    return _trained(tied, steps)


@cache
def _trained(tied: bool, steps: int) -> Qwen2ForCausalLM:
    torch.manual_seed(0)
    made = Qwen2ForCausalLM(config(tied=tied)).float()
    ids = torch.tensor(tokenizer()(TEXT)["input_ids"])
    optimiser = torch.optim.AdamW(made.parameters(), 3e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        starts = torch.randint(0, len(ids) - 65, (8,), generator=generator)
        batch = torch.stack([ids[start : start + 64] for start in starts])
        loss = made(batch, labels=batch).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return made.eval()


def saved(folder: Path, *, tied: bool = True) -> Path:
    """The model as a folder of transformers, with its tokenizer."""
    model(tied=tied).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder
