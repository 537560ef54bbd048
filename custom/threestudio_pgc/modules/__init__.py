"""Everything registered with the host: configuration in, objects of the other rooms out."""

from . import (  # noqa: F401
    background,
    data,
    exporter,
    geometry,
    guidance,
    material,
    prompt_processor,
    renderer,
    single_image_data,
    system,
    tetrahedral_shape,
    wrapped_guidance,
    zero123_guidance,
)
