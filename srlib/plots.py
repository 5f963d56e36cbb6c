"""One style for every figure of the book, and the few plots that recur in it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import seaborn as sns
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator
from torch import Tensor

from .generators import check_whole

# Colour-blind safe (Okabe and Ito); opaque white ground, so that figures are legible on dark pages too.
PALETTE = sns.color_palette("colorblind")
# What training records of each batch, and what therefore fluctuates from update to update.
NOISY = ("loss", "mse", "spread")


def use_style() -> None:
    """Set the style of the book: call it once at the top of a notebook."""
    sns.set_theme(context="notebook", style="ticks", palette=PALETTE)
    mpl.rcParams.update(
        {
            "figure.dpi": 110,
            "figure.figsize": (7.0, 3.4),
            "figure.facecolor": "white",
            "savefig.facecolor": "white",
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.titlesize": "medium",
            "figure.constrained_layout.use": True,
            "animation.html": "none",
            "svg.hashsalt": "srlib",
        }
    )


def image_rows(rows: Mapping[str, Tensor], columns: int = 12) -> Figure:
    """Rows of images with their names on the left: name -> images [n, C, H, W] in [-1, 1], the first `columns` of each."""
    figure, axes = plt.subplots(len(rows), 1, figsize=(8, 0.78 * len(rows)), squeeze=False)
    for axis, (name, images) in zip(axes[:, 0], rows.items()):
        axis.imshow(_strip(images[:columns]), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
        axis.set_ylabel(name, rotation=0, ha="right", va="center")
        axis.set(xticks=[], yticks=[])
        sns.despine(ax=axis, left=True, bottom=True)
    return figure


def image_grid(images: Tensor, columns: int = 12) -> Figure:
    """A grid of images [n, C, H, W] in [-1, 1]."""
    check_whole("columns", columns)
    missing = -len(images) % columns  # places left over in the last row, white
    images = torch.cat([images, torch.ones_like(images[:1]).expand(missing, -1, -1, -1)])
    strips = [_strip(row) for row in images.split(columns)]
    figure, axis = plt.subplots(figsize=(8, 8 * len(strips) / columns))
    axis.imshow(np.concatenate(strips), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    axis.set_axis_off()
    return figure


def learning_curves(history: Mapping[str, Sequence[float]], names: Mapping[str, str], window: int = 25) -> Figure:
    """One panel per entry of `names` (history key -> axis label), over the updates.

    What varies from batch to batch (`NOISY`) is drawn pale, with its mean over the `window` updates around each point;
    settings such as sigma and the step size are drawn as they are. Positive curves that vary have a logarithmic axis.
    """
    figure, axes = plt.subplots(1, len(names), figsize=(3.1 * len(names), 2.9), squeeze=False)
    for axis, (key, label) in zip(axes[0], names.items()):
        values = np.asarray(history[key], dtype=float)
        shown = _centred_mean(values, window) if key in NOISY else values
        if key in NOISY:
            axis.plot(values, color=PALETTE[0], alpha=0.25, linewidth=0.8)
        sns.lineplot(x=np.arange(len(shown)), y=shown, ax=axis, color=PALETTE[0])
        axis.set(xlabel="update $t$", ylabel=label)
        if 0 < values.min() < values.max():
            readable_log_scale(axis, values.max() / values.min())
    return figure


def readable_log_scale(axis: Axes, ratio: float) -> None:
    """A logarithmic y axis with a few plain numbers, for values whose largest is `ratio` times their smallest."""
    axis.set_yscale("log")
    axis.yaxis.set_major_locator(LogLocator(subs=(1.0, 1.5, 2.0, 3.0, 5.0, 7.0) if ratio < 5 else (1.0, 2.0, 5.0)))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.yaxis.set_minor_locator(NullLocator())


def noise_scale_axis(axis: Axes) -> None:
    """A second axis on top that shows the step size s of Eq. (10) as the authors' noise scale, delta = sqrt(2 s)."""
    top = axis.secondary_xaxis("top", functions=(lambda s: np.sqrt(2 * np.abs(s)), lambda d: d**2 / 2))
    top.set_xlabel(r"noise scale $\delta$")
    if axis.get_xscale() == "log":
        low, high = np.sqrt(2 * np.asarray(axis.get_xlim()))
        ticks = [t for t in (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0) if low <= t <= high]
        top.set_xticks(ticks, [f"{t:g}" for t in ticks])
        top.xaxis.set_minor_locator(NullLocator())


def density_contours(axis: Axes, grid_x: Tensor, grid_y: Tensor, log_density: Tensor) -> None:
    """Filled contours of exp(log_density) [ny, nx], relative to its maximum."""
    density = (log_density - log_density.max()).exp()
    axis.contourf(grid_x, grid_y, density, levels=np.linspace(0.02, 1, 9), cmap="Blues", antialiased=True)


def _centred_mean(values: np.ndarray, window: int) -> np.ndarray:
    """Mean over the `window` values around each; towards the ends, over those of them that there are."""
    kernel = np.ones(min(window, len(values)))
    return np.convolve(values, kernel, "same") / np.convolve(np.ones_like(values), kernel, "same")


def _strip(images: Tensor) -> np.ndarray:
    """Images side by side with a thin light gap, as [H, W', 3] or [H, W'] in [0, 1]."""
    pixels = ((images.detach().cpu() + 1) / 2).clamp(0, 1).permute(0, 2, 3, 1).numpy()
    padded = np.pad(pixels, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=0.85)
    strip = np.concatenate(list(padded), axis=1)
    return strip if strip.shape[2] == 3 else strip[:, :, 0]
