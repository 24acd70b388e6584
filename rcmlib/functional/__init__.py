"""The public operations: check the input, pick the kernel, register with `torch.library`.

Every bad input ends here, in a TypeError or ValueError that names the argument, says what
came and what is allowed. Nothing has been written by then. One file an operation; each holds
its public function, its registered operators and its gradient.
"""

from rcmlib.functional.attention import attention, rcm_attention
from rcmlib.functional.projection import gated_projection, rcm_projection
from rcmlib.functional.sage import rcm_sage_attention, sage_attention
from rcmlib.functional.skip import rcm_skip

__all__ = [
    "attention",
    "gated_projection",
    "rcm_attention",
    "rcm_projection",
    "rcm_sage_attention",
    "rcm_skip",
    "sage_attention",
]
