"""Stand-in for the part of nerfacc that threestudio's nerf-volume-renderer needs with its occupancy grid, in plain torch.

The grid never learns what is empty: samples are spread evenly over the box, as far as the given density does not rule them out.
Samples of all rays stand in one list, those of a ray next to each other.
"""

import torch
from torch import nn

__path__ = []  # a package: its other modules are imported by threestudio for what nothing here needs


class OccGridEstimator(nn.Module):
    def __init__(self, roi_aabb, resolution=128, levels=1):
        super().__init__()
        self.register_buffer("box", torch.as_tensor(roi_aabb).detach().clone().view(2, 3))
        self.register_buffer("occs", torch.ones(levels * resolution**3))
        self.register_buffer("binaries", torch.ones(levels, resolution, resolution, resolution, dtype=torch.bool))

    def update_every_n_steps(self, step, occ_eval_fn, **kwargs):
        pass

    def sampling(
        self,
        rays_o,
        rays_d,
        sigma_fn=None,
        near_plane=0.0,
        far_plane=1e10,
        render_step_size=1e-3,
        early_stop_eps=1e-4,
        alpha_thre=0.0,
        stratified=False,
        cone_angle=0.0,
    ):
        """(ray_indices, t_starts, t_ends), (S,) each, of the samples inside the box whose opacity is not below `alpha_thre`."""
        sides = (self.box[:, None] - rays_o) / torch.where(rays_d.abs() < 1e-9, 1e-9, rays_d)
        near = sides.amin(dim=0).amax(dim=-1).clamp(near_plane, far_plane)
        far = sides.amax(dim=0).amin(dim=-1).clamp(near_plane, far_plane)
        steps = int(((far - near).amax() / render_step_size).clamp_min(0).ceil())
        shift = torch.rand_like(near) if stratified else torch.zeros_like(near)
        starts = near[:, None] + (torch.arange(steps, device=near.device) + shift[:, None]) * render_step_size
        inside = starts + render_step_size <= far[:, None]
        ray_indices, starts = inside.nonzero()[:, 0], starts[inside]
        ends = starts + render_step_size
        if sigma_fn is not None and len(starts):
            seen = 1 - torch.exp(-sigma_fn(starts, ends, ray_indices) * render_step_size) >= alpha_thre
            ray_indices, starts, ends = ray_indices[seen], starts[seen], ends[seen]
        return ray_indices, starts, ends


def render_weight_from_density(t_starts, t_ends, sigmas, ray_indices, n_rays):
    """(weights, transmittances, opacities), (S,) each: w_i = T_i (1 - exp(-s_i d_i)), T_i = exp(-sum_{j < i} s_j d_j) along the ray."""
    thickness = sigmas * (t_ends - t_starts)
    before = (thickness.double().cumsum(0) - thickness).to(thickness.dtype)
    first = torch.searchsorted(ray_indices, torch.arange(n_rays, device=ray_indices.device)).clamp_max(len(ray_indices) - 1)
    transmittance = torch.exp(-(before - before[first][ray_indices]))
    opacity = 1 - torch.exp(-thickness)
    return transmittance * opacity, transmittance, opacity


def accumulate_along_rays(weights, values=None, ray_indices=None, n_rays=None):
    """(n_rays, C): the weighted sum of (S, C) values along each ray, or of the weights alone."""
    weighted = weights[:, None] if values is None else weights[:, None] * values
    return weighted.new_zeros(n_rays, weighted.shape[-1]).index_add(0, ray_indices, weighted)
