"""The laboratory's figures: degenerate data first, then that a colour means what the legend says."""

import concurrent.futures
import sys

import numpy as np
import pytest

from launch_scripts.lab.drawing import GridRow, curve_figure, histogram_figure, image_grid, interval_figure

# What earlier tests left to the garbage collector is not this file's.
_NOT_OURS = ("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
pytestmark = [pytest.mark.filterwarnings(*("error", *_NOT_OURS))]

NAN = float("nan")
CHART = {"title": "t", "xlabel": "x"}
MAGENTA = (255, 0, 255)
GREY = 90  # pixels a side of the pictures here


def is_picture(image):
    return image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3 and image.flags.c_contiguous


def has(image, color):
    return (image == np.array(color, np.uint8)).all(-1)


def vermilion(image):
    """(H, W) bool: the rings' colour."""
    return (np.abs(image.astype(int) - (213, 94, 0)).max(-1) < 12) if image.size else np.zeros(image.shape[:2], bool)


def boxes(image, color):
    """[(top, left, bottom, right)] of the connected areas of a colour, left to right."""
    from scipy.ndimage import find_objects, label

    found = find_objects(label(has(image, color))[0])
    return sorted(((y.start, x.start, y.stop, x.stop) for y, x in found), key=lambda box: box[1])


def cells(grid, columns, rows, side=GREY):
    """[row][column] -> (side, side, 3) of a grid whose cells are `side` pixels, found by a frame of a grid of flat pictures."""
    flat = [GridRow(row.label, "rgb", [np.broadcast_to([1.0, 0, 1.0], (side, side, 3))] * len(columns)) for row in rows]
    # A "norm" row keeps the room of the colour bar; notes under pictures would move the rows, so tests that use them have one row.
    template = image_grid([*flat, GridRow("", "norm", [None] * len(columns))], columns, row_height=side)
    found = sorted(boxes(template, MAGENTA))
    assert len(found) == len(rows) * len(columns)
    parts = [grid[top:bottom, left:right] for top, left, bottom, right in found]
    return [parts[k : k + len(columns)] for k in range(0, len(parts), len(columns))]


def grid_cells(rows, columns, side=GREY):
    return cells(image_grid(rows, columns, row_height=side), columns, rows, side)


def test_no_rows_or_columns():
    for rows, columns in (([], ["a"]), ([], []), ([GridRow("r", "norm", [])], [])):
        with pytest.raises(ValueError, match="wanted at least one of each"):
            image_grid(rows, columns)


@pytest.mark.parametrize("value", [0.0, NAN, float("inf"), 1.0, 1e-300, 1e300, -1.0])
@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (33, 2)])
def test_degenerate_pictures_are_drawn(value, shape):
    norm, color = np.full(shape, value), np.full((*shape, 3), value)
    ring = np.ones(shape, bool)
    rows = [
        GridRow("n", "norm", [norm, None], [ring, ring]),
        GridRow("s", "signed", [color, None], [ring, None]),
        GridRow("", "rgb", [color, None]),
        GridRow("nothing", "norm", [None, None]),
    ]
    assert is_picture(image_grid(rows, ["one", ""], title="a title"))


def test_degenerate_charts_are_drawn():
    for values in ([], [NAN, 0.0, -1.0], [1.0], [1e-38, 3e38]):
        for log in (True, False):
            series = {"a": np.array(values), "b": np.zeros((2, 3))}
            assert is_picture(histogram_figure(series, **CHART, log_x=log, marks={"m": 0.0, "n": NAN, "far": 50.0}))
    assert is_picture(histogram_figure({}, **CHART))
    for x in ([], [0.0], [5.0, 5.0], [0.0, NAN, 3.0]):
        for values in ([NAN] * len(x), [2.0] * len(x)):
            for log in (True, False):
                series = {"a": (values, values, values), "b": (values, None, None)}
                assert is_picture(curve_figure(x, series, **CHART, ylabel="y", log_x=log))
    assert is_picture(curve_figure([1.0], {}, **CHART, ylabel="y", y_range=(0, 1)))
    for rows in ([], [("a", NAN, NAN, NAN)], [("a", 0.0, 0.0, 0.0)], [("a", 1.0, NAN, NAN), ("b", 1e9, 1e8, 1e10)]):
        for reference in (None, 0.0, NAN):
            assert is_picture(interval_figure(rows, **CHART, reference=reference))


