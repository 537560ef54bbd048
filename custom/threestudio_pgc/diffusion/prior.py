"""What a latent prior is, and what all of them share: finding a model, loading it, choosing its precision, saying what is wrong.

A model is named by a local folder in diffusers layout, by `builtin:<name>` (a folder of this package's `assets/`) or by a hub id. All
three end as a local folder: a folder never causes a network call, a hub id only when its files are not in the local hub cache yet.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

ASSETS = Path(__file__).resolve().parent.parent / "assets"
BUILTIN = "builtin:"
HUB_TIMEOUT_S = 10
MODEL_KEY = "pretrained_model_name_or_path"  # the configuration key of the main model, as errors name it

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
ATTENTION_MODES = ("sdpa", "sliced", "xformers")


class PriorError(RuntimeError):
    """A prior cannot be had or cannot be used as asked; the message names the config key, what was found and what is wanted."""


@dataclass
class Conditioning:
    """Text conditioning of B views for both halves of classifier-free guidance.

    cond, uncond (B, L, D); pooled_cond, pooled_uncond (B, P) or None; time_ids (B, 6) or None: original height, width, crop top,
    left, target height, width in pixels (None: the prior fills in its own image size, uncropped).
    """

    cond: Tensor
    uncond: Tensor
    pooled_cond: Tensor | None = None
    pooled_uncond: Tensor | None = None
    time_ids: Tensor | None = None

    def __len__(self) -> int:
        return self.cond.shape[0]

    def to(self, *args, **kwargs) -> Conditioning:
        """As `Tensor.to`, for every field."""
        values = (getattr(self, field.name) for field in fields(self))
        return Conditioning(*(value if value is None else value.to(*args, **kwargs) for value in values))


@dataclass
class NoisePrediction:
    """Predicted noise eps(z_t; y, t) and eps(z_t; t), each (B, C, h, w), float32 (float64 where the prior is)."""

    cond: Tensor
    uncond: Tensor


@runtime_checkable
class LatentPrior(Protocol):
    """A frozen latent diffusion model, as the guidance sees it. All tensors it returns are float32 (float64 where the prior is)."""

    num_train_timesteps: int
    latent_channels: int
    image_size: int  # height = width of the image the encoder takes, pixels
    latent_size: int  # height = width of the latents
    device: torch.device
    dtype: torch.dtype

    @property
    def alphas_cumprod(self) -> Tensor:
        """(T,): abar_t, the share of the signal's variance left at timestep t."""

    def alphas_cumprod_at(self, t: Tensor) -> Tensor:
        """t (B,) -> abar_t (B, 1, 1, 1)."""

    def encode(self, image: Tensor) -> Tensor:
        """(B, H, W, 3) in [0, 1] -> (B, C, h, w), differentiable."""

    def decode(self, latents: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, H, W, 3) in [0, 1]."""

    def add_noise(self, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """z_t = sqrt(abar_t) z + sqrt(1 - abar_t) eps."""

    def predict_noise(self, z_t: Tensor, t: Tensor, conditioning: Conditioning, control=None) -> NoisePrediction:
        """z_t (B, C, h, w), t (B,) integers -> both noise predictions, from one batch, without a graph."""


# ---------------------------------------------------------------------------------------------------------------- precision


def resolve_dtype(name: str | torch.dtype, device: torch.device | str, key: str = "dtype") -> torch.dtype:
    """`auto` is fp16 on CUDA and fp32 elsewhere; `fp32`, `fp16`, `bf16` are themselves. `key` is named in errors.

    Raises PriorError for any other name, and for fp16 on a CPU.
    """
    device = torch.device(device)
    if name == "auto":
        return torch.float16 if device.type == "cuda" else torch.float32
    dtype = name if isinstance(name, torch.dtype) else DTYPES.get(name)
    if dtype is None:
        raise PriorError(f"{key}: found {name!r}, wanted one of auto, {', '.join(DTYPES)}")
    if dtype == torch.float16 and device.type == "cpu":
        raise PriorError(
            f"{key}: fp16 on a CPU is refused: CPUs compute half precision by emulation, slower than fp32, and the VAE's gradients "
            "overflow. Wanted fp32, bf16 or auto, or a CUDA device"
        )
    return dtype


def without_autocast(device: torch.device):
    """Context in which a surrounding mixed-precision trainer does not change the precision the prior was loaded in.

    Lightning's 16-mixed would otherwise run an upcast VAE in half precision again, which overflows.
    """
    if device.type == "meta":
        return contextlib.nullcontext()
    return torch.autocast(device.type, enabled=False)


def freeze(module: nn.Module) -> nn.Module:
    """Evaluation mode and no parameter gradients. Gradients to the input still flow."""
    return module.eval().requires_grad_(False)


def set_attention(module: nn.Module, mode: str) -> None:
    """`sdpa`: torch's fused attention (the default of diffusers); `sliced`: one head at a time, less memory; `xformers`.

    Raises PriorError for another mode, and where xformers is asked for and missing.
    """
    if mode not in ATTENTION_MODES:
        raise PriorError(f"attention: found {mode!r}, wanted one of {', '.join(ATTENTION_MODES)}")
    if mode == "sliced":
        module.set_attention_slice("max")
    elif mode == "xformers":
        try:
            module.enable_xformers_memory_efficient_attention()
        except (ImportError, ModuleNotFoundError, ValueError) as error:
            raise PriorError(f"attention: xformers cannot be used here ({error}); wanted sdpa or sliced") from error


class ParameterMemory(NamedTuple):
    count: int
    bytes: int
    by_dtype: dict[str, int]  # parameters per precision


def parameter_memory(module: nn.Module) -> ParameterMemory:
    """Parameters of a module, counted by precision, and the bytes they take."""
    count, size, by_dtype = 0, 0, {}
    for parameter in module.parameters():
        count += parameter.numel()
        size += parameter.numel() * parameter.element_size()
        name = str(parameter.dtype).removeprefix("torch.")
        by_dtype[name] = by_dtype.get(name, 0) + parameter.numel()
    return ParameterMemory(count, size, by_dtype)


def memory_note(modules: dict[str, nn.Module]) -> str:
    """One line: parameters and memory of each named module and of all together."""
    memories = {name: parameter_memory(module) for name, module in modules.items()}
    parts = [
        f"{name} {memory.count / 1e6:.1f} M ({', '.join(memory.by_dtype)}, {memory.bytes / 2**20:.0f} MiB)"
        for name, memory in memories.items()
    ]
    total = sum(memory.bytes for memory in memories.values())
    return f"frozen parameters: {'; '.join(parts)}; together {total / 2**20:.0f} MiB"


# ------------------------------------------------------------------------------------------------------------------ finding


class Part(NamedTuple):
    """A component of a pipeline: where it lies and what its files are called. `stem` None: configuration files only."""

    subfolder: str  # "" for a repository that is one model
    config: str
    stem: str | None


UNET = Part("unet", "config.json", "diffusion_pytorch_model")
VAE = Part("vae", "config.json", "diffusion_pytorch_model")
SCHEDULER = Part("scheduler", "scheduler_config.json", None)
MODEL = Part("", "config.json", "diffusion_pytorch_model")
TEXT_ENCODERS = (Part("text_encoder", "config.json", "model"), Part("text_encoder_2", "config.json", "model"))
TOKENIZERS = (Part("tokenizer", "tokenizer_config.json", None), Part("tokenizer_2", "tokenizer_config.json", None))
PIPELINE_INDEX = "model_index.json"


def choose_variant(names: Iterable[str], stem: str, half: bool) -> str | None:
    """Which weights to read among file names: "fp16" where they are there and fit (or are all there is), else None (full).

    Raises LookupError where no safetensors weights are named.
    """
    weights = [name for name in names if name.startswith(stem) and name.endswith(".safetensors")]
    has_half = any(".fp16" in name for name in weights)
    has_full = any(re.fullmatch(re.escape(stem) + r"(-\d+-of-\d+)?\.safetensors", name) for name in weights)
    if not has_half and not has_full:
        raise LookupError(stem)
    return "fp16" if has_half and (half or not has_full) else None


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
    cached = _cached_snapshot(name)
    if cached is not None:
        # A cached snapshot may hold other parts than these: an earlier run may have wanted only the text encoders.
        with contextlib.suppress(PriorError):
            return _check_folder(cached, key, parts, pipeline)
    return _check_folder(_download(name, key, parts, half), key, parts, pipeline)


def _check_folder(folder: Path, key: str, parts: Sequence[Part], pipeline: bool) -> Path:
    if pipeline and not (folder / PIPELINE_INDEX).is_file():
        raise PriorError(
            f"{key}: {folder} is no diffusers pipeline: it has no {PIPELINE_INDEX}; found {_listing(_names_in(folder))}"
        )
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
            fp16 = choose_variant(inside, part.stem, half) == "fp16"
            weights = [name for name in inside if name.startswith(part.stem) and name.endswith(".safetensors")]
            wanted += [prefix + name for name in weights if (".fp16" in name) == fp16]
    return wanted


# ------------------------------------------------------------------------------------------------------------------ loading


def read_config(root: Path, part: Part) -> dict:
    """The configuration of a component, as a plain dict. Raises PriorError where the file is not JSON."""
    path = root / part.subfolder / part.config
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise PriorError(f"{path} cannot be read: {error}") from error


def load_module(model_class: type, root: Path, part: Part, key: str, dtype: torch.dtype) -> nn.Module:
    """A diffusers model from a folder that `find_model` returned, in `dtype`, on the CPU, from safetensors only.

    Raises PriorError where the weights cannot be read or do not fill the architecture of config.json.
    """
    folder = root / part.subfolder
    variant = choose_variant(_names_in(folder), part.stem, half=dtype != torch.float32)
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
        raise PriorError(
            f"{key}: the weights in {folder} do not fill its config.json: {len(missing)} tensors missing, first {missing[0]}"
        )
    return module
