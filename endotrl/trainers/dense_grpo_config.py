# SPDX-License-Identifier: Apache-2.0
"""Configuration of [`DenseGRPOTrainer`]."""

from dataclasses import dataclass, field
from typing import Literal, get_args

from trl import GRPOConfig

from ..bellman import check_discount
from ..checks import check_choice
from ..field_help import with_help


Credit = Literal["token", "sentence", "outcome"]
Baseline = Literal["group", "leave_one_out"]


@with_help
@dataclass
class DenseGRPOConfig(GRPOConfig):
    r"""
    Configuration class for the [`DenseGRPOTrainer`].

    It has all parameters of [`~trl.GRPOConfig`], and those below.

    Parameters:
        credit (`str`, *optional*, defaults to `"token"`):
            Unit of credit assignment. Each unit is credited with the dense rewards from it on: `"token"`;
            `"sentence"`, where the tokens of a sentence share one advantage; or `"outcome"`, where all tokens of a
            completion do, as in GRPO.
        gamma (`float`, *optional*, defaults to `1.0`):
            Discount of dense rewards from one unit to the next, in $(0, 1]$. Below 1, credit is more local and less
            noisy, but biased: the objective is no longer the total reward. Rewards that are not dense are never
            discounted.
        baseline (`str`, *optional*, defaults to `"group"`):
            Baseline subtracted at each unit: `"group"`, the mean of the group, as in GRPO; or `"leave_one_out"`, the
            mean of the other completions, as in RLOO. It makes advantages $G / (G - 1)$ times as large, with $G$ =
            `num_generations`, which matters relative to a KL penalty.
        segmenter (`str`, *optional*, defaults to `"rules"`):
            Segmentation of completions into sentences, for `credit="sentence"`: `"rules"`, or the name or path of a
            SaT model. The trainer also accepts a segmenter object.
    """

    credit: str = field(default="token", metadata={"choices": list(get_args(Credit))})
    gamma: float = 1.0
    baseline: str = field(default="group", metadata={"choices": list(get_args(Baseline))})
    segmenter: str = "rules"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_discount("gamma", self.gamma)
        check_choice("credit", self.credit, get_args(Credit))
        check_choice("baseline", self.baseline, get_args(Baseline))
