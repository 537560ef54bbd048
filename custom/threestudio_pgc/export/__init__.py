"""From a mesh and the maps of its surface to files: unwrap, bake, GLB, OBJ; and pictures of it."""
