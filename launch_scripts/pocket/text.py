"""The two small CLIP text encoders of the SDXL structure and their tokenizer, in which every word of the captions is one token."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor, nn

from .captions import vocabulary

MAX_LENGTH = 24


def build_tokenizer(folder: Path, words: list[str] | None = None):
    """Writes a byte-pair CLIP tokenizer to `folder` and returns it. Each of `words` (default: the vocabulary) is one token."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
    from transformers import CLIPTokenizer

    words = vocabulary() if words is None else words
    special = ["<|startoftext|>", "<|endoftext|>"]
    learner = Tokenizer(models.BPE(continuing_subword_prefix="", end_of_word_suffix="</w>", unk_token=special[1]))
    learner.normalizer = normalizers.Lowercase()
    learner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    trainer = trainers.BpeTrainer(
        vocab_size=100_000,
        min_frequency=1,
        special_tokens=[],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    learner.train_from_iterator(words, trainer)
    merges = json.loads(learner.to_str())["model"]["merges"]
    # CLIP's numbering: bytes, bytes that end a word, merges, special tokens.
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*alphabet, *(letter + "</w>" for letter in alphabet), *("".join(pair) for pair in merges), *special]
    folder.mkdir(parents=True, exist_ok=True)
    numbers = {token: k for k, token in enumerate(dict.fromkeys(tokens))}
    (folder / "vocab.json").write_text(json.dumps(numbers, ensure_ascii=False))
    lines = [pair if isinstance(pair, str) else " ".join(pair) for pair in merges]
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *lines]) + "\n")
    tokenizer = CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=MAX_LENGTH, pad_token=special[1])
    tokenizer.save_pretrained(folder)
    return tokenizer


def build_text_encoders(tokenizer, widths=(64, 128), layers: int = 3) -> tuple[nn.Module, nn.Module]:
    """(CLIPTextModel, CLIPTextModelWithProjection) of the given widths."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    def config(width):
        return CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=2 * width,
            projection_dim=width,
            num_hidden_layers=layers,
            num_attention_heads=width // 32,
            max_position_embeddings=MAX_LENGTH,
            hidden_act="gelu",
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )

    encoders = CLIPTextModel(config(widths[0])), CLIPTextModelWithProjection(config(widths[1]))
    for encoder in encoders:  # CLIP's own scale, 0.02, is too quiet for so few dimensions
        nn.init.normal_(encoder.get_input_embeddings().weight, std=0.3)
    return encoders


def revive(encoder: nn.Module) -> nn.Module:
    """The same encoder on the same weight tensors, built anew: one that was sent to another process no longer reports hidden states."""
    fresh = type(encoder)(encoder.config)
    fresh.load_state_dict(encoder.state_dict(), assign=True)
    return fresh


def tokenize(tokenizer, texts: list[str]) -> Tensor:
    """Token numbers (N, MAX_LENGTH), padded as the pipeline pads them."""
    return tokenizer(texts, padding="max_length", max_length=MAX_LENGTH, truncation=True, return_tensors="pt").input_ids


def embed(encoders, ids: Tensor) -> tuple[Tensor, Tensor]:
    """What StableDiffusionXLPipeline.encode_prompt makes of token numbers (N, L): embeddings (N, L, D1 + D2), pooled (N, D2)."""
    one = encoders[0](ids, output_hidden_states=True)
    two = encoders[1](ids, output_hidden_states=True)
    return torch.cat([one.hidden_states[-2], two.hidden_states[-2]], -1), two.text_embeds
