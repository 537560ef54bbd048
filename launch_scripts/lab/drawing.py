"""The laboratory's figures, as (H, W, 3) uint8 images: grids of pictures, histograms, curves and intervals.

Drawn by matplotlib on figures of their own, without pyplot: no display, no global state, any thread. Colours read alike with the common
colour blindnesses.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.patheffects import withStroke
from matplotlib.transforms import Bbox, TransformedBbox

from threestudio_pgc.export.pictures import to_uint8

MAX_RINGS = 60
VERMILION = "#D55E00"
# Okabe and Ito's, in an order that keeps neighbours apart; without their yellow, which is lost on white.
OKABE_ITO = ("#0072B2", VERMILION, "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
NOT_FINITE = (255, 0, 255)

_DPI = 128  # a power of two, so that pixels / _DPI * _DPI are the same number of pixels
_INK, _QUIET, _EMPTY = "#222222", "#6b6b6b", (240, 240, 240)
_GAP, _LINE, _TEXT = 6, 15, 12  # pixels: between cells, a line of text, its font
_STYLES = ("-", "--", "-.", ":", (0, (6, 1, 1, 1, 1, 1)), (0, (3, 2)))
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")


@dataclass
class GridRow:
    """One row of an image grid.

    Attributes:
        label: text at the left end.
        kind: "rgb", (H, W, 3) in [0, 1]; "signed", (H, W, 3) of any scale s, drawn as 0.5 + g / (2 s); "norm", (H, W) non-negative,
            drawn on a logarithmic scale from dark blue to yellow. Values that are not finite are magenta.
        images: one a column, of any sizes; None leaves the cell empty.
        rings: (H, W) bool a picture: pixels to ring, or None.
        scale: rows of one kind and one scale name share their scale; default: the row has its own.
    """

    label: str
    kind: Literal["rgb", "signed", "norm"]
    images: list[np.ndarray | None]
    rings: list[np.ndarray | None] | None = None
    scale: str | None = None


def image_grid(rows: Sequence[GridRow], columns: Sequence[str], *, title: str | None = None, row_height: int | None = None) -> np.ndarray:
    """Rows of pictures under column labels, (H', W', 3) uint8, on white.

    A picture fills its cell by nearest neighbour. Where it is larger than that, "norm" takes the maximum, so that no single pixel is lost,
    and "rgb" the mean. At the right end are the colour bar of a "norm" row and the scale of a "signed" one.

    Args:
        row_height: pixels; default: the whole multiple of the tallest picture's height that is nearest to 150, or a whole part of it.
    Raises:
        ValueError: no rows, no columns, or pictures or rings of a wrong number or shape.
    """
    rows = [_checked(row, len(columns)) for row in rows]
    if not rows or not columns:
        raise ValueError(f"image grid: found {len(rows)} rows and {len(columns)} columns, wanted at least one of each")
    scales = _scales(rows)
    sizes = [image.shape for row in rows for image in row.images if image is not None] or [(1, 1)]
    cell_h = row_height or _row_height(max(size[0] for size in sizes))
    cell_w = round(cell_h * min(max(max(size[1] / size[0] for size in sizes), 0.5), 2))

    ruler = _Ruler()
    labels = [ruler.wrapped(row.label, 150) for row in rows]
    heads = [ruler.wrapped(column, cell_w) for column in columns]
    pictures = [[_Picture(row, k, scale, cell_h, cell_w) for k in range(len(columns))] for row, scale in zip(rows, scales)]
    left = 8 + max(ruler.width(line) for label in labels for line in label) + 8
    right = left + len(columns) * (cell_w + _GAP)
    width = right + (76 if any(row.kind != "rgb" for row in rows) else 2)
    titles = ruler.wrapped(title, width - 16, 15) if title else []
    head_top = 8 + 20 * len(titles) + (6 if titles else 0)
    tops = [head_top + _LINE * max(map(len, heads)) + 4]
    for line in pictures:
        tops.append(tops[-1] + max(cell_h, _LINE) + (_LINE if any(picture.note for picture in line) else 0) + _GAP)

    # Pictures go to the canvas as they are, so a value has exactly its colour; matplotlib draws text and rings over them.
    canvas = np.full((tops[-1] + 2, width, 3), 255, np.uint8)
    figure = Figure(figsize=(width / _DPI, len(canvas) / _DPI), dpi=_DPI)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    axes.set(xlim=(0, width), ylim=(len(canvas), 0))

    def say(x, y, lines, size=_TEXT, **options):
        options = {"color": _INK, "linespacing": 1.15} | options
        axes.text(x, y, "\n".join(lines), fontsize=_points(size), parse_math=False, **options)

    say(8, 8, titles, 15, va="top", weight="bold")
    for k, head in enumerate(heads):
        say(left + k * (cell_w + _GAP) + cell_w / 2, tops[0] - 4, head, ha="center", va="bottom", multialignment="center")
    for row, label, top, scale, line in zip(rows, labels, tops, scales, pictures):
        say(left - 8, top + cell_h / 2, label, ha="right", va="center", multialignment="right")
        for k, picture in enumerate(line):
            x = left + k * (cell_w + _GAP)
            if picture.pixels is None:
                canvas[top : top + cell_h, x : x + cell_w] = _EMPTY
                say(x + cell_w / 2, top + cell_h / 2, ["\N{EN DASH}"], color=_QUIET, ha="center", va="center")
                continue
            height, wide = picture.pixels.shape[:2]
            y, x = top + (cell_h - height) // 2, x + (cell_w - wide) // 2
            canvas[y : y + height, x : x + wide] = picture.pixels
            picture.ring(axes, x, y)
            say(x + wide / 2, top + cell_h + 1, [picture.note], 11, color=_QUIET, ha="center", va="top")
        _draw_scale(canvas, say, row, scale, right + 2, top, cell_h)
    figure.figimage(canvas, zorder=-1)
    return _drawn(figure)


def histogram_figure(
    series: Mapping[str, np.ndarray],
    *,
    title: str,
    xlabel: str,
    marks: Mapping[str, float] | None = None,
    log_x: bool = True,
    ordered: bool = False,
) -> np.ndarray:
    """Densities of the positive values of each series as step lines, per decade if `log_x`, on a logarithmic axis; uint8 image.

    The legend says which share of a series is zero, negative or not finite and so left out. Values below 1e-12 of the largest are drawn
    at that.

    Args:
        marks: text -> value of labelled vertical lines; those that cannot be on the axis are left out.
        ordered: the series are a sequence (of timesteps, thresholds, ...) and coloured as one.
    """
    positive, left_out = {}, {}
    for name, values in series.items():
        values = np.asarray(values, np.float64).ravel()
        positive[name] = values[np.isfinite(values) & (values > 0)]
        left_out[name] = 1 - len(positive[name]) / len(values) if len(values) else 0
    marks = {name: value for name, value in (marks or {}).items() if np.isfinite(value) and (value > 0 or not log_x)}
    figure, axes = _chart(title, xlabel, "density per decade" if log_x else "density")
    axes.set_yscale("log")
    if log_x:
        axes.set_xscale("log")

    shown = np.concatenate([*positive.values(), np.zeros(0)])
    if shown.size:
        count = int(np.clip(2 * max(map(len, positive.values())) ** (1 / 3), 10, 80))
        edges = _edges(shown, count, log_x)
        steps = np.diff(np.log10(edges)) if log_x else np.diff(edges)
        density = {
            name: np.histogram(values.clip(edges[0], edges[-1]), edges)[0] / len(values) / steps
            for name, values in positive.items()
            if len(values)
        }
        above = np.concatenate(list(density.values()))
        low, high = above[above > 0].min() / 1.6, above.max() * 1.6
        axes.set_ylim(low, high)
    else:
        density = {}
        axes.set(xlim=(0.1, 10) if log_x else (0, 1), ylim=(0.1, 10))
    widths = np.linspace(1.4 if ordered else 2.4, 1.2, len(series))  # so that of lines upon one another the lower ones show
    for (name, color, style), width in zip(_colored(series, ordered), widths):
        note = f" ({_share(left_out[name])} not positive)" if left_out[name] else ""
        if name in density:
            # An empty bin goes down to the axis.
            axes.stairs(density[name].clip(low / 10), edges, baseline=low / 10, color=color, ls=style, lw=width, label=name + note)
        else:
            axes.plot([], [], color=color, ls=style, lw=width, label=f"{name} (no positive value)")
    _mark(axes, marks)
    if not shown.size:
        _say_empty(axes, "no positive value")
    _legend(figure, axes)
    return _drawn(figure)


def curve_figure(
    x: Sequence[float],
    series: Mapping[str, tuple[Sequence[float], Sequence[float] | None, Sequence[float] | None]],
    *,
    title: str,
    xlabel: str,
    ylabel: str,
    log_x: bool = True,
    y_range: tuple[float, float] | None = None,
    ordered: bool = False,
) -> np.ndarray:
    """Mean of each series over `x` with its band, where it has one; uint8 image. Points that are not finite leave a gap.

    Args:
        series: name -> (mean, lower, upper), each as long as `x`; lower and upper, the ends of a 95 % interval, both or none.
        ordered: the series are a sequence (of timesteps, thresholds, ...) and coloured as one.
    Raises:
        ValueError: a sequence of another length than `x`.
    """
    x = np.asarray(x, np.float64)
    keep = np.isfinite(x) & ((x > 0) | (not log_x))
    figure, axes = _chart(title, xlabel, ylabel)
    if log_x:
        axes.set_xscale("log")
    drawn = False
    for k, (name, color, style) in enumerate(_colored(series, ordered)):
        ends = [None if values is None else np.asarray(values, np.float64) for values in series[name]]
        for values in ends:
            if values is not None and values.shape != x.shape:
                raise ValueError(f"curve {name!r}: found {values.size} values for {x.size} places on the x axis")
        ends = [None if values is None else np.where(np.isfinite(values), values, np.nan)[keep] for values in ends]
        mean, low, high = ends
        drawn |= bool(np.isfinite(mean).any())
        if low is not None and high is not None:
            axes.fill_between(x[keep], low, high, color=color, alpha=0.16, lw=0)
        marker = _MARKERS[k % len(_MARKERS)]
        style = _STYLES[k % len(_STYLES)] if style == "-" else style
        axes.plot(x[keep], mean, color=color, ls=style, marker=marker, ms=4.5, mec="white", mew=0.6, lw=1.5, label=name)
    places = np.unique(x[keep])
    if _apart(places, log_x):
        axes.set_xticks(places, labels=[f"{place:g}" for place in places])
        axes.set_xticks([], minor=True)
    if y_range is not None:
        axes.set_ylim(*y_range)
    if not drawn:
        _say_empty(axes, "no finite value")
    _legend(figure, axes)
    return _drawn(figure)


def interval_figure(
    rows: Sequence[tuple[str, float, float, float]], *, title: str, xlabel: str, reference: float | None = None
) -> np.ndarray:
    """A forest plot of (label, mean, low, high), the first row on top, the numbers at the right end; uint8 image.

    Args:
        reference: value of a dashed vertical line; the marker of an interval that contains it is hollow.
    """
    ruler = _Ruler()
    labels = ["\n".join(ruler.wrapped(label, 260)) for label, *_ in rows]
    lines = sum(label.count("\n") + 1 for label in labels)
    titles = len(ruler.wrapped(title, 900, 15))
    figure, axes = _chart(title, xlabel, "", height=(110 + 20 * titles + 13 * lines + 15 * max(len(rows), 2)) / _DPI)
    axes.grid(axis="y", visible=False)
    numbers, digits = [], _decimals([value for row in rows for value in row[1:]])
    for y, (_, mean, low, high) in enumerate(rows):
        if not np.isfinite(mean):
            numbers.append("\N{EN DASH}")
            continue
        interval = np.isfinite(low) and np.isfinite(high)
        numbers.append(f"{mean:{digits}}  [{low:{digits}}, {high:{digits}}]" if interval else f"{mean:{digits}}")
        if interval:
            axes.plot([low, high], [y, y], color=OKABE_ITO[0], lw=2, solid_capstyle="butt")
        hollow = reference is not None and (not interval or low <= reference <= high)
        face = "white" if hollow else OKABE_ITO[0]
        axes.plot([mean], [y], marker="o", ms=6, mec=OKABE_ITO[0], mew=1.4, mfc=face, ls="none")
    if reference is not None and np.isfinite(reference):
        axes.axvline(reference, color=_INK, lw=1, ls=(0, (4, 3)), zorder=1)
    axes.set_ylim(max(len(rows), 1) - 0.5, -0.5)
    axes.set_yticks(range(len(rows)), labels=labels)
    axes.tick_params(axis="y", length=0)
    twin = axes.secondary_yaxis("right")
    twin.set_yticks(range(len(rows)), labels=numbers)
    twin.tick_params(length=0, labelsize=8, labelcolor=_INK)
    for label in (*axes.get_yticklabels(), *twin.get_yticklabels()):
        label.set_parse_math(False)
    twin.spines["right"].set_visible(False)
    if all(number == "\N{EN DASH}" for number in numbers):
        _say_empty(axes, "no finite value")
    return _drawn(figure)


class _Ruler:
    """Measures and wraps text; sizes in pixels."""

    def __init__(self):
        self._renderer = FigureCanvasAgg(Figure(dpi=_DPI)).get_renderer()

    def width(self, text: str, size: int = _TEXT) -> int:
        # bold if large, as titles are
        font = FontProperties(size=_points(size), weight="bold" if size > _TEXT else "normal")
        return int(np.ceil(self._renderer.get_text_width_height_descent(text, font, ismath=False)[0])) if text else 0

    def wrapped(self, text: str, width: int, size: int = _TEXT) -> list[str]:
        """Lines no wider than `width`, broken at spaces, or within a word that is wider; at least one line."""
        lines = []
        for paragraph in text.splitlines() or [""]:
            line = ""
            for word in paragraph.split():
                if self.width(f"{line} {word}".strip(), size) <= width:
                    line = f"{line} {word}".strip()
                    continue
                if line:
                    lines.append(line)
                while self.width(word, size) > width and len(word) > 1:
                    fits = next((n for n in range(len(word) - 1, 1, -1) if self.width(word[:n], size) <= width), 1)
                    lines.append(word[:fits])
                    word = word[fits:]
                line = word
            lines.append(line)
        return lines


class _Picture:
    """A picture of the grid as it is drawn: `pixels` (h, w, 3) uint8 or None, `note` for the line under it."""

    def __init__(self, row: GridRow, column: int, scale: tuple[float, float] | None, cell_h: int, cell_w: int):
        self.pixels, self.note, self._rings = None, "", np.zeros((0, 2))
        values = row.images[column]
        if values is None:
            return
        factor = min(cell_h / values.shape[0], cell_w / values.shape[1])
        height, width = (max(1, round(side * factor)) for side in values.shape[:2])
        self.pixels = _painted(_resized(values, height, width, row.kind), row.kind, scale)
        self._pixel = factor
        self._radius = min(max(5.0, 0.9 * factor), 0.45 * min(cell_h, cell_w))
        notes = []
        mask = None if row.rings is None else row.rings[column]
        if mask is not None:
            norm = np.nan_to_num(values if values.ndim == 2 else np.hypot.reduce(values, axis=-1), nan=np.inf)
            places = np.argwhere(mask)
            largest = np.argsort(-norm[mask], kind="stable")[:MAX_RINGS]
            self._rings = places[largest]
            if len(places) > MAX_RINGS:
                notes.append(f"{len(places)} outliers")
        bad = ~np.isfinite(values)
        if bad.any():
            notes.append(f"{int(bad.reshape(*bad.shape[:2], -1).any(-1).sum())} not finite")
        self.note = ", ".join(notes)

    def ring(self, axes, x: int, y: int) -> None:
        """Draw the rings, the picture's upper left corner being at (x, y)."""
        if not len(self._rings):
            return
        rows, columns = (self._rings + 0.5).T * self._pixel
        rings = axes.scatter(x + columns, y + rows, _points(2 * self._radius) ** 2, facecolors="none", edgecolors=VERMILION)
        rings.set(linewidths=_points(2), path_effects=[withStroke(linewidth=_points(3.2), foreground="white")])
        # A ring at the border must not reach into the next picture.
        height, width = self.pixels.shape[:2]
        margin = _GAP / 2
        rings.set_clip_box(TransformedBbox(Bbox([[x - margin, y - margin], [x + width + margin, y + height + margin]]), axes.transData))


