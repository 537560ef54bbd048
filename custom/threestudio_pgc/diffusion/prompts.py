"""Prompts to embeddings: encoded once, kept on disk by content, the encoders freed."""

from __future__ import annotations

import difflib
import gc
import hashlib
import os
import re
import tempfile
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .conditioning import DIRECTIONS, PromptEmbedding
from .model_files import (
    MODEL_KEY,
    PIPELINE_INDEX,
    TEXT_ENCODERS,
    TOKENIZERS,
    TRANSFORMER,
    Part,
    Wanted,
    check_memory,
    current_id,
    family_of,
    find_model,
    read_config,
    stored_variant,
)
from .precision import resolve_dtype
from .prior import PriorError

SMALL_VOCABULARY = 5000  # tokens; a full CLIP tokenizer has 49,408 and no unknown words worth a warning
T5_LENGTHS = {"sd3": 256, "flux": 512}  # tokens that diffusers' pipelines read of a prompt by default
CACHE_FORMAT = "2"  # part of every key: raised when what is stored changes meaning
_STOP_WORDS = frozenset("a an the of with and or in on at by for from to made is its".split())


class PromptWarning(UserWarning):
    """A prompt is not understood in full: part of it was cut off, or some of its words mean nothing to the model."""


class UnknownPromptWords(PromptWarning):
    """No content word of a prompt is in the model's vocabulary: the result will have nothing to do with it."""


# ----------------------------------------------------------------------------------------------------------------- encoding


class _Encoder(NamedTuple):
    """A text encoder of a pipeline: where it and its tokenizer lie, its class in transformers, and what is taken of it."""

    part: Part
    tokenizer: Part
    model_class: str
    layer: int | None  # -2: the penultimate hidden states; None: the last, after the final norm

    @property
    def is_t5(self) -> bool:
        return self.model_class == "T5EncoderModel"


_FAMILY_ENCODERS = {
    "sd": [("CLIPTextModel", None)],
    "sdxl": [("CLIPTextModel", -2), ("CLIPTextModelWithProjection", -2)],
    "sd3": [("CLIPTextModelWithProjection", -2), ("CLIPTextModelWithProjection", -2), ("T5EncoderModel", None)],
    "flux": [("CLIPTextModel", None), ("T5EncoderModel", None)],
}


def _encoders(root: Path) -> list[_Encoder]:
    """The text encoders that a pipeline has, in its order. Stable Diffusion 3's third is left out where model_index.json says so."""
    family = family_of(root)
    if family not in _FAMILY_ENCODERS:
        why = ", which takes a picture, not a prompt" if family == "zero123" else ""
        raise PriorError(f"{MODEL_KEY}: {root} is a {family} model{why}; wanted one of {', '.join(_FAMILY_ENCODERS)}")
    encoders = [_Encoder(*where, *what) for *where, what in zip(TEXT_ENCODERS, TOKENIZERS, _FAMILY_ENCODERS[family])]
    listed = read_config(root, Part("", PIPELINE_INDEX, None)).get("text_encoder_3") or [None]
    return encoders[:2] if family == "sd3" and listed[0] is None else encoders


def _parts(encoders: Iterable[_Encoder]) -> list[Part]:
    return [part for encoder in encoders for part in (encoder.part, encoder.tokenizer)]


def default_cache_dir() -> Path:
    """`$PGC_CACHE/prompts`, or `.pgc_cache/prompts` in the current folder."""
    return Path(os.environ.get("PGC_CACHE") or ".pgc_cache") / "prompts"


