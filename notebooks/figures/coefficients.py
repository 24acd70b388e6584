"""Chapter 1: the coefficients over time, one ray through three conventions, float64, places."""

import math

import numpy as np
import torch
from matplotlib.patches import FancyBboxPatch

from notebooks.figures.style import PALETTE, arrow, new_figure
from rcmlib.coefficients import edm, rectified_flow, trigflow

SKIP, OUT = PALETTE["x"], PALETTE["f"]  # c_skip weighs x, c_out weighs F


def coefficients_over_time():
    """c_skip and c_out of the three parameterisations over the angle t, at σ_d = 1."""
    fig, axes = new_figure(7.6, 3.3, ncols=3, sharey=True)
    t = torch.linspace(0, math.pi / 2, 200, dtype=torch.float64)
    panels = (
        ("EDM", edm(t.tan()), (1.0, 0.42), (0.42, 0.55)),
        ("TrigFlow", trigflow(t), (0.85, 0.75), (0.85, -0.62)),
        ("Rectified flow", rectified_flow(t), (0.75, 0.84), (0.85, -0.30)),
    )
    for ax, (title, c, at_skip, at_out) in zip(axes, panels, strict=True):
        ax.plot(t, c.c_skip, color=SKIP)
        ax.plot(t, c.c_out, color=OUT)
        ax.text(*at_skip, "c_skip", color=SKIP, weight="bold")
        ha = "right" if title == "EDM" else "left"
        ax.text(*at_out, "c_out", color=OUT, weight="bold", ha=ha)
        ax.axhline(0, color="black", lw=0.8)
        ax.axvline(math.atan(0.75), color=PALETTE["neutral"], lw=1, ls=":")
        ax.set_xticks([0, math.pi / 4, math.pi / 2], ["0", "π/4", "π/2"])
        ax.set(xlabel="angle t", xlim=(0, math.pi / 2), ylim=(-1.1, 1.1))
        ax.set_title(title, loc="left", weight="bold", pad=8)
        top = ax.secondary_xaxis("top")
        top.set_xticks([0, math.atan(0.75), math.atan(3)], ["σ = 0", "0.75", "3"])
        top.spines["top"].set_visible(False)
        top.tick_params(length=0, labelsize=9)
    axes[0].set_ylabel("weight")
    return fig


def one_ray(sigma: float = 0.75):
    """The three x_t as points of one ray in the plane (weight of x₀, weight of the noise)."""
    fig, ax = new_figure(6.4, 4.1)
    t = math.atan(sigma)
    angle = np.linspace(0, math.pi / 2, 100)
    conventions = (
        ("EDM: (1, σ)", (np.ones(2), np.array([0, 1.12])), PALETTE["baseline"]),
        ("TrigFlow: (cos t, sin t)", (np.cos(angle), np.sin(angle)), PALETTE["out"]),
        ("rectified flow: (1 − s, s)", (np.array([1, 0]), np.array([0, 1])), OUT),
    )
    for _, (xs, ys), colour in conventions:
        ax.plot(xs, ys, color=colour)
    ax.text(1.03, 1.02, "EDM\n(1, σ)", color=PALETTE["baseline"], weight="bold")
    ax.text(0.50, 0.92, "TrigFlow\n(cos t, sin t)", color=PALETTE["out"], weight="bold")
    ax.text(
        0.03, 0.38, "rectified flow\n(1 − s, s)", color=OUT, weight="bold", rotation=0
    )
    ax.plot([0, 1.28], [0, 1.28 * sigma], color="black", lw=1.2, ls="--")
    norm = math.cos(t) + math.sin(t)
    points = (
        (1, sigma, PALETTE["baseline"], "x = 2.5", (0.05, -0.04)),
        (math.cos(t), math.sin(t), PALETTE["out"], "x = 2.0", (-0.25, 0.05)),
        (math.cos(t) / norm, math.sin(t) / norm, OUT, "x = 1.43", (0.09, -0.02)),
    )
    for px, py, colour, label, (dx, dy) in points:
        ax.plot(px, py, "o", color=colour, ms=8)
        ax.text(px + dx, py + dy, label)
    arc = np.linspace(0, t, 30)
    ax.plot(0.2 * np.cos(arc), 0.2 * np.sin(arc), color="black", lw=1)
    ax.text(0.22, 0.05, "t")
    ax.set(
        xlim=(0, 1.4), ylim=(0, 1.15), aspect="equal",
        xlabel="weight of the data $x_0$", ylabel="weight of the noise",
    )  # fmt: skip
    return fig


