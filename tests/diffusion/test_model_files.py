import json
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.diffusion.tiny import build_tiny_sdxl, random_conditioning
from threestudio_pgc.diffusion import model_files
from threestudio_pgc.diffusion.families import load_prior
from threestudio_pgc.diffusion.model_files import MODEL, SCHEDULER, TEXT_ENCODERS, UNET, VAE, choose_variant, find_model, stored_parameters
from threestudio_pgc.diffusion.prior import PriorError
from threestudio_pgc.diffusion.sdxl import SDXLPrior

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def folder(tiny_sdxl, tmp_path):
    """A copy to damage."""
    return shutil.copytree(tiny_sdxl, tmp_path / "model")


@pytest.fixture
def empty_hub_cache(tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


# ----------------------------------------------------------------------------------------------------------------- folders


def test_a_local_folder_makes_no_network_call(tiny_sdxl, monkeypatch):
    import socket

    calls = []
    monkeypatch.setattr(socket.socket, "connect", lambda self, address: calls.append(address))
    monkeypatch.setattr(socket, "getaddrinfo", lambda *address, **_: calls.append(address))
    SDXLPrior.from_pretrained(tiny_sdxl)
    assert calls == []


def test_a_missing_folder(empty_hub_cache):
    with pytest.raises(PriorError, match="pretrained_model_name_or_path: no folder '/no/such/model'"):
        SDXLPrior.from_pretrained("/no/such/model")
    with pytest.raises(PriorError, match="no bundled model 'builtin:nothing'; bundled are"):
        SDXLPrior.from_pretrained("builtin:nothing")


def test_an_empty_folder(tmp_path):
    with pytest.raises(PriorError, match="it has no model_index.json; found nothing"):
        SDXLPrior.from_pretrained(tmp_path)


def test_a_folder_without_an_index_or_a_part(folder):
    shutil.rmtree(folder / "vae")
    with pytest.raises(PriorError, match=f"no folder 'vae' in {folder}; found .*unet"):
        SDXLPrior.from_pretrained(folder)
    (folder / "model_index.json").unlink()
    with pytest.raises(PriorError, match="no model_index.json; found scheduler, text_encoder"):
        SDXLPrior.from_pretrained(folder)


def test_a_part_without_its_configuration(folder):
    (folder / "scheduler" / "scheduler_config.json").unlink()
    with pytest.raises(PriorError, match="no scheduler_config.json in .*; found nothing"):
        SDXLPrior.from_pretrained(folder)


def test_a_configuration_that_is_no_json(folder):
    (folder / "scheduler" / "scheduler_config.json").write_text("{")
    with pytest.raises(PriorError, match="scheduler_config.json cannot be read"):
        SDXLPrior.from_pretrained(folder)


def test_pickled_weights_are_refused(folder):
    (folder / "unet" / WEIGHTS).rename(folder / "unet" / "diffusion_pytorch_model.bin")
    with pytest.raises(PriorError, match="wanted diffusion_pytorch_model.safetensors in .*unet; diffusion_pytorch_model.bin can run code"):
        SDXLPrior.from_pretrained(folder)


def test_another_pipeline_is_refused(folder):
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionPipeline"}))
    with pytest.raises(PriorError, match="is a StableDiffusionPipeline, wanted a StableDiffusionXLPipeline"):
        SDXLPrior.from_pretrained(folder)


def test_damaged_weights(folder):
    path = folder / "unet" / WEIGHTS
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(PriorError, match=f"the weights in {folder}/unet cannot be loaded"):
        SDXLPrior.from_pretrained(folder)


@pytest.mark.parametrize("accelerate", [True, False])
def test_weights_that_lack_a_tensor(folder, monkeypatch, accelerate):
    """Diffusers refuses them itself where accelerate is there, and leaves them random where it is not."""
    if not accelerate:
        monkeypatch.setattr(model_files, "find_spec", lambda _: None)
    path = folder / "unet" / WEIGHTS
    tensors = load_file(path)
    del tensors["conv_in.weight"]
    save_file(tensors, path)
    with pytest.raises(PriorError, match="conv_in.weight"):
        SDXLPrior.from_pretrained(folder)


def test_another_vae(tiny_sdxl, tmp_path):
    """A VAE of its own, in a folder of its own or as part of another pipeline."""
    other = build_tiny_sdxl(tmp_path / "other", seed=5, scaling_factor=0.5)
    alone = shutil.copytree(other / "vae", tmp_path / "alone")
    image = torch.rand(1, 32, 32, 3)
    expected = SDXLPrior.from_pretrained(other).encode(image)
    for vae in (alone, other, str(alone)):
        assert torch.equal(SDXLPrior.from_pretrained(tiny_sdxl, vae=vae).encode(image), expected)
    assert not torch.equal(SDXLPrior.from_pretrained(tiny_sdxl).encode(image), expected)


def test_another_vae_spares_the_pipelines_own(folder, tmp_path):
    alone = shutil.copytree(folder / "vae", tmp_path / "alone")
    shutil.rmtree(folder / "vae")
    assert SDXLPrior.from_pretrained(folder, vae=alone).latent_channels == 4


def test_another_unet(tiny_sdxl, tmp_path, monkeypatch):
    """A fine-tune of its own, in a folder of its own, as part of another pipeline, or bundled."""
    other = build_tiny_sdxl(tmp_path / "other", seed=5)
    alone = shutil.copytree(other / "unet", tmp_path / "alone")
    monkeypatch.setattr(model_files, "ASSETS", tmp_path)
    asked = torch.randn(2, 4, 8, 8), torch.tensor([100, 700]), random_conditioning(2)
    expected = SDXLPrior.from_pretrained(other).predict_noise(*asked).cond
    for unet in (alone, other, str(alone), "builtin:alone", "builtin:other"):
        assert torch.equal(SDXLPrior.from_pretrained(tiny_sdxl, unet=unet).predict_noise(*asked).cond, expected)
    assert not torch.equal(SDXLPrior.from_pretrained(tiny_sdxl).predict_noise(*asked).cond, expected)


def test_another_unet_spares_the_pipelines_own(folder, tmp_path):
    alone = shutil.move(folder / "unet", tmp_path / "alone")
    prior = SDXLPrior.from_pretrained(folder, unet=alone)
    assert prior.memory_note() == SDXLPrior.from_pretrained(folder, unet=alone, sharing=prior).memory_note()
    with pytest.raises(PriorError, match="pretrained_model_name_or_path: no folder 'unet'"):
        SDXLPrior.from_pretrained(folder)


def test_another_unet_is_counted_in_place_of_the_pipelines_own(tiny_sdxl, tmp_path, monkeypatch):
    alone = shutil.copytree(tiny_sdxl / "unet", tmp_path / "alone")
    vae, unet = (stored_parameters(path, [WEIGHTS]) for path in (tiny_sdxl / "vae", alone))
    monkeypatch.setattr(model_files, "_free_memory", lambda _: 4 * (vae + unet))
    SDXLPrior.from_pretrained(tiny_sdxl, unet=alone)
    monkeypatch.setattr(model_files, "_free_memory", lambda _: 4 * (vae + unet) - 1)
    with pytest.raises(PriorError, match="weights of VAE, denoising network and ControlNets take"):
        SDXLPrior.from_pretrained(tiny_sdxl, unet=alone)


def test_a_unet_that_does_not_fit_is_refused_by_key_and_name(tiny_models, tiny_controlnet, empty_hub_cache):
    sdxl, sd, sd3, zero123 = (tiny_models[family][0] for family in ("sdxl", "sd", "sd3", "zero123"))
    for model, unet, message in (
        (sdxl, "builtin:nothing", "^unet_name_or_path: no bundled model 'builtin:nothing'"),
        (sdxl, tiny_controlnet, f"^unet_name_or_path: {tiny_controlnet} holds a ControlNetModel, wanted a UNet2DConditionModel"),
        (sdxl, sd3 / "transformer", "^unet_name_or_path: .*transformer holds a SD3Transformer2DModel, wanted a UNet2DConditionModel"),
        (sdxl, sd3, "^unet_name_or_path: no config.json in"),
        (sd3, sdxl / "unet", "^unet_name_or_path: .*unet holds a UNet2DConditionModel, wanted a SD3Transformer2DModel"),
        (sdxl, sd, f"wanted 'text_time': this is no SDXL model; the U-Net is that of unet_name_or_path, '{sd}'"),
        (sd, zero123, f"takes 8 and gives 4; wanted 4 and 4; the U-Net is that of unet_name_or_path, '{zero123}'"),
    ):
        with pytest.raises(PriorError, match=message):
            load_prior(model, unet=unet)


def test_a_unet_that_was_made_for_another_text_encoder_says_so(tiny_models):
    prior = load_prior(tiny_models["sd"][0])
    with pytest.raises(ValueError, match="conditioning: found embeddings 24 numbers wide, wanted 8 for this U-Net"):
        prior.predict_noise(torch.randn(1, 4, 8, 8), torch.tensor([10]), random_conditioning(1, family="sdxl"))


def test_a_unets_own_name_says_that_it_is_distilled(tiny_sdxl, tmp_path):
    turbo = shutil.copytree(tiny_sdxl / "unet", tmp_path / "some-turbo")
    assert SDXLPrior.from_pretrained(tiny_sdxl, unet=turbo).guidance_distilled == "its name says 'turbo'"
    model = shutil.copytree(tiny_sdxl, tmp_path / "lightning")
    assert SDXLPrior.from_pretrained(model, unet=tiny_sdxl).guidance_distilled is None
    assert SDXLPrior.from_pretrained(model).guidance_distilled == "its name says 'lightning'"


def test_wrong_model_in_the_right_place(tiny_sdxl, tiny_controlnet, tmp_path):
    with pytest.raises(PriorError, match="vae_name_or_path: .* holds a ControlNetModel, wanted a AutoencoderKL"):
        SDXLPrior.from_pretrained(tiny_sdxl, vae=tiny_controlnet)
    with pytest.raises(PriorError, match="controlnet_name_or_path: no config.json"):
        SDXLPrior.from_pretrained(tiny_sdxl, controlnet=tmp_path)


# ---------------------------------------------------------------------------------------------------------------- variants


@pytest.mark.parametrize(
    "names, half, expected",
    [
        ([WEIGHTS], True, None),
        ([WEIGHTS], False, None),
        (["diffusion_pytorch_model.fp16.safetensors"], False, "fp16"),
        ([WEIGHTS, "diffusion_pytorch_model.fp16.safetensors"], True, "fp16"),
        ([WEIGHTS, "diffusion_pytorch_model.fp16.safetensors"], False, None),
        (["diffusion_pytorch_model-00001-of-00002.safetensors"], True, None),
        (["diffusion_pytorch_model.fp16-00001-of-00002.safetensors"], False, "fp16"),
    ],
)
def test_choose_variant(names, half, expected):
    assert choose_variant(names, "diffusion_pytorch_model", half) == expected


@pytest.mark.parametrize("names", [[], ["diffusion_pytorch_model.bin"], ["other.safetensors"], ["diffusion_pytorch_model.ema.safetensors"]])
def test_no_variant(names):
    with pytest.raises(LookupError):
        choose_variant(names, "diffusion_pytorch_model", half=True)


def test_a_folder_with_fp16_files_only_loads_in_fp32(tmp_path):
    prior = SDXLPrior.from_pretrained(build_tiny_sdxl(tmp_path / "m", variant="fp16"))
    assert prior.dtype == prior.vae_dtype == torch.float32


# ----------------------------------------------------------------------------------------------------------------- the hub


def test_an_offline_id_says_what_to_do(empty_hub_cache):
    with pytest.raises(PriorError) as caught:
        SDXLPrior.from_pretrained("nobody/never-downloaded")
    for part in ("pretrained_model_name_or_path", "'nobody/never-downloaded'", "hub could not be reached", "local folder"):
        assert part in str(caught.value)


def test_each_key_is_named(tiny_sdxl, empty_hub_cache):
    for argument, key in (("vae", "vae_name_or_path"), ("unet", "unet_name_or_path"), ("controlnet", "controlnet_name_or_path")):
        with pytest.raises(PriorError, match=f"^{key}: 'nobody/nothing' is neither"):
            SDXLPrior.from_pretrained(tiny_sdxl, **{argument: "nobody/nothing"})


@pytest.mark.parametrize("name", ["not an id", "a/b/c", "../nowhere", ""])
def test_what_is_no_id_never_asks_the_hub(name, empty_hub_cache, monkeypatch):
    monkeypatch.setattr(model_files, "_download", lambda *_: pytest.fail("asked the hub"))
    with pytest.raises(PriorError):
        find_model(name, "key", [UNET])


def test_a_cached_id_needs_no_network(tiny_sdxl, empty_hub_cache):
    repo = empty_hub_cache / "models--someone--tiny"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text("c0ffee")
    shutil.copytree(tiny_sdxl, repo / "snapshots" / "c0ffee")
    assert SDXLPrior.from_pretrained("someone/tiny").latent_channels == 4
    # What an earlier run left out has to be fetched, which fails here.
    shutil.rmtree(repo / "snapshots" / "c0ffee" / "vae")
    with pytest.raises(PriorError, match="could not be reached"):
        SDXLPrior.from_pretrained("someone/tiny")


SERVE_AND_FIND = textwrap.dedent(
    '''
    """A hub of one repository on this machine, and find_model asking it: prints the folder and the files that were asked for."""
    import hashlib, http.server, json, os, sys, threading
    from pathlib import Path

    root = Path(sys.argv[1])
    asked = []

    class Hub(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            path = self.path.split("?")[0]
            files = [str(f.relative_to(root)) for f in root.rglob("*") if f.is_file()]
            if path.startswith("/api/models/someone/tiny/tree"):
                body = json.dumps([{"type": "file", "path": f, "size": (root / f).stat().st_size, "oid": "0"} for f in files]).encode()
                return self.answer(200, body, {"Content-Type": "application/json"})
            if path.startswith("/api/models/someone/tiny"):
                info = {"id": "someone/tiny", "sha": "c0ffee" + "0" * 34, "siblings": [{"rfilename": f} for f in files]}
                return self.answer(200, json.dumps(info).encode(), {"Content-Type": "application/json"})
            prefix = "/someone/tiny/resolve/"
            name = path.removeprefix(prefix).split("/", 1)[-1]
            if path.startswith(prefix) and name in files:
                if self.command == "GET":
                    asked.append(name)
                body = (root / name).read_bytes()
                tag = hashlib.sha256(body).hexdigest()
                return self.answer(200, body, {"ETag": f'"{tag}"', "X-Repo-Commit": "c0ffee" + "0" * 34})
            return self.answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})

        def answer(self, code, body, headers):
            self.send_response(code)
            for key, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(key, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        do_HEAD = do_GET

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    os.environ["HF_ENDPOINT"] = f"http://127.0.0.1:{server.server_port}"

    from threestudio_pgc.diffusion.model_files import SCHEDULER, UNET, find_model
    from threestudio_pgc.diffusion.prior import PriorError

    folder = find_model("someone/tiny", "key", [UNET, SCHEDULER], half=True)
    first = list(asked)
    again = find_model("someone/tiny", "key", [UNET, SCHEDULER], half=True)
    try:
        find_model("someone/else", "key", [UNET])
    except PriorError as error:
        unknown = str(error)
    print(json.dumps({"folder": str(folder), "asked": sorted(first), "same": folder == again and asked == first, "unknown": unknown}))
    '''
)


@pytest.mark.parametrize("half, weights", [(False, ["x.safetensors"]), (True, ["x.fp16-1-of-2.safetensors", "x.fp16-2-of-2.safetensors"])])
def test_wanted_files(half, weights):
    part = model_files.Part("unet", "config.json", "x")
    sharded = ["x.fp16-1-of-2.safetensors", "x.fp16-2-of-2.safetensors", "x.safetensors.index.fp16.json"]
    names = ["README.md", "model_index.json", "x.safetensors", "vae/config.json", "unet/onnx/x.safetensors"]
    names += ["unet/" + name for name in ["config.json", "x.safetensors", "x.bin", "x.msgpack", *sharded]]
    wanted = ["model_index.json", "unet/config.json", "unet/x.safetensors.index.fp16.json", *("unet/" + name for name in weights)]
    assert model_files._wanted_files(names, [part], half) == wanted


def test_only_what_is_wanted_is_downloaded(tiny_sdxl, tmp_path):
    source = shutil.copytree(tiny_sdxl, tmp_path / "source")
    shutil.copy(source / "unet" / WEIGHTS, source / "unet" / "diffusion_pytorch_model.fp16.safetensors")
    (source / "unet" / "diffusion_flax_model.msgpack").write_bytes(b"not wanted")
    script = tmp_path / "hub.py"
    script.write_text(SERVE_AND_FIND)
    package = Path(model_files.__file__).parents[2]
    environment = {name: value for name, value in os.environ.items() if "proxy" not in name.lower() and name != "HF_HUB_OFFLINE"}
    environment |= {"HF_HOME": str(tmp_path / "home"), "PYTHONPATH": str(package), "HF_HUB_DISABLE_XET": "1"}
    command = [sys.executable, str(script), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads(done.stdout.splitlines()[-1])
    weights = "diffusion_pytorch_model.fp16.safetensors"
    assert result["asked"] == ["model_index.json", "scheduler/scheduler_config.json", "unet/config.json", f"unet/{weights}"]
    assert result["same"]
    assert Path(result["folder"], "unet", weights).is_file()
    assert "neither a folder nor a hub model 'someone/else'" in result["unknown"]


def test_parts_name_the_files_of_a_diffusers_folder(tiny_sdxl):
    for part in (UNET, VAE, SCHEDULER, *TEXT_ENCODERS[:2]):
        model_files.check_part(tiny_sdxl, part, "key")
    model_files.check_part(tiny_sdxl / "vae", MODEL, "key")
