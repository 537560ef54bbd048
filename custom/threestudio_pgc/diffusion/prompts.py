"""Prompts to SDXL text conditioning: encoded once, kept on disk by content, the encoders freed; and view-dependent prompts."""

from __future__ import annotations

import difflib
import gc
import hashlib
import os
import re
import tempfile
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from .prior import (
    MODEL_KEY,
    PIPELINE_INDEX,
    TEXT_ENCODERS,
    TOKENIZERS,
    Conditioning,
    Part,
    PriorError,
    choose_variant,
    find_model,
    read_config,
    resolve_dtype,
)

DIRECTIONS = ("side", "front", "back", "overhead")  # the host's order
SMALL_VOCABULARY = 5000  # tokens; a full CLIP tokenizer has 49,408 and no unknown words worth a warning
CACHE_FORMAT = "1"  # part of every key: raised when what is stored changes meaning
_STOP_WORDS = frozenset("a an the of with and or in on at by for from to made is its".split())


class PromptWarning(UserWarning):
    """A prompt is not understood in full: part of it was cut off, or some of its words mean nothing to the model."""


class UnknownPromptWords(PromptWarning):
    """No content word of a prompt is in the model's vocabulary: the result will have nothing to do with it."""


class PromptEmbedding(NamedTuple):
    """float32 on the CPU."""

    embedding: Tensor  # (L, D): penultimate hidden states of both encoders, concatenated
    pooled: Tensor  # (P,): projected pooled output of the second encoder


# ----------------------------------------------------------------------------------------------------------- view-dependent


def view_prompts(prompt: str) -> list[str]:
    """The prompt from each side, in the order of `direction_index`: side, front, back, overhead."""
    return [f"{prompt}, {view} view" for view in DIRECTIONS]


def direction_index(
    elevation_deg: Tensor,
    azimuth_deg: Tensor,
    *,
    front: float = 45.0,
    back: float = 45.0,
    overhead: float = 60.0,
) -> Tensor:
    """Which of `view_prompts` a camera sees: (B,), (B,) degrees -> (B,) int64. Azimuth 0 (camera on +x) is the front.

    overhead above `overhead` degrees of elevation; else front within `front` degrees of azimuth 0, back within `back` degrees of
    180, side between. Thresholds are exclusive, any azimuth is wrapped.
    """
    azimuth = (azimuth_deg + 180) % 360 - 180
    index = torch.full(azimuth.shape, DIRECTIONS.index("side"), dtype=torch.int64, device=azimuth.device)
    index[azimuth.abs() < front] = DIRECTIONS.index("front")
    index[azimuth.abs() > 180 - back] = DIRECTIONS.index("back")
    index[elevation_deg > overhead] = DIRECTIONS.index("overhead")
    return index


def make_conditioning(
    encoded: Mapping[str, PromptEmbedding], prompts: Sequence[str], negatives: str | Sequence[str] = ""
) -> Conditioning:
    """Conditioning of B views from what `encode_prompts_sdxl` returned: one prompt per view, one negative for all or one each.

    Raises KeyError for a prompt that was not encoded, ValueError where the numbers differ.
    """
    negatives = [negatives] * len(prompts) if isinstance(negatives, str) else list(negatives)
    if len(negatives) != len(prompts):
        raise ValueError(f"found {len(negatives)} negative prompts for {len(prompts)} prompts, wanted one or as many")
    cond, uncond = [encoded[prompt] for prompt in prompts], [encoded[prompt] for prompt in negatives]
    return Conditioning(
        cond=torch.stack([item.embedding for item in cond]),
        uncond=torch.stack([item.embedding for item in uncond]),
        pooled_cond=torch.stack([item.pooled for item in cond]),
        pooled_uncond=torch.stack([item.pooled for item in uncond]),
    )


# ----------------------------------------------------------------------------------------------------------------- encoding