def _checked(row: GridRow, columns: int) -> GridRow:
    """The row with float64 pictures and bool rings, or ValueError."""
    if row.kind not in ("rgb", "signed", "norm"):
        raise ValueError(f"row {row.label!r}: found kind {row.kind!r}, wanted 'rgb', 'signed' or 'norm'")
    if len(row.images) != columns:
        raise ValueError(f"row {row.label!r}: found {len(row.images)} images for {columns} columns")
    if row.rings is not None and len(row.rings) != columns:
        raise ValueError(f"row {row.label!r}: found {len(row.rings)} ring masks for {columns} columns")
    images, rings = [], []
    for image, mask in zip(row.images, row.rings or [None] * columns):
        if image is not None:
            image = np.asarray(image)
            image = image / 255 if image.dtype == np.uint8 and row.kind == "rgb" else image.astype(np.float64)
            if image.ndim != (2 if row.kind == "norm" else 3) or image.shape[2:] not in ((), (3,)) or not image.size:
                raise ValueError(f"row {row.label!r}: found shape {image.shape}, wanted {'(H, W)' if row.kind == 'norm' else '(H, W, 3)'}")
            mask = None if mask is None else np.asarray(mask, bool)
            if mask is not None and mask.shape != image.shape[:2]:
                raise ValueError(f"row {row.label!r}: found rings of shape {mask.shape} for an image of shape {image.shape}")
        images.append(image)
        rings.append(mask if image is not None else None)
    return GridRow(row.label, row.kind, images, rings if row.rings is not None else None, row.scale)


