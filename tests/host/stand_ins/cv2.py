"""The few functions of OpenCV that threestudio calls, by Pillow and scipy. Pictures are uint8, channels in OpenCV's order (blue first)."""

import numpy as np
from matplotlib import colormaps
from PIL import Image
from scipy.ndimage import distance_transform_edt

IMREAD_UNCHANGED = -1
INTER_AREA = 3
INPAINT_TELEA = 1
COLORMAP_JET = 2
# All of them swap red and blue.
COLOR_RGB2BGR = COLOR_BGR2RGB = COLOR_RGBA2BGRA = COLOR_BGRA2RGBA = 4


def cvtColor(image, code):
    return np.concatenate([image[..., 2::-1], image[..., 3:]], axis=-1)


def imread(path, flags=IMREAD_UNCHANGED):
    return cvtColor(np.asarray(Image.open(path)), COLOR_RGBA2BGRA)


def imwrite(path, image):
    Image.fromarray(image if image.ndim == 2 else np.ascontiguousarray(cvtColor(image, COLOR_BGR2RGB))).save(path)
    return True


def resize(image, size, interpolation=INTER_AREA):
    return np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BOX))


def applyColorMap(image, code):
    return cvtColor(colormaps["jet"](image.reshape(image.shape[:2]), bytes=True)[..., :3], COLOR_RGB2BGR)


def inpaint(image, mask, radius, method):
    """Holes, where `mask` is not 0, take the nearest other pixel."""
    nearest = distance_transform_edt(mask != 0, return_distances=False, return_indices=True)
    return image[tuple(nearest)]
