"""Switches a model's attention and its residual to the fused kernels, in place, and back.

    report = fuse(model)      # what was replaced, and why the rest was left
    unfuse(model)             # the original again

A module is replaced by giving it another class, which keeps every parameter, buffer, hook and
name, and differs in `forward` only. So the state_dict, optimisers, copies, pickles and
torch.compile go on working, and undoing is exact. What is left is left for a reason, which the
report states: the fused forward must run whatever hooks and adapters the original runs.
"""

import re
import sys
from typing import NamedTuple

import torch
from torch import nn

from rcmlib.attention import HEAD_DIMS
from rcmlib.core.checks import DTYPES, why_called
from rcmlib.modules import BaselineRCMAttention, FusedRCMAttention, TritonFusedRCMAttention
from rcmlib.wan import FusedWanBlock, WanBlock, WanSelfAttention


class Row(NamedTuple):
    """One module: its name in the model, its class, and the class it got or None, with why."""

    name: str
    kind: str
    became: str | None
    why: str

    @property
    def outcome(self) -> str:
        return f"now {self.became}" if self.became else f"left: {self.why}"


class Report(NamedTuple):
    """What `fuse` or `unfuse` did, as str() a table: a row for each module that they know or
    that looks like attention."""

    rows: tuple[Row, ...]

    @property
    def replaced(self) -> tuple[Row, ...]:
        """The rows of the modules that changed."""
        return tuple(row for row in self.rows if row.became)

    @property
    def left(self) -> tuple[Row, ...]:
        """The rows of the modules that did not; `why` says the reason."""
        return tuple(row for row in self.rows if not row.became)

    def __str__(self) -> str:
        cells = [(row.name or "(the model)", row.kind, row.outcome) for row in self.rows]
        name, kind = (max((len(row[i]) for row in cells), default=0) for i in range(2))
        lines = [f"{a:{name}}  {b:{kind}}  {c}" for a, b, c in cells]
        return "\n".join([f"{len(self.replaced)} replaced, {len(self.left)} left", *lines])


def fuse(model: nn.Module) -> Report:
    """Replaces, in place, every module of the tree (model included) that has a fused form.

    BaselineRCMAttention and FusedRCMAttention compute like TritonFusedRCMAttention;
    WanBlock computes its attention like them, with the gated residual in the epilogue of o.
    Outputs and gradients change by rounding only. Modules already fused stay.
    Nothing is launched or moved; the kernels' own conditions (Triton, a device, a dtype)
    are checked when the model is called, and what is attached later to a layer whose weights
    they read (an adapter, a hook) is then called. TypeError if model is no torch.nn.Module.
    """
    rows, inside = [], set()
    for name, module in _modules(model):
        kind = type(module).__name__
        known = next((known for known in RECIPES if isinstance(module, known)), None)
        if known is not None:
            inside |= {id(part) for part in _parts(module, known).values()}
        elif id(module) in inside or not re.search("attention|attn", kind, re.IGNORECASE):
            continue
        why = _why_not(module, known)
        if not why:
            module.__class__ = RECIPES[known].fused
        rows.append(Row(name, kind, None if why else type(module).__name__, why))
    return _report(rows)


def unfuse(model: nn.Module) -> Report:
    """Undoes `fuse`, in place: every module of the tree that it replaced gets its class back.

    What was built as a TritonFusedRCMAttention, or wrapped in a subclass since, is left.
    TypeError if model is no torch.nn.Module.
    """
    origin = {recipe.fused: known for known, recipe in RECIPES.items()}
    rows = []
    for name, module in _modules(model):
        kind = type(module).__name__
        if type(module) in origin:
            module.__class__ = origin[type(module)]
            rows.append(Row(name, kind, type(module).__name__, ""))
        elif isinstance(module, FUSED):
            rows.append(Row(name, kind, None, "it was not made by fuse"))
    return _report(rows)


# ---- what can be replaced, by what ----


class TritonFromBaseline(TritonFusedRCMAttention, BaselineRCMAttention):
    """A BaselineRCMAttention that computes with the kernels."""


class TritonFromFused(TritonFusedRCMAttention, FusedRCMAttention):
    """A FusedRCMAttention that computes with the kernels."""


class _Recipe(NamedTuple):
    fused: type[nn.Module]
    # The parts whose weights the kernels read without calling the part, and the class that
    # each must have exactly: a subclass or a stand-in (LoRA, quantised) computes more.
    # The last is attention's output projection, which tells the head dimension.
    bypassed: dict[str, type[nn.Module]]


RECIPES = {
    BaselineRCMAttention: _Recipe(TritonFromBaseline, {"proj": nn.Linear}),
    FusedRCMAttention: _Recipe(TritonFromFused, {"proj": nn.Linear}),
    WanBlock: _Recipe(FusedWanBlock, {"self_attn": WanSelfAttention, "self_attn.o": nn.Linear}),
}
FUSED = (TritonFusedRCMAttention, *(recipe.fused for recipe in RECIPES.values()))


def _report(rows: list[Row]) -> Report:
    """Of these rows. If a class changed: graphs of earlier calls do not look at it, so all that
    torch.compile has made is forgotten, and made again at the next call."""
    report = Report(tuple(rows))
    if report.replaced and "torch._dynamo" in sys.modules:
        torch.compiler.reset()
    return report


def _modules(model: nn.Module) -> list[tuple[str, nn.Module]]:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    return list(model.named_modules())


def _parts(module: nn.Module, known: type[nn.Module]) -> dict[str, nn.Module | None]:
    """What a fused forward would bypass, by its name; None where it is missing."""
    inner = dict(module.named_modules(remove_duplicate=False))
    return {name: inner.get(name) for name in RECIPES[known].bypassed}


def _why_not(module: nn.Module, known: type[nn.Module] | None) -> str:
    """Why this module keeps its forward; empty if nothing stands against a fused one."""
    if type(module) in FUSED:
        return "it is fused already"
    if type(module) is WanSelfAttention:
        return "the residual to fuse is outside it: only a whole WanBlock is replaced"
    if known is None:
        return "attention of a kind that fuse does not know"
    if type(module) is not known:
        return f"a subclass of {known.__name__} may compute something else"
    if "forward" in vars(module):
        return "its forward was replaced on the instance"
    for name, part in _parts(module, known).items():
        if why := why_called(part, RECIPES[known].bypassed[name], name):
            return why
    for name, parameter in module.named_parameters():
        if parameter.is_floating_point() and parameter.dtype not in DTYPES:
            allowed = ", ".join(str(d).removeprefix("torch.") for d in DTYPES)
            return f"{name} is {parameter.dtype}, the kernels take {allowed}"
    projection = list(RECIPES[known].bypassed)[-1]
    attention = module.get_submodule(projection.rpartition(".")[0])
    head_dim = module.get_submodule(projection).in_features // attention.num_heads
    if head_dim not in HEAD_DIMS:
        return f"head dimension {head_dim}, the kernels take {HEAD_DIMS[0]} to {HEAD_DIMS[-1]}"
    return ""
