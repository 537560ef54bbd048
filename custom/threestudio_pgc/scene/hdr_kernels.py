"""The compiled loop of reading Radiance files."""

from __future__ import annotations

from .raster.jit import jit


@jit
def decode_rows(data, at, rgbe):
    """Fill rgbe (H, W, 4) from the bytes that follow `at`. Returns how many rows are whole, and whether a wrong code ended it."""
    height, width, _ = rgbe.shape
    size = len(data)
    for y in range(height):
        if 8 <= width <= 32767 and at + 4 <= size and data[at] == 2 and data[at + 1] == 2 and data[at + 2] < 128:
            if data[at + 2] * 256 + data[at + 3] != width:
                return y, True
            at += 4
            for channel in range(4):
                x = 0
                while x < width:
                    if at + 2 > size:
                        return y, False
                    code = int(data[at])
                    count = code - 128 if code > 128 else code
                    if count == 0 or x + count > width:
                        return y, True
                    at += 1
                    if code > 128:
                        rgbe[y, x : x + count, channel] = data[at]
                        at += 1
                    else:
                        if at + count > size:
                            return y, False
                        rgbe[y, x : x + count, channel] = data[at : at + count]
                        at += count
                    x += count
        else:  # flat pixels; (1, 1, 1, n) repeats the one before n times, and a second such one in a row 256 n times
            x = 0
            shift = 0
            while x < width:
                if at + 4 > size:
                    return y, False
                if data[at] == 1 and data[at + 1] == 1 and data[at + 2] == 1:
                    count = int(data[at + 3]) << shift
                    if x == 0 or shift > 16 or x + count > width:
                        return y, True
                    rgbe[y, x : x + count] = rgbe[y, x - 1]
                    x += count
                    shift += 8
                else:
                    rgbe[y, x] = data[at : at + 4]
                    x += 1
                    shift = 0
                at += 4
    return height, False