def test_wrong_lengths_and_shapes_are_refused():
    norm, ring = np.ones((4, 4)), np.ones((4, 4), bool)
    for row, message in (
        (GridRow("r", "norm", [norm]), "'r': found 1 images for 2 columns"),
        (GridRow("r", "norm", [norm] * 2, [ring]), "1 ring masks for 2 columns"),
        (GridRow("r", "norm", [norm] * 2, [ring, ring[:3]]), "rings of shape .3, 4. for an image of shape .4, 4."),
        (GridRow("r", "norm", [norm[..., None]] * 2), "wanted .H, W."),
        (GridRow("r", "rgb", [norm] * 2), "wanted .H, W, 3."),
        (GridRow("r", "signed", [np.ones((4, 4, 4))] * 2), "wanted .H, W, 3."),
        (GridRow("r", "norm", [np.ones((0, 4))] * 2), "found shape .0, 4."),
        (GridRow("r", "heat", [norm] * 2), "found kind 'heat'"),
    ):
        with pytest.raises(ValueError, match=message):
            image_grid([row], ["a", "b"])
    for ends in (([1.0], None, None), ([1.0, 2.0], [1.0], [2.0])):
        with pytest.raises(ValueError, match="curve 'c': found 1 values for 2 places"):
            curve_figure([1.0, 2.0], {"c": ends}, **CHART, ylabel="y")


