import pytest
import torch

from tests.diffusion.tiny_zero123 import UNET_CONFIG, VAE_CONFIG, build_tiny_zero123, original_state_dict, tiny_networks
from threestudio_pgc.diffusion import zero123_checkpoint
from threestudio_pgc.diffusion.prior import PriorError
from threestudio_pgc.diffusion.zero123 import READY, Zero123Prior, encode_reference
from threestudio_pgc.diffusion.zero123_checkpoint import convert_zero123_checkpoint

TINY = {"unet_config": UNET_CONFIG, "vae_config": VAE_CONFIG}


@pytest.fixture(scope="module")
def state():
    with torch.no_grad():
        return original_state_dict(*tiny_networks())


def checkpoint(folder, content):
    path = folder / "zero123.ckpt"
    torch.save(content, path)
    return path


@pytest.mark.parametrize("wrapped", [True, False])
def test_the_converted_model_is_the_one_that_was_saved(tmp_path, state, wrapped):
    extra = {"model_ema.decay": torch.tensor(0.9), "cond_stage_model.model.transformer.text": torch.zeros(3)}
    content = {"state_dict": state | extra, "global_step": 165000} if wrapped else state
    converted = convert_zero123_checkpoint(checkpoint(tmp_path, content), tmp_path / "out", **TINY)
    original = build_tiny_zero123(tmp_path / "original")
    priors = [Zero123Prior.from_pretrained(folder) for folder in (original, converted)]
    for name, network in priors[0].networks().items():
        theirs = priors[1].networks()[name].state_dict()
        assert network.state_dict().keys() == theirs.keys()
        assert all(torch.equal(value, theirs[key]) for key, value in network.state_dict().items())
    torch.testing.assert_close(priors[0].alphas_cumprod, priors[1].alphas_cumprod, rtol=0, atol=0)
    assert [prior.vae.config.scaling_factor for prior in priors] == [0.18215] * 2
    image = torch.rand(32, 32, 3)
    for ours, theirs in zip(*(encode_reference(folder, image) for folder in (original, converted))):
        assert torch.equal(ours, theirs)


def test_every_name_of_the_published_size_finds_its_place():
    """The tiny model has one layer per block; here the names and shapes of the real one, without its numbers."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint, convert_ldm_vae_checkpoint

    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(zero123_checkpoint.UNET_CONFIG)
        vae = AutoencoderKL.from_config(zero123_checkpoint.VAE_CONFIG)
        _, _, encoder, linear = tiny_networks()
        state = original_state_dict(unet, vae, encoder, linear)
    assert sum(parameter.numel() for parameter in unet.parameters()) == 859_532_484
    assert sum(parameter.numel() for parameter in vae.parameters()) == 83_653_863
    for network, convert in ((unet, convert_ldm_unet_checkpoint), (vae, convert_ldm_vae_checkpoint)):
        found = {name: value.shape for name, value in convert(dict(state), config=dict(network.config)).items()}
        assert found == {name: value.shape for name, value in network.state_dict().items()}


class Trainer:
    """Stands for what a trainer pickles beside the weights."""


def test_a_file_of_more_than_tensors_is_refused(tmp_path, state):
    path = checkpoint(tmp_path, {"state_dict": state, "callbacks": Trainer()})
    with pytest.raises(PriorError, match="zero123.ckpt holds more than tensors and plain containers .*Trainer.*can run code") as caught:
        convert_zero123_checkpoint(path, tmp_path / "out", **TINY)
    assert all(name in str(caught.value) for name in READY) and "weights_only=False" not in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("missing", ["model.diffusion_model.", "first_stage_model.", "cc_projection.", "cond_stage_model.model.visual."])
def test_another_models_checkpoint_is_refused(tmp_path, state, missing):
    path = checkpoint(tmp_path, {name: value for name, value in state.items() if not name.startswith(missing)})
    with pytest.raises(PriorError, match=f"is no Zero123 checkpoint: it has no tensors {missing}"):
        convert_zero123_checkpoint(path, tmp_path / "out", **TINY)


@pytest.mark.parametrize(
    "lost, message",
    [
        ("model.diffusion_model.out.2.weight", "not those of Zero123's UNet2DConditionModel: .*conv_out.weight"),
        ("first_stage_model.quant_conv.weight", "not those of Zero123's AutoencoderKL: .*quant_conv.weight"),
        ("cond_stage_model.model.visual.ln_post.bias", "not those of a CLIP image encoder: .*post_layernorm.bias"),
        ("cond_stage_model.model.visual.proj", "not those of a CLIP image encoder: 'proj'"),
        ("cc_projection.bias", "no tensor cc_projection.bias"),
    ],
)
def test_a_file_with_a_tensor_missing_is_refused_and_leaves_nothing(tmp_path, state, lost, message):
    path = checkpoint(tmp_path, {name: value for name, value in state.items() if name != lost})
    with pytest.raises(PriorError, match=message):
        convert_zero123_checkpoint(path, tmp_path / "out", **TINY)
    assert not (tmp_path / "out").exists()


def test_missing_damaged_and_foreign_files_are_refused(tmp_path):
    with pytest.raises(PriorError, match="checkpoint: no file .*none.ckpt"):
        convert_zero123_checkpoint(tmp_path / "none.ckpt", tmp_path / "out")
    (tmp_path / "bad.ckpt").write_bytes(b"")
    with pytest.raises(PriorError, match="bad.ckpt cannot be read"):
        convert_zero123_checkpoint(tmp_path / "bad.ckpt", tmp_path / "out")
    with pytest.raises(PriorError, match="holds a Tensor, wanted a dict of tensors"):
        convert_zero123_checkpoint(checkpoint(tmp_path, torch.zeros(1)), tmp_path / "out")


def test_a_folder_that_holds_something_is_left_alone(tmp_path, state):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(PriorError, match="out_folder: .* is there already"):
        convert_zero123_checkpoint(checkpoint(tmp_path, state), tmp_path / "out", **TINY)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine.txt"]