def default_cache_dir() -> Path:
    """`$PGC_CACHE/prompts`, or `.pgc_cache/prompts` in the current folder."""
    return Path(os.environ.get("PGC_CACHE") or ".pgc_cache") / "prompts"


def encode_prompts_sdxl(
    pretrained_model_name_or_path: str | Path,
    prompts: Sequence[str],
    *,
    cache_dir: str | Path | None = None,
    use_cache: bool = True,
    device: torch.device | str = "cpu",
    dtype: str | torch.dtype = "auto",
    zero_empty: bool | None = None,
) -> dict[str, PromptEmbedding]:
    """Encode each prompt with both of SDXL's text encoders, as `StableDiffusionXLPipeline.encode_prompt` does.

    Results are kept as safetensors files under `cache_dir`, keyed by the content of encoders and tokenizers, the prompt, the length
    and the precision: another model in the same folder, or the same one elsewhere, is told apart rightly. The encoders are loaded
    only for prompts that are not there, and freed at the end. A file that cannot be read is encoded anew.

    cache_dir   default `default_cache_dir()`; with use_cache False nothing is read or written
    zero_empty  the empty prompt is all zeros, as diffusers' pipelines make a missing negative prompt, instead of encoded; None: what
                the model says itself, by `force_zeros_for_empty_prompt` in its model_index.json

    Warns with PromptWarning where a prompt is cut at the encoders' length or has words a small vocabulary lacks, and with
    UnknownPromptWords where it has no other. Raises PriorError where the model cannot be had.
    """
    device = torch.device(device)
    dtype = resolve_dtype(dtype, device)
    parts = [*TEXT_ENCODERS, *TOKENIZERS]
    root = find_model(pretrained_model_name_or_path, MODEL_KEY, parts, half=dtype != torch.float32)
    if zero_empty is None:
        zero_empty = bool(read_config(root, Part("", PIPELINE_INDEX, None)).get("force_zeros_for_empty_prompt", True))
    tokenizers = _load_tokenizers(root)
    lengths = [_max_length(root, tokenizer, part) for tokenizer, part in zip(tokenizers, TEXT_ENCODERS)]
    prompts = list(dict.fromkeys(prompts))
    _warn_truncated(prompts, tokenizers, lengths)
    warn_unknown_words(prompts, known_words(root, tokenizers[0]))

    cache_dir = default_cache_dir() if cache_dir is None else Path(cache_dir)
    model = model_fingerprint(root)
    files = {
        prompt: cache_dir / f"{_cache_key(model, prompt, lengths, dtype, zero_empty and not prompt)}.safetensors" for prompt in prompts
    }
    encoded = {prompt: _read_cache(file) if use_cache else None for prompt, file in files.items()}
    missing = [prompt for prompt in prompts if encoded[prompt] is None]
    if missing:
        for prompt, item in zip(missing, _encode(root, missing, tokenizers, lengths, device, dtype, zero_empty)):
            encoded[prompt] = item
            if use_cache:
                _write_cache(files[prompt], item)
    return encoded


