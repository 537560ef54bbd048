"""Stand-in for tinycudann in plain torch: a hash grid whose gradient can be differentiated again, and a bare MLP. Slow; fp32."""

import itertools

import torch
from torch import nn

_PRIMES = (1, 2654435761, 805459861)


def Encoding(n_input_dims, encoding_config, seed=1337, dtype=None):
    kinds = {"HashGrid": HashGrid, "Grid": HashGrid, "SphericalHarmonics": SphericalHarmonics}
    return kinds[encoding_config["otype"]](n_input_dims, encoding_config)


class SphericalHarmonics(nn.Module):
    """Of directions given as (d + 1) / 2, up to degree 3, without their constants."""

    def __init__(self, n_input_dims, config):
        super().__init__()
        self.n_input_dims, self.n_output_dims = n_input_dims, config["degree"] ** 2

    def forward(self, x):
        """(N, 3) -> (N, n_output_dims)."""
        x, y, z = (2 * x - 1).unbind(-1)
        basis = [torch.ones_like(x), y, z, x, x * y, y * z, 3 * z * z - 1, x * z, x * x - y * y]
        return torch.stack(basis[: self.n_output_dims], dim=-1)


class HashGrid(nn.Module):
    """A multi-resolution grid (Mueller et al. 2022) over [0, 1]^D, D of 1 to 3.

    A level of more corners than 2^log2_hashmap_size is hashed.
    """

    def __init__(self, n_input_dims, config):
        super().__init__()
        self.n_input_dims, self.levels = n_input_dims, config["n_levels"]
        self.resolutions = [int(config["base_resolution"] * config["per_level_scale"] ** level) for level in range(self.levels)]
        self.n_output_dims = self.levels * config["n_features_per_level"]
        size = 2 ** config["log2_hashmap_size"]
        self.sizes = [min(size, (resolution + 1) ** n_input_dims) for resolution in self.resolutions]
        self.params = nn.Parameter(torch.empty(sum(self.sizes), config["n_features_per_level"]).uniform_(-1e-4, 1e-4))

    def forward(self, x):
        """(N, D) -> (N, n_output_dims)."""
        return torch.cat([self._level(x, *level) for level in zip(self.resolutions, self.params.split(self.sizes))], dim=-1)

    def _level(self, x, resolution, table):
        corner = (x.detach() * resolution).floor().clamp(0, resolution - 1)
        part = x * resolution - corner
        values = 0.0
        for offset in itertools.product((0, 1), repeat=self.n_input_dims):
            offset = torch.tensor(offset, device=x.device)
            weight = torch.where(offset == 1, part, 1 - part).prod(dim=-1, keepdim=True)
            values = values + weight * table[self._index(corner.long() + offset, resolution, len(table))]
        return values

    def _index(self, corner, resolution, size):
        if (resolution + 1) ** self.n_input_dims <= size:
            return sum(corner[:, axis] * (resolution + 1) ** axis for axis in range(self.n_input_dims))
        hashed = corner[:, 0]
        for axis in range(1, self.n_input_dims):
            hashed = hashed ^ (corner[:, axis] * _PRIMES[axis])
        return hashed % size


class Network(nn.Sequential):
    """Linear layers without biases, ReLU between them."""

    def __init__(self, n_input_dims, n_output_dims, network_config, seed=1337):
        widths = [n_input_dims, *[network_config["n_neurons"]] * network_config["n_hidden_layers"]]
        hidden = [layer for pair in itertools.pairwise(widths) for layer in (nn.Linear(*pair, bias=False), nn.ReLU())]
        super().__init__(*hidden, nn.Linear(widths[-1], n_output_dims, bias=False))


class NetworkWithInputEncoding(nn.Sequential):
    def __init__(self, n_input_dims, n_output_dims, encoding_config, network_config, seed=1337):
        encoding = Encoding(n_input_dims, encoding_config)
        super().__init__(encoding, Network(encoding.n_output_dims, n_output_dims, network_config))


def free_temporary_memory():
    pass