def encode_prompts(
    pretrained_model_name_or_path: str | Path,
    prompts: Sequence[str],
    *,
    cache_dir: str | Path | None = None,
    use_cache: bool = True,
    device: torch.device | str = "cpu",
    dtype: str | torch.dtype = "auto",
    zero_empty: bool | None = None,
) -> dict[str, PromptEmbedding]:
    """Encode each prompt as `encode_prompt` of the model's own diffusers pipeline does, which model_index.json names.

    Stable Diffusion: last hidden states of the one encoder, no pooled embedding. SDXL: penultimate hidden states of both encoders side
    by side, pooled of the second. Stable Diffusion 3: the same of its first two encoders, filled up with zeros to the width of the third,
    T5, whose last hidden states follow as further tokens (zeros where model_index.json says that there is none); pooled of both. FLUX:
    last hidden states of its T5, pooled of its CLIP.

    Results are kept as safetensors files under `cache_dir`, keyed by the content of encoders and tokenizers, the prompt, the length
    and the precision: another model in the same folder, or the same one elsewhere, is told apart rightly. The encoders are loaded
    only for prompts that are not there, and freed at the end. A file that cannot be read is encoded anew.

    cache_dir   default `default_cache_dir()`; with use_cache False nothing is read or written
    zero_empty  the empty prompt is all zeros, as SDXL's pipeline makes a missing negative prompt, instead of encoded; None: what
                the model says itself, by `force_zeros_for_empty_prompt` in its model_index.json. Other families always encode it

    Warns with PromptWarning where a prompt is cut at an encoder's length or has words a small vocabulary lacks, and with
    UnknownPromptWords where it has no other. Raises PriorError where the model cannot be had, is conditioned on a picture, or zero_empty
    is asked of another family.
    """
    device = torch.device(device)
    dtype = resolve_dtype(dtype, device)
    name = current_id(pretrained_model_name_or_path)
    index = find_model(name, MODEL_KEY, [])  # which says what else is wanted
    family, encoders = family_of(index), _encoders(index)
    # Zeros in T5's place are as wide as T5's embeddings would be, which only the transformer can tell then.
    without_t5 = family == "sd3" and not encoders[-1].is_t5
    transformer = TRANSFORMER._replace(stem=None)
    parts = _parts(encoders) + ([transformer] if without_t5 else [])
    root = find_model(name, MODEL_KEY, parts, half=dtype != torch.float32)
    zero_empty = _zeros_for_empty(root, family, zero_empty)
    blank = (T5_LENGTHS[family], read_config(root, transformer)["joint_attention_dim"]) if without_t5 else None
    tokenizers = [_load_tokenizer(root, encoder) for encoder in encoders]
    lengths = [_max_length(root, family, tokenizer, encoder) for tokenizer, encoder in zip(tokenizers, encoders)]
    prompts = list(dict.fromkeys(prompts))
    _warn_truncated(prompts, tokenizers, lengths)
    warn_unknown_words(prompts, known_words(root, tokenizers[0]))

    cache_dir = default_cache_dir() if cache_dir is None else Path(cache_dir)
    model = model_fingerprint(root)
    key = [family, model, lengths, blank, dtype]
    files = {prompt: cache_dir / f"{_cache_key(*key, prompt, zero_empty and not prompt)}.safetensors" for prompt in prompts}
    encoded = {prompt: _read_cache(file, family != "sd") if use_cache else None for prompt, file in files.items()}
    missing = [prompt for prompt in prompts if encoded[prompt] is None]
    if missing:
        states = _encode(root, missing, encoders, tokenizers, lengths, device, dtype)
        for prompt, (hidden, pooled) in zip(missing, states):
            item = _join(family, hidden, pooled, blank)
            if zero_empty and not prompt:
                item = PromptEmbedding(*map(torch.zeros_like, item))
            encoded[prompt] = item
            if use_cache:
                _write_cache(files[prompt], item)
    return encoded


def _zeros_for_empty(root: Path, family: str, asked: bool | None) -> bool:
    if family == "sdxl":
        index = read_config(root, Part("", PIPELINE_INDEX, None))
        return bool(index.get("force_zeros_for_empty_prompt", True)) if asked is None else asked
    if asked:
        raise PriorError(
            f"zero_empty: found true for {root}, a {family} model, wanted null or false: only SDXL's empty prompt may be zeros"
        )
    return False