def cancellation():
    """The relative error of 1 − c_skip(t), subtracted in three precisions, over t."""
    fig, ax = new_figure(7.0, 3.5)
    t = torch.logspace(-5, -0.05, 400, dtype=torch.float64)
    rows = (
        (torch.bfloat16, PALETTE["f"], "bfloat16", (1.9e-1, 3e-1)),
        (torch.float32, PALETTE["baseline"], "float32", (2.2e-2, 6e-3)),
        (torch.float64, PALETTE["out"], "float64", (2.2e-2, 2e-11)),
    )
    for dtype, colour, name, at in rows:
        u = t.to(dtype)
        exact = u.double() ** 2 / (u.double() ** 2 + 1)
        error = ((1 - 1 / (u * u + 1)).double() / exact - 1).abs()
        ax.loglog(t, error.clamp(min=1e-16), color=colour, lw=1.2)
        ax.text(*at, name, color=colour, weight="bold")
    ax.text(1.2e-5, 3, "100 %: the result is 0", fontsize=9, va="bottom")
    ax.set(xlabel="t", ylabel="relative error of 1 − c_skip")
    ax.set(xlim=(1e-5, 1), ylim=(1e-16, 60))
    return fig


def three_places():
    """Where a skip acts: around a whole network, inside a block, around attention alone."""
    fig, ax = new_figure(7.6, 5.2)
    rcm = {"c_in": 1.15, "block 1": 3.0, "block 2 …": 4.85, "block L": 6.7}
    block = {"norm, QKV": 1.65, "attention": 4.2, "projection": 6.7}
    study = {"norm, QKV": 1.65, "attention": 5.6}
    titles = (
        "1  rCM: around the whole network, in latent space",
        "2  a Wan block: after the output projection",
        "3  this book's study: around attention alone",
    )
    _lane(
        ax, 7.4, titles[0], rcm, ("$x_t$", "× c_skip", "× c_out", "F", "$x_0$ estimate")
    )
    _lane(ax, 4.2, titles[1], block, ("x", "× 1", "× gate", "", "x + gate·proj(…)"))
    _lane(ax, 1.0, titles[2], study, ("x", "× c_skip", "× c_out", "F", "f"))
    for x, y, colour, words in (
        (
            6.5,
            4.2,
            PALETTE["compiled"],
            "the production case: the projection's epilogue",
        ),
        (
            5.4,
            1.0,
            PALETTE["fused"],
            "one kernel by chapter 6: the skip is its epilogue",
        ),
    ):
        edge = _box(x, y - 0.6, 10.0 - x, 1.2, "none", colour, ls="--")
        ax.add_patch(edge)
        ax.text(10.0, y - 0.72, words, ha="right", va="top", fontsize=9, color=colour)
    ax.set(xlim=(-0.2, 12.6), ylim=(-0.2, 9.5))
    ax.axis("off")
    return fig


def _box(x, y, width, height, fill, edge, **kw):
    style = "round,pad=0,rounding_size=0.12"
    return FancyBboxPatch((x, y), width, height, style, fc=fill, ec=edge, lw=1.4, **kw)


def _lane(ax, y, title, boxes, labels):
    start, skip, out, name, end = labels
    adder, width, at = 9.6, 1.55, 0.62
    ax.text(-0.1, y + 1.75, title, weight="bold", va="center")
    ax.text(0.3, y, start, ha="center", va="center", color=SKIP, weight="bold")
    for label, x in boxes.items():
        fill = PALETTE["qkv"] if label == "attention" else "#E8F0F7"
        ax.add_patch(_box(x, y - 0.42, width, 0.84, fill, "#5F6B76"))
        ax.text(x + width / 2, y, label, ha="center", va="center", fontsize=9)
        arrow(ax, (at, y), (x, y))
        at = x + width
    arrow(ax, (at, y), (adder - 0.24, y), OUT)
    middle = (at + adder - 0.3) / 2
    ax.text(middle, y + 0.1, out, ha="center", va="bottom", fontsize=9, color=OUT)
    ax.text(middle, y - 0.13, name, ha="center", va="top", fontsize=9, color=OUT)
    ax.plot([0.3, 0.3, adder], [y + 0.35, y + 1.1, y + 1.1], color=SKIP, lw=1.6)
    arrow(ax, (adder, y + 1.12), (adder, y + 0.24), SKIP)
    ax.text(5.0, y + 1.14, skip, ha="center", va="bottom", fontsize=9, color=SKIP)
    ax.plot(adder, y, "o", ms=15, mfc="white", mec="black")
    ax.text(adder, y - 0.02, "+", ha="center", va="center", fontsize=12)
    arrow(ax, (adder + 0.24, y), (adder + 0.8, y))
    ax.text(
        adder + 0.88,
        y,
        end,
        va="center",
        weight="bold",
        fontsize=9,
        color=PALETTE["out"],
    )
