"""Parameter counts of the published priors, against numbers known by hand and the sizes of the published weight files."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from launch_scripts.count_parameters import ARCHITECTURES, Part, build, count, parts_of, read_architecture, table

ROOT = Path(__file__).resolve().parents[2]
PRIORS = read_architecture("priors")
FILES = sorted({file for prior in PRIORS.values() for stage in ("training", "encoding") for file in prior.get(stage, {}).values()})


def size(file):
    """Parameters and buffers of a file in `architectures/`."""
    part = count(file, build(file))
    return part.parameters, part.buffers


def rows(printed):
    return [line.split(" | ")[0].removeprefix("| ") for line in printed.splitlines()[2:]]


def gib(priors, name, stage="training"):
    """The printed memory of one prior: fp32, fp16, bf16."""
    line = table({name: priors[name]}, stage).splitlines()[2]
    return [float(number) for number in line.rstrip(" |").split(" | ")[-3:]]


def test_no_prior_is_a_table_without_rows():
    assert len(table({}, "training").splitlines()) == 2
    assert rows(table({"only trained": {"training": {}}}, "encoding")) == []


def test_nothing_counts_nothing():
    assert count("nothing") == count("nothing", None) == Part("nothing", 0)


def test_networks_are_built_without_memory():
    assert {parameter.device.type for parameter in build("transformer-flux-dev").parameters()} == {"meta"}


def test_every_architecture_is_used_and_every_name_is_a_file():
    assert sorted(path.stem for path in ARCHITECTURES.glob("*.json")) == sorted([*FILES, "priors"])


def test_linear_layer_by_hand():
    assert size("camera-projection") == (772 * 768 + 768, 0)


def test_sd_vae_by_hand():
    """Published: 83.7 M, of it 34.2 M encoder and 49.5 M decoder. 16 channels widen the two outermost latent convolutions."""
    encoder, decoder = parts_of({"VAE": "vae-4-channels"})
    assert (encoder.name, encoder.parameters) == ("VAE encoder", 34_163_592 + (8 * 8 + 8))
    assert (decoder.name, decoder.parameters) == ("VAE decoder", 49_490_179 + (4 * 4 + 4))
    assert size("vae-4-channels") == size("vae-4-channels-fp16-fix") == (encoder.parameters + decoder.parameters, 0) == (83_653_863, 0)
    wide_encoder, wide_decoder = parts_of({"VAE": "vae-16-channels"})
    assert wide_encoder.parameters == 34_163_592 + 24 * (512 * 9 + 1)
    assert wide_decoder.parameters == 49_490_179 + 12 * 512 * 9


def test_zero123_is_sd15_with_four_more_input_channels():
    assert size("unet-zero123")[0] - size("unet-sd15")[0] == 4 * 320 * 9


def test_sd3_stores_its_position_embedding_beside_its_parameters():
    assert size("transformer-sd3-medium")[1] == 192 * 192 * 1536
    assert size("transformer-sd35-medium")[1] == 384 * 384 * 1536


def test_clip_text_with_and_without_its_projection():
    assert size("text-clip-l-projected")[0] - size("text-clip-l")[0] == 768 * 768


def test_token_positions_are_no_weights():
    assert any(not buffer.is_floating_point() for buffer in build("text-clip-l").buffers())
    assert size("text-clip-l")[1] == 0


@pytest.mark.parametrize(
    ("file", "published"),
    [
        ("unet-sd15", 859.5e6),
        ("unet-sdxl", 2567e6),
        ("vae-4-channels", 83.7e6),
        ("transformer-sd3-medium", 2.03e9),
        ("transformer-flux-dev", 11.9e9),
        ("text-clip-l", 123e6),
        ("text-openclip-h", 340e6),
        ("text-openclip-g", 695e6),
        ("text-t5-xxl", 4.76e9),
        ("image-clip-l", 304e6),
    ],
)
def test_parameters_are_the_published_ones_as_rounded_there(file, published):
    assert size(file)[0] == pytest.approx(published, rel=1.2e-3)


@pytest.mark.parametrize(
    ("file", "file_bytes"), [("camera-projection", 1_187_512), ("controlnet-sd15", 722_601_100), ("text-clip-l", 246_144_152)]
)
def test_a_published_half_precision_file_is_two_bytes_each_and_a_header(file, file_bytes):
    assert 0 < file_bytes - 2 * sum(size(file)) < 50_000


@pytest.mark.parametrize(
    ("file", "file_bytes"),
    [
        ("vae-4-channels", 167e6),
        ("vae-16-channels", 168e6),
        ("unet-sd21", 1.73e9),
        ("unet-zero123", 1.72e9),
        ("controlnet-sd21", 729e6),
        ("controlnet-sdxl", 2.5e9),
        ("transformer-sd3-medium", 4.17e9),
        ("transformer-sd35-medium", 4.94e9),
        ("text-openclip-h", 1.36e9 / 2),
        ("text-t5-xxl", 9.52e9),
        ("image-clip-l", 608e6),
    ],
)
def test_two_bytes_each_fill_the_file_that_the_hub_lists(file, file_bytes):
    """The hub shows three digits (OpenCLIP-H's file is in single precision)."""
    assert 2 * sum(size(file)) == pytest.approx(file_bytes, rel=2.5e-3)


def test_memory_of_a_part_follows_its_precision():
    vae = Part("VAE", 100, buffers=20, force_upcast=True)
    assert [vae.bytes(dtype) for dtype in (torch.float32, torch.float16, torch.bfloat16)] == [480, 480, 240]
    assert vae._replace(force_upcast=False).bytes(torch.float16) == 240


def test_only_the_fixed_vae_is_in_half_precision():
    fp32, fp16, bf16 = gib(PRIORS, "SDXL, fp16-fix VAE")
    assert fp32 == pytest.approx(2 * bf16, abs=0.02) and fp16 == bf16
    assert gib(PRIORS, "SDXL")[1] - fp16 == pytest.approx(2 * 83_653_863 / 2**30, abs=0.02)


def test_a_controlnet_adds_its_own_memory():
    one, two = gib(PRIORS, "SDXL, fp16-fix VAE, depth"), gib(PRIORS, "SDXL, fp16-fix VAE, depth and normals")
    assert two[1] - one[1] == pytest.approx(2 * 1_251_014_160 / 2**30, abs=0.02)


def test_the_command_prints_a_row_per_prior_without_a_network():
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "launch_scripts/count_parameters.py"], cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    training, encoding, models = (block.strip().split("\n\n", 1)[1] for block in done.stdout.split("## ")[1:])
    assert rows(training) == list(PRIORS)
    assert rows(encoding) == [name for name, prior in PRIORS.items() if "encoding" in prior]
    assert [line.split(":")[0].removeprefix("- ") for line in models.splitlines()] == list(PRIORS)
    assert "| SDXL | VAE encoder 34.2 M, VAE decoder 49.5 M, U-Net 2,567.5 M | 2,651.1 M | 9.88 | 5.09 | 4.94 |" in training
