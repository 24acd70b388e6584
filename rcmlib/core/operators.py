"""Registers the operators with `torch.library`: torch.compile and the dispatcher know them."""

from collections.abc import Callable

import torch

LIBRARY = torch.library.Library("rcmlib", "DEF")


def operator(function: Callable) -> Callable:
    """Registers `_name` as the operator torch.ops.rcmlib.name, on every device.

    The schema comes from the annotations; nothing is written to and no result is an argument.
    `torch.library.custom_op` does the same, but wraps every call in Python, three times over,
    and looks for aliases among its results; that takes longer than all checks of the input.
    Gradients are the business of the functions that call the operators: a backward pass
    through an operator itself raises an error.
    """
    name = function.__name__.removeprefix("_")
    schema = torch.library.infer_schema(function, mutates_args=())
    LIBRARY.define(name + schema, tags=torch.Tag.pt2_compliant_tag)
    LIBRARY.impl(name, function, "CompositeExplicitAutograd")

    def backward(_context, *_gradients):
        raise RuntimeError(
            f"torch.ops.rcmlib.{name} has no autograd formula; call the function of rcmlib "
            "that uses it"
        )

    torch.library.register_autograd(f"rcmlib::{name}", backward, lib=LIBRARY)
    return function
