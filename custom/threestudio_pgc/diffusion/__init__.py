"""Frozen 2D diffusion priors built on diffusers. Knows no meshes and no host."""
