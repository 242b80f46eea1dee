# SPDX-License-Identifier: Apache-2.0
"""What all functions of this package do with what the mask hides."""

import torch
from torch import Tensor


def masked(name: str, values: Tensor, mask: Tensor) -> Tensor:
    """`values` in float32, and 0 where `mask` is `False`."""
    if values.ndim != 2 or values.shape != mask.shape:
        raise ValueError(
            f"`{name}` has shape {tuple(values.shape)} and `mask` {tuple(mask.shape)}, but both must be "
            "(completions, tokens)."
        )
    if mask.dtype != torch.bool:
        raise ValueError(f"`mask` is {mask.dtype}, but it must be bool: `True` where the policy wrote the token.")
    return torch.where(mask, values.float(), 0.0)