@torch.no_grad()
def _encode(root, prompts, tokenizers, lengths, device, dtype, zero_empty) -> list[PromptEmbedding]:
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    hidden, pooled = [[] for _ in prompts], []
    # One encoder at a time, so that both never lie in memory together; one prompt at a time, so that what is cached does not depend
    # on which others were missing.
    for model_class, part, tokenizer, length in zip(
        (CLIPTextModel, CLIPTextModelWithProjection), TEXT_ENCODERS, tokenizers, lengths
    ):
        encoder = _load_encoder(model_class, root, part).to(device, dtype)
        for index, prompt in enumerate(prompts):
            tokens = tokenizer(prompt, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
            output = encoder(tokens.input_ids.to(device), output_hidden_states=True)
            hidden[index].append(output.hidden_states[-2][0].float().cpu())
            if model_class is CLIPTextModelWithProjection:
                pooled.append(output.text_embeds[0].float().cpu())
        del encoder, output
        if device.type == "cuda":
            gc.collect()
            torch.cuda.empty_cache()
    items = [PromptEmbedding(torch.cat(states, dim=-1), vector) for states, vector in zip(hidden, pooled)]
    if zero_empty:
        items = [item if prompt else PromptEmbedding(*map(torch.zeros_like, item)) for prompt, item in zip(prompts, items)]
    return items


def _load_encoder(model_class, root: Path, part):
    folder = root / part.subfolder
    variant = choose_variant([path.name for path in folder.iterdir()], part.stem, half=False)
    try:
        encoder, info = model_class.from_pretrained(
            folder, variant=variant, use_safetensors=True, local_files_only=True, output_loading_info=True
        )
    except Exception as error:  # safetensors, transformers and torch each raise their own for a damaged file
        raise PriorError(f"{MODEL_KEY}: the weights in {folder} cannot be loaded: {error}") from error
    # Older files lack this buffer, which every version can recompute.
    missing = [name for name in info["missing_keys"] if not name.endswith("position_ids")]
    if missing:
        raise PriorError(
            f"{MODEL_KEY}: the weights in {folder} do not fill its config.json: {len(missing)} tensors missing, "
            f"first {sorted(missing)[0]}"
        )
    return encoder.eval().requires_grad_(False)


def _load_tokenizers(root: Path) -> list:
    from transformers import CLIPTokenizer

    tokenizers = []
    for part in TOKENIZERS:
        folder = root / part.subfolder
        try:
            tokenizers.append(CLIPTokenizer.from_pretrained(folder, local_files_only=True))
        except Exception as error:
            raise PriorError(f"{MODEL_KEY}: the tokenizer in {folder} cannot be loaded: {error}") from error
    return tokenizers


def _max_length(root: Path, tokenizer, encoder_part) -> int:
    # A tokenizer saved without a length says 1e30; the encoder has no more positions than these.
    return min(tokenizer.model_max_length, read_config(root, encoder_part).get("max_position_embeddings", 77))


# -------------------------------------------------------------------------------------------------------------------- cache


def model_fingerprint(root: Path, *, ends: int = 4 * 2**20) -> str:
    """Content of the text encoders and tokenizers of a pipeline folder, as a hexadecimal sha256.

    Of files larger than twice `ends` bytes, the size and both ends are read: full weights take seconds to hash, and another training
    changes all of them. Names and places of the folder, and times, do not count.
    """
    digest = hashlib.sha256()
    for part in (*TEXT_ENCODERS, *TOKENIZERS):
        for path in sorted((root / part.subfolder).iterdir()):
            if path.suffix not in (".json", ".txt", ".safetensors"):
                continue
            size = path.stat().st_size
            digest.update(f"{part.subfolder}/{path.name}:{size}\0".encode())
            with path.open("rb") as file:
                if size <= 2 * ends:
                    digest.update(file.read())
                else:
                    digest.update(file.read(ends))
                    file.seek(-ends, os.SEEK_END)
                    digest.update(file.read())
    return digest.hexdigest()


def _cache_key(model: str, prompt: str, lengths: Sequence[int], dtype: torch.dtype, zeros: bool) -> str:
    text = "\0".join([CACHE_FORMAT, model, prompt, ",".join(map(str, lengths)), str(dtype), str(zeros)])
    return hashlib.sha256(text.encode()).hexdigest()


def _read_cache(path: Path) -> PromptEmbedding | None:
    from safetensors.torch import load_file

    if not path.is_file():
        return None
    try:
        tensors = load_file(path)
        item = PromptEmbedding(tensors["embedding"], tensors["pooled"])
    except Exception:  # cut short, overwritten, not ours: encoding again is always right
        return None
    whole = item.embedding.ndim == 2 and item.pooled.ndim == 1 and all(torch.isfinite(tensor).all() for tensor in item)
    return item if whole else None


def _write_cache(path: Path, item: PromptEmbedding) -> None:
    from safetensors.torch import save

    # Written under another name first: a second process, or a kill, never leaves half a file under the real one.
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".tmp", delete=False) as file:
            temporary = Path(file.name)
            file.write(save({"embedding": item.embedding.contiguous(), "pooled": item.pooled.contiguous()}))
        os.replace(temporary, path)
    except OSError as error:
        warnings.warn(f"prompt cache: {path.parent} cannot be written ({error}); the next run encodes again", stacklevel=3)
        if temporary is not None:
            temporary.unlink(missing_ok=True)


