import torch

from launch_scripts import convert_zero123


def test_a_refused_file_is_told_of_on_one_line(tmp_path, capsys):
    torch.save({"model.diffusion_model.x": torch.zeros(1)}, tmp_path / "other.ckpt")
    assert convert_zero123.main([str(tmp_path / "other.ckpt"), str(tmp_path / "out")]) == 1
    told = capsys.readouterr()
    assert "other.ckpt is no Zero123 checkpoint" in told.err and told.err.count("\n") == 1 and not told.out
    assert not (tmp_path / "out").exists()


def test_a_converted_file_is_told_of_with_the_setting_that_uses_it(tmp_path, capsys, monkeypatch):
    from functools import partial

    from tests.diffusion.tiny_zero123 import UNET_CONFIG, VAE_CONFIG, original_state_dict, tiny_networks
    from threestudio_pgc.diffusion.zero123 import Zero123Prior

    torch.save(original_state_dict(*tiny_networks()), tmp_path / "zero123.ckpt")
    tiny = partial(convert_zero123.convert_zero123_checkpoint, unet_config=UNET_CONFIG, vae_config=VAE_CONFIG)
    monkeypatch.setattr(convert_zero123, "convert_zero123_checkpoint", tiny)  # the real sizes take gigabytes
    assert convert_zero123.main([str(tmp_path / "zero123.ckpt"), str(tmp_path / "out")]) == 0
    folder = capsys.readouterr().out.strip().split("pretrained_model_name_or_path=")[1]
    assert Zero123Prior.from_pretrained(folder).latent_size == 8