def _scales(rows: Sequence[GridRow]) -> list[tuple[float, float] | None]:
    """Each row's (low, high): of a logarithmic scale, or (-s, s); None where no finite value differs from zero."""
    groups: dict = {}
    for number, row in enumerate(rows):
        groups.setdefault((row.kind, number if row.scale is None else row.scale), []).append(number)
    scales: list = [None] * len(rows)
    for (kind, _), members in groups.items():
        images = [image for number in members for image in rows[number].images if image is not None]
        values = np.concatenate([np.zeros(0), *(np.abs(image[np.isfinite(image)]) for image in images)])
        for number in members:
            scales[number] = _scale(kind, values)
    return scales


def _scale(kind: str, values: np.ndarray) -> tuple[float, float] | None:
    positive = values[values > 0]
    if kind == "rgb" or not positive.size:
        return None
    if kind == "signed":
        # A quantile that outliers do not reach; where nearly all is zero, so is it.
        high = 1.5 * float(np.quantile(values, 0.9)) or float(positive.max())
        return -high, high
    high = float(positive.max())
    low = max(high / 1e5, float(np.quantile(positive, 0.01)))
    return (low if low < high else high / 1000), high


def _painted(values: np.ndarray, kind: str, scale: tuple[float, float] | None) -> np.ndarray:
    """Values (h, w) or (h, w, 3) as colours, (h, w, 3) uint8."""
    bad = ~np.isfinite(values)
    values = np.where(bad, 0, values)
    if kind == "norm":
        share = np.zeros_like(values)
        if scale is not None:
            low, high = scale
            share[values > 0] = np.log(values[values > 0] / high) / np.log(high / low) + 1
        image = _cividis()[(share.clip(0, 1) * 255 + 0.5).astype(int)]
    else:
        bad = bad.any(-1)
        if kind == "signed":
            high = 1.0 if scale is None else scale[1]
            values = 0.5 + values.clip(-high, high) / high / 2
        image = to_uint8(values.clip(0, 1))
    return np.where(bad[..., None], np.array(NOT_FINITE, np.uint8), image)


