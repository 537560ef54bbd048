"""What is optimised and how it is seen: meshes, cameras, rasterisers, G-buffers, fields. Knows no diffusion and no host."""
