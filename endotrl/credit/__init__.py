# SPDX-License-Identifier: Apache-2.0
r"""
Credit assignment as pure tensor functions: from token rewards to token advantages. No models, no TRL.

Conventions, for all functions:

- Shapes: `B` completions, `T` positions of the padded completion, `K` segments (sentences).
- `mask` is boolean of shape `(B, T)`, `True` where the policy wrote the token. `False` is padding (on either side) or
  a token from another source, such as a tool result: a hole. Values at such positions are never read, even if NaN, and
  results there are 0.
- Recurrences skip holes as if they were cut out: the token after a hole follows the token before it, at a distance of
  one discount. Time is counted in tokens of the policy.
- Computed and returned in float32, whatever the input's dtype. Discounts are applied by a backward recurrence, never
  as $\gamma^t$ of an absolute position, which underflows.
"""

from .advantages import generalized_advantage_estimate, group_baseline, returns_to_go, whiten
from .segments import (
    pool_by_segment,
    segment_ids_from_ends,
    spread_over_segments,
    start_of_segment,
    sum_by_segment,
)


__all__ = [
    "generalized_advantage_estimate",
    "group_baseline",
    "pool_by_segment",
    "returns_to_go",
    "segment_ids_from_ends",
    "spread_over_segments",
    "start_of_segment",
    "sum_by_segment",
    "whiten",
]
