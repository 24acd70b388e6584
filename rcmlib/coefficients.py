"""The four scalars that turn a network F into a consistency model, in three conventions.

    f(x, t) = c_skip(t)·x + c_out(t)·F(c_in(t)·x, c_noise(t))

`edm`             Karras et al. 2022 (arXiv 2206.00364, table 1); t is the noise level σ.
`trigflow`        Lu & Song 2024 (sCM, arXiv 2410.11081, eq. 5); t is an angle, 0 … π/2.
`rectified_flow`  Zheng et al. 2025 (rCM, arXiv 2510.08431): a velocity network trained
                  with rectified flow, read in TrigFlow's time. Wan uses this one.

All are computed in float64, whatever came in: chapter 1 shows what float32 and bfloat16 lose.
"""

import math
from typing import NamedTuple

import torch


class Coefficients(NamedTuple):
    """c_skip, c_out, c_in, c_noise: floats, or float64 tensors of t's shape and device. (Inside
    torch.compile a number t gives tensors, too: of shape [], on the CPU.)"""

    c_skip: float | torch.Tensor
    c_out: float | torch.Tensor
    c_in: float | torch.Tensor
    c_noise: float | torch.Tensor


def edm(t: float | torch.Tensor, sigma_data: float = 1.0) -> Coefficients:
    """EDM's preconditioning at noise level t ≥ 0 (the σ of Karras et al. 2022).

    c_skip = σ_d²/(t²+σ_d²), c_out = σ_d·t/√(σ_d²+t²), c_in = 1/√(σ_d²+t²), c_noise = ¼·ln t.
    At t = 0: f = x exactly (and c_noise = −∞). As t → ∞: c_skip → 0 and c_out → σ_d.

    Raises TypeError if t is no real number or tensor of them, and ValueError if sigma_data
    is not a positive finite number or a float t is negative or not finite.
    """
    _positive("sigma_data", sigma_data)
    t64 = _float64(t, upper=math.inf)
    norm = torch.hypot(t64, torch.full_like(t64, sigma_data))  # √(σ_d²+t²), no overflow
    c_in = norm.reciprocal()
    return _like(t, (sigma_data / norm) ** 2, sigma_data * (t64 / norm), c_in, t64.log() / 4)


def trigflow(t: float | torch.Tensor, sigma_data: float = 1.0) -> Coefficients:
    """TrigFlow's preconditioning at angle t in [0, π/2] (tan t = σ/σ_d).

    c_skip = cos t, c_out = −σ_d·sin t, c_in = 1/σ_d, c_noise = t, for x_t = cos t·x₀ + sin t·z
    with z of standard deviation σ_d. Errors as `edm`'s; a float t beyond π/2 is a ValueError.
    """
    _positive("sigma_data", sigma_data)
    t64 = _float64(t, upper=math.pi / 2)
    c_in = torch.full_like(t64, 1 / sigma_data)
    return _like(t, t64.cos(), -sigma_data * t64.sin(), c_in, t64.clone())


def rectified_flow(t: float | torch.Tensor) -> Coefficients:
    """A rectified-flow network in TrigFlow time t in [0, π/2] (what rCM does with Wan).

    c_skip = c_in = 1/(cos t + sin t), c_out = −sin t/(cos t + sin t), and c_noise is
    rectified flow's own time s = sin t/(cos t + sin t) in [0, 1]. Data has σ_d = 1.
    Errors as `trigflow`'s.
    """
    t64 = _float64(t, upper=math.pi / 2)
    c_skip = 1 / (t64.cos() + t64.sin())
    s = t64.sin() * c_skip
    return _like(t, c_skip, -s, c_skip.clone(), s)


def _positive(name: str, value: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    if not (value > 0 and math.isfinite(value)):
        raise ValueError(f"{name} must be positive and finite, got {value}")


def _float64(t: float | torch.Tensor, upper: float) -> torch.Tensor:
    # The values of a tensor are not looked at: that would make a GPU wait.
    if isinstance(t, torch.Tensor):
        if t.is_complex() or t.dtype == torch.bool:
            raise TypeError(f"t must hold real numbers, got dtype {t.dtype}")
        return t.double()
    check_number(t, upper)
    if torch.compiler.is_compiling():  # a product keeps t open: else a graph for each number
        return torch.ones((), dtype=torch.float64, device="cpu") * t
    return torch.tensor(t, dtype=torch.float64, device="cpu")


def check_number(t: float, upper: float = math.inf) -> float:
    """TypeError or ValueError unless t is a finite number from 0 to upper."""
    if isinstance(t, bool) or not isinstance(t, (int, float)):
        raise TypeError(f"t must be a number or a torch.Tensor, got {type(t).__name__}")
    if not (0 <= t <= upper and t < math.inf):
        raise ValueError(f"t must be finite and in [0, {upper:.6g}], got {t}")
    return t


def _like(t: float | torch.Tensor, *values: torch.Tensor) -> Coefficients:
    if isinstance(t, torch.Tensor) or torch.compiler.is_compiling():
        return Coefficients(*values)
    return Coefficients(*(value.item() for value in values))