@torch.no_grad()
def _encode(root, prompts, encoders, tokenizers, lengths, device, dtype) -> list[tuple[list[Tensor], list[Tensor]]]:
    """For each prompt: the hidden states (L, D) of every encoder, and the pooled outputs (P,) of CLIP's, projected where they are."""
    states = [([], []) for _ in prompts]
    # One encoder at a time, so that two never lie in memory together; one prompt at a time, so that what is cached does not depend
    # on which others were missing.
    for encoder, tokenizer, length in zip(encoders, tokenizers, lengths):
        model = _load_encoder(encoder, root, device, dtype)
        masked = encoder.layer is None and getattr(model.config, "use_attention_mask", False)
        for prompt, (hidden, pooled) in zip(prompts, states):
            tokens = tokenizer(prompt, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
            mask = {"attention_mask": tokens.attention_mask.to(device)} if masked else {}
            output = model(tokens.input_ids.to(device), output_hidden_states=True, **mask)
            taken = output.last_hidden_state if encoder.layer is None else output.hidden_states[encoder.layer]
            hidden.append(taken[0].float().cpu())
            if not encoder.is_t5:
                vector = output.text_embeds if "WithProjection" in encoder.model_class else output.pooler_output
                pooled.append(vector[0].float().cpu())
        del model, output, taken
        if device.type == "cuda":
            gc.collect()
            torch.cuda.empty_cache()
    return states


def _join(family: str, hidden: list[Tensor], pooled: list[Tensor], blank: tuple[int, int] | None) -> PromptEmbedding:
    """One embedding out of what the encoders gave; blank: length and width of the zeros that stand in for T5's."""
    if family == "sd":
        return PromptEmbedding(hidden[0])
    if family == "flux":
        return PromptEmbedding(hidden[1], pooled[0])
    clip = torch.cat(hidden[:2], dim=-1)
    if family == "sdxl":
        return PromptEmbedding(clip, pooled[1])
    t5 = hidden[2] if blank is None else torch.zeros(blank)
    clip = F.pad(clip, (0, t5.shape[-1] - clip.shape[-1]))
    return PromptEmbedding(torch.cat([clip, t5]), torch.cat(pooled))


def _load_encoder(encoder: _Encoder, root: Path, device: torch.device, dtype: torch.dtype):
    import transformers

    folder = root / encoder.part.subfolder
    variant = stored_variant(folder, encoder.part, half=False)
    check_memory([Wanted(root, encoder.part, dtype)], device, f"text encoder {encoder.part.subfolder}", "an encoder is freed after use")
    try:
        model, info = getattr(transformers, encoder.model_class).from_pretrained(
            folder, variant=variant, use_safetensors=True, local_files_only=True, output_loading_info=True
        )
    except Exception as error:  # safetensors, transformers and torch each raise their own for a damaged file
        raise PriorError(f"{MODEL_KEY}: the weights in {folder} cannot be loaded: {error}") from error
    # Older files lack this buffer, which every version can recompute.
    missing = [name for name in info["missing_keys"] if not name.endswith("position_ids")]
    if missing:
        raise PriorError(
            f"{MODEL_KEY}: the weights in {folder} do not fill its config.json: {len(missing)} tensors missing, first {sorted(missing)[0]}"
        )
    model = model.to(device, dtype)
    if encoder.is_t5 and dtype == torch.float16:
        # T5's feed-forward outputs overflow in half precision; its code expects these layers in float32 then.
        for name, module in model.named_modules():
            if name.endswith(".wo"):
                module.float()
    return model.eval().requires_grad_(False)


def _load_tokenizer(root: Path, encoder: _Encoder):
    from transformers import CLIPTokenizer, T5TokenizerFast

    folder = root / encoder.tokenizer.subfolder
    vocabulary = ["tokenizer.json"] if encoder.is_t5 else ["tokenizer.json", "vocab.json"]
    if not any((folder / name).is_file() for name in vocabulary):
        # transformers would go on with an empty vocabulary.
        hint = "; spiece.model alone would need the sentencepiece library, which is not used" if encoder.is_t5 else ""
        raise PriorError(f"{MODEL_KEY}: the tokenizer in {folder} has no vocabulary, wanted {' or '.join(vocabulary)}{hint}")
    try:
        return (T5TokenizerFast if encoder.is_t5 else CLIPTokenizer).from_pretrained(folder, local_files_only=True)
    except Exception as error:
        raise PriorError(f"{MODEL_KEY}: the tokenizer in {folder} cannot be loaded: {error}") from error


def _max_length(root: Path, family: str, tokenizer, encoder: _Encoder) -> int:
    # A tokenizer saved without a length says 1e30; CLIP has no more positions than these, T5's are relative.
    most = T5_LENGTHS[family] if encoder.is_t5 else read_config(root, encoder.part).get("max_position_embeddings", 77)
    return min(tokenizer.model_max_length, most)


# -------------------------------------------------------------------------------------------------------------------- cache


def model_fingerprint(root: Path, *, ends: int = 4 * 2**20) -> str:
    """Content of the text encoders and tokenizers of a pipeline folder, as a hexadecimal sha256.

    Of files larger than twice `ends` bytes, the size and both ends are read: full weights take seconds to hash, and another training
    changes all of them. Names and places of the folder, and times, do not count.
    """
    digest = hashlib.sha256()
    for part in _parts(_encoders(root)):
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


def _cache_key(*parts) -> str:
    return hashlib.sha256("\0".join(map(str, [CACHE_FORMAT, *parts])).encode()).hexdigest()


def _read_cache(path: Path, pooled: bool) -> PromptEmbedding | None:
    from safetensors.torch import load_file

    if not path.is_file():
        return None
    try:
        tensors = load_file(path)
        item = PromptEmbedding(tensors["embedding"], tensors["pooled"] if pooled else None)
    except Exception:  # cut short, overwritten, not ours: encoding again is always right
        return None
    whole = item.embedding.ndim == 2 and (item.pooled is None or item.pooled.ndim == 1)
    return item if whole and all(torch.isfinite(tensor).all() for tensor in tensors.values()) else None


def _write_cache(path: Path, item: PromptEmbedding) -> None:
    from safetensors.torch import save

    # Written under another name first: a second process, or a kill, never leaves half a file under the real one.
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".tmp", delete=False) as file:
            temporary = Path(file.name)
            file.write(save({name: tensor.contiguous() for name, tensor in item._asdict().items() if tensor is not None}))
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
    shortest = min(range(len(lengths)), key=lengths.__getitem__)
    tokenizer, length = tokenizers[shortest], lengths[shortest]
    others = " by the shortest of the text encoders" if len(set(lengths)) > 1 else ""
    warned = set()
    for prompt in prompts:
        ids = tokenizer(prompt, truncation=False, verbose=False).input_ids
        if len(ids) <= length or _without_view(prompt) in warned:
            continue
        cut = tokenizer.decode(ids[length - 1 : -1]).strip()
        warnings.warn(
            f"prompt {prompt!r} is cut at {length} tokens{others}; lost is {cut!r}. Wanted a shorter prompt", PromptWarning, stacklevel=3
        )
        warned.add(_without_view(prompt))


def _words(prompt: str) -> list[str]:
    return re.findall(r"[^\W\d_]+", prompt.lower())


def _without_view(prompt: str) -> str:
    """What the user wrote: the direction is our own addition."""
    for view in DIRECTIONS:
        prompt = prompt.removesuffix(f", {view} view")
    return prompt