# ----------------------------------------------------------------------------------------------------------------- warnings


def known_words(root: Path, tokenizer) -> list[str] | None:
    """The words a small model was trained with, or None for a full vocabulary, which knows every word in some way.

    From `vocabulary.txt` in the model's folder (one word per line) where there is one, else the words the tokenizer leaves whole.
    """
    vocabulary = tokenizer.get_vocab()
    if len(vocabulary) >= SMALL_VOCABULARY:
        return None
    listed = root / "vocabulary.txt"
    if listed.is_file():
        return listed.read_text(encoding="utf-8").lower().split()
    words = sorted(token.removesuffix("</w>") for token in vocabulary if token.endswith("</w>"))
    # In the vocabulary is not enough: the merges of other words may split this one.
    return [word for word in words if word.isalpha() and len(tokenizer(word, add_special_tokens=False).input_ids) == 1]


def warn_unknown_words(prompts: Iterable[str], known: Sequence[str] | None) -> None:
    """Warn of words that are not in `known` (None: all are): PromptWarning for some, UnknownPromptWords for all content words."""
    if known is None:
        return
    vocabulary = set(known)
    listed = [word for word in known if len(word) > 2 and word not in _STOP_WORDS]
    for prompt in dict.fromkeys(_without_view(prompt) for prompt in prompts):
        words = list(dict.fromkeys(_words(prompt)))
        content = [word for word in words if word not in _STOP_WORDS]
        unknown = [word for word in content if word not in vocabulary]
        if not unknown:
            continue
        near = {word: difflib.get_close_matches(word, listed, n=1) for word in unknown}
        hints = [f"{word!r} -> {match[0]!r}?" for word, match in near.items() if match]
        tail = f"{' '.join(hints)} It knows, among others: {', '.join(listed[:40])}".strip()
        if len(unknown) == len(content):
            warnings.warn(
                f"NO word of the prompt {prompt!r} is in this model's vocabulary, so the result will NOT show it. {tail}",
                UnknownPromptWords,
                stacklevel=3,
            )
        else:
            warnings.warn(
                f"prompt {prompt!r}: this model's vocabulary lacks {', '.join(map(repr, unknown))}. {tail}",
                PromptWarning,
                stacklevel=3,
            )


def _warn_truncated(prompts: Sequence[str], tokenizers: Sequence, lengths: Sequence[int]) -> None:
    warned = set()
    for prompt in prompts:
        if _without_view(prompt) in warned:
            continue
        for tokenizer, length in zip(tokenizers, lengths):
            ids = tokenizer(prompt, truncation=False, verbose=False).input_ids
            if len(ids) > length:
                cut = tokenizer.decode(ids[length - 1 : -1]).strip()
                warnings.warn(
                    f"prompt {prompt!r} is cut at {length} tokens; lost is {cut!r}. Wanted a shorter prompt",
                    PromptWarning,
                    stacklevel=3,
                )
                warned.add(_without_view(prompt))
                break  # both tokenizers say the same


def _words(prompt: str) -> list[str]:
    return re.findall(r"[^\W\d_]+", prompt.lower())


def _without_view(prompt: str) -> str:
    """What the user wrote: the direction is our own addition."""
    for view in DIRECTIONS:
        prompt = prompt.removesuffix(f", {view} view")
    return prompt