def test_pictures_are_drawn_as_they_are():
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (GREY // 3, GREY // 3, 3), dtype=np.uint8)
    (first, second), = grid_cells([GridRow("r", "rgb", [image / 255, image])], ["a", "b"])  # fmt: skip
    enlarged = image.repeat(3, 0).repeat(3, 1)
    assert np.array_equal(first, enlarged) and np.array_equal(second, enlarged)


@pytest.mark.parametrize("kind", ["norm", "signed"])
def test_a_value_has_one_colour_in_a_row_whatever_the_others_hold(kind):
    def picture(*values):
        flat = np.repeat(np.array(values), GREY // len(values))[None].repeat(GREY, 0)
        return flat if kind == "norm" else flat[..., None] * [1, -1, 0.5]

    row, other = [picture(0.5, 2.0), picture(2.0, 0.1, 0.5)], [picture(1e4), picture(1e-6)]
    drawn = grid_cells([GridRow("r", kind, row), GridRow("o", kind, other)], ["a", "b"])
    a, b = drawn[0]
    assert np.array_equal(a[5, 5], b[5, 70]) and np.array_equal(a[5, 70], b[5, 5])
    assert not np.array_equal(a[5, 5], a[5, 70])
    alone = grid_cells([GridRow("r", kind, row)], ["a", "b"])
    assert np.array_equal(alone[0][0], a) and np.array_equal(alone[0][1], b)
    shared = grid_cells([GridRow("r", kind, row, scale="s"), GridRow("o", kind, [row[0], other[0]], scale="s")], ["a", "b"])
    assert np.array_equal(shared[0][0], shared[1][0]) and not np.array_equal(shared[0][0], a)


def test_norm_colours_are_logarithmic_from_dark_to_light():
    steps = np.array([0.0, 1e-9, 1e-3, 1e-2, 1e-1, 1.0, 1.0, NAN, float("inf")])
    (cell,), = grid_cells([GridRow("r", "norm", [steps[None].repeat(9, 0)])], ["a"])  # fmt: skip
    colors = cell[45, 5::10]
    import matplotlib

    cividis = (matplotlib.colormaps["cividis"]([0, 0, 102, 153, 204, 255, 255])[:, :3] * 255 + 0.5).astype(int)
    assert np.abs(colors[:7].astype(int) - cividis).max() <= 2
    assert np.array_equal(colors[0], colors[1])  # the range ends at 1e-5 of the largest
    assert (colors[7:] == MAGENTA).all()


def test_signed_is_grey_at_zero_and_outliers_do_not_dim_the_rest():
    gradient = np.zeros((GREY, GREY, 3))
    gradient[:, 45:] = 1.0, -1.0, 0.5
    gradient[0, :3] = 1e6
    gradient[1, 0] = NAN
    (cell,), = grid_cells([GridRow("r", "signed", [gradient])], ["a"])  # fmt: skip
    # The scale is 1.5 times the 90 % quantile, here 1.
    assert (cell[50, 20] == 128).all() and np.abs(cell[50, 60].astype(int) - [213, 43, 170]).max() <= 1
    assert (cell[0, :3] == 255).all() and tuple(cell[1, 0]) == MAGENTA


def test_one_outlier_is_not_lost_where_a_picture_is_shrunk():
    norm = np.full((500, 500), 1e-3)
    norm[123, 321] = 1.0
    (cell,), = grid_cells([GridRow("r", "norm", [norm])], ["a"])  # fmt: skip
    places = np.argwhere((cell != cell[0, 0]).any(-1))
    assert places.tolist() == [[123 * GREY // 500, 321 * GREY // 500]]


def test_sizes_and_shapes_may_differ_in_a_row():
    white = [np.ones((16, 16, 3)), np.ones((128, 128, 3)), np.ones((8, 16, 3)) * [1, 0, 1]]
    grid = image_grid([GridRow("r", "rgb", [image * [1, 0, 1] for image in white])], ["a", "b", "c"], row_height=64)
    sizes = [(bottom - top, right - left) for top, left, bottom, right in boxes(grid, MAGENTA)]
    assert sizes == [(64, 64), (64, 64), (64, 128)]


def test_default_cells_keep_pixels_square():
    for side, drawn in ((1, 150), (16, 144), (64, 128), (96, 192), (128, 128), (256, 256), (512, 256), (1000, 250)):
        grid = image_grid([GridRow("r", "rgb", [np.broadcast_to([1.0, 0, 1.0], (side, side, 3))])], ["a"])
        (top, left, bottom, right), = boxes(grid, MAGENTA)  # fmt: skip
        assert (bottom - top, right - left) == (drawn, drawn)


def test_rings_are_where_they_are_asked_for_and_nowhere_else():
    norm, mask = np.full((30, 30), 0.1), np.zeros((30, 30), bool)
    norm[0, 0] = 1.0
    mask[6, 20] = True
    rows = [GridRow("r", "norm", [norm] * 3, [mask, None, np.zeros_like(mask)]), GridRow("o", "norm", [norm] * 3)]
    drawn = grid_cells(rows, ["a", "b", "c"])
    counts = np.array([[vermilion(cell).sum() for cell in line] for line in drawn])
    assert counts[0, 0] > 20 and (counts.ravel()[1:] == 0).all()
    y, x = np.argwhere(vermilion(drawn[0][0])).T
    assert abs((y.min() + y.max() + 1) / 2 - 6.5 * 3) <= 1 and abs((x.min() + x.max() + 1) / 2 - 20.5 * 3) <= 1
    # open: the pixel itself stays as it is
    assert np.array_equal(drawn[0][0][19:21, 61:63], drawn[1][0][19:21, 61:63])


def test_a_ring_at_the_border_stays_out_of_the_next_picture():
    mask = np.zeros((30, 30), bool)
    mask[[0, 15, 29, 15], [15, 0, 15, 29]] = True
    rows = [GridRow("r", "norm", [np.ones((30, 30))] * 3, [None, mask, None])] + [GridRow("o", "norm", [np.ones((30, 30))] * 3)]
    drawn = grid_cells(rows, ["a", "b", "c"])
    plain = drawn[1][0]
    assert vermilion(drawn[0][1]).sum() > 40
    for cell in (drawn[0][0], drawn[0][2], drawn[1][1]):
        assert np.array_equal(cell, plain)


def test_of_many_outliers_the_largest_are_ringed_and_all_are_counted():
    norm = np.full((GREY, GREY), 0.1)
    mask = np.zeros((GREY, GREY), bool)
    mask[:, 2:4] = True  # 180 outliers, the 60 largest of them at the bottom
    norm[60:, 2:4] = 1.0
    few = mask & (np.arange(GREY)[:, None] >= 60)
    many, exact = (image_grid([GridRow("r", "norm", [norm], [rings])], ["a"], row_height=GREY) for rings in (mask, few))
    assert len(many) > len(exact)  # room for the note
    assert np.array_equal(many[: len(exact) - 6], exact[:-6])
    assert (many[len(exact) - 6 :] < 200).any()


def test_text_makes_room_for_itself():
    picture = GridRow("r", "rgb", [np.ones((8, 8, 3))] * 2)
    short = image_grid([picture], ["a", "b"], row_height=100)
    tall = image_grid([picture], ["a", "b c d e f g h " * 8 + "x" * 60], row_height=100)
    assert tall.shape[0] > short.shape[0] + 60 and tall.shape[1] == short.shape[1]
    assert image_grid([picture], ["a", "b"], row_height=100, title="$x_{ t " * 12).shape[1] == short.shape[1]  # and is no formula
    wide = image_grid([GridRow("a long label, broken into lines " * 3, "rgb", picture.images)], ["a", "b"], row_height=100)
    assert short.shape[1] < wide.shape[1] < short.shape[1] + 160


def test_histogram_draws_each_series_in_its_colour():
    rng = np.random.default_rng(0)
    values = rng.lognormal(size=2000)
    image = histogram_figure({"a": values, "b": values * 100}, **CHART, marks={"m": 3.0})
    blue, orange = np.argwhere(has(image, (0, 114, 178))), np.argwhere(vermilion(image))
    inside = image.shape[0] * 0.8  # above the legend
    assert np.median(blue[blue[:, 0] < inside, 1]) + 100 < np.median(orange[orange[:, 0] < inside, 1])
    ordered = histogram_figure({"a": values, "b": values * 100}, **CHART, ordered=True)
    assert not vermilion(ordered).any() and has(ordered, (0, 34, 78)).any()


def test_curve_and_interval_show_their_bands():
    x, y = [20, 100, 500], np.array([0.2, 0.5, 0.9])
    band = curve_figure(x, {"a": (y, y - 0.1, y + 0.1)}, **CHART, ylabel="y", y_range=(0, 1))
    line = curve_figure(x, {"a": (y, None, None)}, **CHART, ylabel="y", y_range=(0, 1))
    assert (band != line).any(-1).sum() > 10_000
    blue = (0, 114, 178)
    narrow, wide = (interval_figure([("a", 0.0, -w, w), ("b", 0.0, -1.0, 1.0)], **CHART, reference=0.0) for w in (0.2, 1.0))
    assert has(wide, blue).sum() > has(narrow, blue).sum() + 300
    clear = interval_figure([("a", 0.5, 0.2, 0.8)], **CHART, reference=0.199)
    hollow = interval_figure([("a", 0.5, 0.2, 0.8)], **CHART, reference=0.201)
    assert has(clear, blue).sum() > has(hollow, blue).sum() + 20


def test_same_pictures_from_several_threads():
    def draw(number):
        values = np.random.default_rng(number).lognormal(size=500)
        row = GridRow("r", "norm", [values.reshape(20, 25)], [values.reshape(20, 25) > 5])
        return image_grid([row], ["a"]), histogram_figure({"a": values}, **CHART)

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        threaded = list(pool.map(draw, range(3)))
    for number, images in enumerate(threaded):
        for image, again in zip(images, draw(number)):
            assert np.array_equal(image, again)


def test_pyplot_is_not_touched(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)  # importing it is now an error
    values = np.ones((4, 4))
    image_grid([GridRow("r", "norm", [values], [values > 0])], ["a"])
    histogram_figure({"a": values}, **CHART)
    curve_figure([1.0, 2.0], {"a": ([1.0, 2.0], None, None)}, **CHART, ylabel="y")
    interval_figure([("a", 0.0, -1.0, 1.0)], **CHART)