def _resized(values: np.ndarray, height: int, width: int, kind: str) -> np.ndarray:
    """Values (H, W, ...) as (height, width, ...); see `image_grid`."""
    for axis, size in enumerate((height, width)):
        have = values.shape[axis]
        starts = np.arange(size) * have // size
        if size >= have or kind == "signed":
            values = values.take((2 * np.arange(size) + 1) * have // (2 * size), axis)
        elif kind == "norm":
            values = np.maximum.reduceat(values, starts, axis)
        else:
            counts = np.diff(np.append(starts, have))
            values = np.add.reduceat(values, starts, axis) / counts.reshape(-1, *[1] * (values.ndim - 1 - axis))
    return values


def _row_height(height: int) -> int:
    if height > 300:
        return height // -(-height // 300)
    multiples = np.arange(1, 301 // height + 1) * height
    return int(multiples[np.abs(np.log(multiples / 150)).argmin()])


def _draw_scale(canvas: np.ndarray, say, row: GridRow, scale: tuple[float, float] | None, x: int, top: int, height: int) -> None:
    """A colour bar or the scale in words at the right end of a row."""
    images = [image for image in row.images if image is not None]
    if row.kind == "rgb" or not images:
        return
    if scale is None:
        text = ["all zero"] if any(np.isfinite(image).any() for image in images) else ["none", "finite"]
        say(x, top + height / 2, text, 11, color=_QUIET, va="center")
    elif row.kind == "signed":
        say(x, top + height / 2, ["grey: 0", f"\N{PLUS-MINUS SIGN} {_number(scale[1])}"], 11, va="center", linespacing=1.5)
    else:
        low, high = scale
        ramp = np.linspace(255, 0, height).round().astype(int)
        canvas[top : top + height, x : x + 12] = _cividis()[ramp][:, None]
        decades = [10.0**k for k in range(int(np.floor(np.log10(low))), int(np.ceil(np.log10(high))) + 1)]
        at = {value: (1 - np.log(value / low) / np.log(high / low)) * height for value in (high, low, *decades) if low <= value <= high}
        for value, y in at.items():
            end = value in (low, high)
            if end or 16 < y < height - 16:
                # inside the bar's ends, so that rows do not run into one another
                say(x + 16, top + min(max(y, 5), height - 6), [_number(value, 2)], 11, va="center_baseline")
                canvas[min(top + int(y), top + height - 1), x + 12 : x + 15] = 90


def _cividis() -> np.ndarray:
    """(256, 3) uint8."""
    return to_uint8(matplotlib.colormaps["cividis"](np.arange(256))[None, :, :3])[0]


def _number(value: float, digits: int = 3) -> str:
    """A number as short as its digits allow: 0.0123, 4.5e-6."""
    if value == 0 or 1e-3 <= abs(value) < 10.0 ** max(digits, 3) or not np.isfinite(value):
        return f"{value:.{max(digits, 3) if abs(value) >= 100 else digits}g}"
    mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
    mantissa = mantissa.rstrip("0").rstrip(".") if "." in mantissa else mantissa
    return f"{mantissa}e{int(exponent)}"


def _decimals(values: Sequence[float]) -> str:
    """A format that gives the largest of the values three digits and all of them the same decimals."""
    largest = max((abs(value) for value in values if np.isfinite(value)), default=0) or 1.0
    return f".{max(2 - int(np.floor(np.log10(largest))), 0)}f" if 1e-3 <= largest < 1e6 else ".2e"


def _share(value: float) -> str:
    return f"{100 * value:.2g} %" if value < 0.99 else f"{100 * value:.4g} %"


def _edges(values: np.ndarray, count: int, log: bool) -> np.ndarray:
    """Ascending edges of `count` bins over positive values, of a width also where all are equal."""
    high = float(values.max())
    low = max(float(values.min()), high * 1e-12)
    if low > high * (1 - 1e-6):
        low, high = low / 1.1, high * 1.1
    return np.geomspace(low, high, count + 1) if log else np.linspace(low, high, count + 1)


def _apart(places: np.ndarray, log: bool) -> bool:
    """Whether the places on an axis are few and far enough from one another to be its ticks."""
    if not 2 <= len(places) <= 10:
        return False
    places = np.log(places) if log else places
    return np.diff(places).min() > 0.06 * (places[-1] - places[0])


def _colored(names, ordered: bool):
    """(name, colour, line style) of each series; the line style changes where colours come again."""
    names = list(names)
    for k, name in enumerate(names):
        if ordered:
            # up to 0.9: the lightest yellow is lost on white
            yield name, matplotlib.colormaps["cividis"](0.9 * k / max(len(names) - 1, 1)), "-"
        else:
            yield name, OKABE_ITO[k % len(OKABE_ITO)], _STYLES[k // len(OKABE_ITO) % len(_STYLES)]


def _chart(title: str, xlabel: str, ylabel: str, height: float = 4.5):
    """A figure, 960 pixels wide and `height` inches high, and its axes."""
    figure = Figure(figsize=(7.5, height), dpi=_DPI, layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#dddddd", lw=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=8, colors=_INK)
    figure.suptitle("\n".join(_Ruler().wrapped(title, 900, 15)), fontsize=_points(18), weight="bold", color=_INK, parse_math=False)
    axes.set_xlabel(xlabel, fontsize=9, color=_INK, parse_math=False)
    axes.set_ylabel(ylabel, fontsize=9, color=_INK, parse_math=False)
    return figure, axes


def _mark(axes, marks: Mapping[str, float]) -> None:
    """Vertical lines with their text above the chart, higher where it would run into another's."""
    if not marks:
        return
    ends, log = (*axes.get_xlim(), *marks.values()), axes.get_xscale() == "log"
    lowest, highest = axes.set_xlim(min(ends), max(ends))
    ruler, taken = _Ruler(), []  # right end of the last text at each level, in pixels
    for name, value in sorted(marks.items(), key=lambda mark: mark[1]):
        share = np.log(value / lowest) / np.log(highest / lowest) if log else (value - lowest) / (highest - lowest)
        # A chart is about 870 of the figure's 960 pixels wide.
        left, half = share * 870, ruler.width(name, 14) / 2
        level = next((k for k, end in enumerate(taken) if end < left - half), len(taken))
        taken[level : level + 1] = [left + half + 10]
        top = 1.01 + 0.05 * level
        across = axes.get_xaxis_transform()
        axes.plot([value, value], [0, top], color=_INK, lw=1, ls=(0, (4, 3)), transform=across, clip_on=False)
        text = axes.text(value, top, name, transform=across, ha="center", va="bottom", fontsize=8, color=_INK, parse_math=False)
        text.set(zorder=5, path_effects=[withStroke(linewidth=3, foreground="white")])


def _legend(figure: Figure, axes) -> None:
    """Under the chart, where it hides nothing."""
    handles, labels = axes.get_legend_handles_labels()
    if not handles:
        return
    columns = min(len(handles), 960 // (max(_Ruler().width(label, 14) for label in labels) + 70), 4)
    legend = figure.legend(handles, labels, loc="outside lower center", ncols=max(columns, 1), fontsize=8, frameon=False, handlelength=3)
    for text in legend.get_texts():
        text.set_parse_math(False)


def _say_empty(axes, text: str) -> None:
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", fontsize=10, color=_QUIET)


def _points(pixels: float) -> float:
    return pixels * 72 / _DPI


def _drawn(figure: Figure) -> np.ndarray:
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()
