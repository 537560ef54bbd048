"""How large the published priors are: parameters, counted, and the memory that their weights take.

    python launch_scripts/count_parameters.py

No weights and no network: `architectures/` holds what shapes a network in each model's published config.json, and diffusers' and
transformers' own classes build it on the meta device. Prints two markdown tables: what stays on the device during training, and what is
freed once the prompt or the reference picture is encoded. Activations, and the 3D model's own memory, come on top.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import NamedTuple

import diffusers
import torch
import transformers
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "custom"))

from threestudio_pgc.diffusion.precision import DTYPES, resolve_vae_dtype

ARCHITECTURES = Path(__file__).resolve().parent / "architectures"
STAGES = {"training": "Stays on the device during training", "encoding": "Freed after encoding"}


class Part(NamedTuple):
    """A network, or one half of the VAE.

    buffers: numbers that are no parameters but are stored and loaded like them (SD3's position embedding).
    force_upcast: the loader keeps it in fp32 where the rest is fp16 (a VAE that overflows in half precision).
    """

    name: str
    parameters: int
    buffers: int = 0
    force_upcast: bool = False

    def bytes(self, dtype: torch.dtype) -> int:
        """Memory of the weights of a prior loaded in `dtype`."""
        return (self.parameters + self.buffers) * resolve_vae_dtype("auto", dtype, self.force_upcast, "cuda").itemsize

    def __str__(self) -> str:
        return f"{self.name} {millions(self.parameters)}" + (f" (and {millions(self.buffers)} in buffers)" if self.buffers else "")


def millions(count: int) -> str:
    return f"{count / 1e6:,.1f} M"


def read_architecture(name: str) -> dict:
    """`architectures/<name>.json`."""
    return json.loads((ARCHITECTURES / f"{name}.json").read_text(encoding="utf-8"))


@cache
def build(architecture: str) -> nn.Module:
    """The network of `architectures/<architecture>.json`, on the meta device: shapes only.

    diffusers names the class in `_class_name`, transformers in `architectures`. Zero123's camera projection is a class of neither: a
    linear layer from image embedding and camera to image embedding.
    """
    config = read_architecture(architecture)
    with torch.device("meta"):
        if "architectures" in config:
            model_class = getattr(transformers, config["architectures"][0])
            return model_class(model_class.config_class(**config))
        if config["_class_name"] == "CLIPCameraProjection":
            return nn.Linear(config["embedding_dim"] + config["additional_embeddings"], config["embedding_dim"])
        return getattr(diffusers, config["_class_name"]).from_config(config)


def count(name: str, *modules: nn.Module | None, force_upcast: bool = False) -> Part:
    """What `modules` hold together; None holds nothing. Tied parameters count once, integer buffers (token positions) not at all."""
    held = nn.ModuleList(module for module in modules if module is not None)
    buffers = sum(buffer.numel() for buffer in held.buffers() if buffer.is_floating_point())
    return Part(name, sum(parameter.numel() for parameter in held.parameters()), buffers, force_upcast)


def parts_of(architectures: Mapping[str, str]) -> Iterator[Part]:
    """architectures: what each network is called in the table -> its architecture."""
    for name, architecture in architectures.items():
        network = build(architecture)
        if isinstance(network, diffusers.AutoencoderKL):
            force_upcast = network.config.force_upcast
            yield count(f"{name} encoder", network.encoder, network.quant_conv, force_upcast=force_upcast)
            yield count(f"{name} decoder", network.decoder, network.post_quant_conv, force_upcast=force_upcast)
        else:
            yield count(name, network)


def table(priors: Mapping[str, Mapping], stage: str) -> str:
    """One row for each prior that has a `stage` ("training" or "encoding"). priors: as in `architectures/priors.json`."""
    lines = ["| prior | parts | parameters |" + "".join(f" {name}, GiB |" for name in DTYPES), "|---|---|" + "---:|" * (1 + len(DTYPES))]
    for name, prior in priors.items():
        if stage not in prior:
            continue
        parts = list(parts_of(prior[stage]))
        sizes = [sum(part.bytes(dtype) for part in parts) / 2**30 for dtype in DTYPES.values()]
        numbers = [millions(sum(part.parameters for part in parts)), *(f"{size:.2f}" for size in sizes)]
        lines.append(f"| {name} | {', '.join(map(str, parts))} | {' | '.join(numbers)} |")
    return "\n".join(lines)


def main() -> None:
    priors = read_architecture("priors")
    for stage, title in STAGES.items():
        print(f"## {title}\n\n{table(priors, stage)}\n")
    print("## Models\n")
    for name, prior in priors.items():
        print(f"- {name}: {', '.join(prior['models'])}")


if __name__ == "__main__":
    main()
