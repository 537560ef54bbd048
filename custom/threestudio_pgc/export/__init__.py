"""From a mesh and a colour per point to files: unwrap, bake, GLB, OBJ; and pictures of it."""
