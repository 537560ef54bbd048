import pytest
import torch
from safetensors.torch import save_file

from threestudio_pgc.pixelgrad.linear_map import (
    PAPER_DECODER,
    PAPER_ENCODER,
    PAPER_MATRICES,
    LinearMap,
    find_linear_map,
    linear_map_tensors,
    load_linear_map,
    shrink,
    tell_apart,
)


def affine(outputs, inputs, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return LinearMap(torch.randn(outputs, inputs, generator=generator), torch.randn(outputs, generator=generator))


def test_maps_are_told_apart_by_shape_in_any_order():
    encoder, decoder = affine(8, 3), affine(3, 8)
    assert tell_apart([encoder, decoder]) == tell_apart([decoder, encoder]) == (encoder, decoder)


@pytest.mark.parametrize("maps", [[], [affine(4, 3)], [affine(4, 3), affine(5, 3)], [affine(3, 3), affine(3, 3)]])
def test_maps_that_cannot_be_told_apart_are_refused(maps):
    with pytest.raises(ValueError, match=r"wanted one \(C, 3\) and one \(3, C\)"):
        tell_apart(maps)


def test_the_papers_labels_are_swapped():
    """The appendix says x = A0 z + b0; A0 has four rows."""
    assert PAPER_ENCODER is PAPER_MATRICES["A0"] and PAPER_DECODER is PAPER_MATRICES["A1"]
    assert find_linear_map(None) is find_linear_map("paper") is PAPER_ENCODER


def test_encoding_is_the_affine_map_of_the_shrunk_image():
    image, one = torch.rand(2, 32, 32, 3), affine(8, 3)
    small = shrink(image, 4)
    expected = (small.movedim(1, -1) @ one.weight.T + one.bias).movedim(-1, 1)
    torch.testing.assert_close(one.encode(image, 4), expected)
    torch.testing.assert_close(affine(3, 8).decode(expected), affine(3, 8)(expected).movedim(1, -1))
    torch.testing.assert_close(shrink(torch.full((1, 32, 32, 3), 0.25), 4), torch.full((1, 3, 4, 4), 0.25))


def test_a_saved_pair_is_read_back(tmp_path):
    encoder, decoder = affine(8, 3), affine(3, 8)
    path = tmp_path / "map.safetensors"
    save_file(dict(linear_map_tensors(encoder, decoder)), path)
    found = load_linear_map(path)
    assert torch.equal(found.weight, encoder.weight) and torch.equal(found.bias, encoder.bias)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"weight": torch.zeros(3, 8), "bias": torch.zeros(3)}, "a map from latents to rgb"),
        ({"weight": torch.zeros(8, 3)}, "wanted weight"),
        ({"weight": torch.zeros(8, 3), "bias": torch.zeros(4)}, "wanted weight"),
        ({"a": torch.zeros(8, 3)}, "wanted weight"),
    ],
)
def test_another_file_is_refused_by_name(tmp_path, tensors, message):
    path = tmp_path / "odd.safetensors"
    save_file(tensors, path)
    with pytest.raises(ValueError, match=f"odd.safetensors.*{message}"):
        load_linear_map(path)


def test_a_damaged_or_missing_file_is_refused_by_name(tmp_path):
    (tmp_path / "cut.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{")
    for name in ("cut.safetensors", "nowhere.safetensors"):
        with pytest.raises(ValueError, match=name):
            load_linear_map(tmp_path / name)
