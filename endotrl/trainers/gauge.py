# SPDX-License-Identifier: Apache-2.0
r"""
Whether advantages depend on the constants that logits are only defined up to.

A constant $c(s)$ added to all logits of a state changes no probability, and adds $c(s)$ to the soft value $V(s)$. A
Bellman reward is $\alpha \log \hat\pi(a_h|s_h) + V(s_h) - \gamma V(s_{h+1})$. The soft values cancel from a return if
it discounts as the reward does, if $V$ is subtracted from it where it begins, and if it ends where the reward takes
the state for terminal.
"""

from collections.abc import Sequence
from typing import Any

from accelerate.logging import get_logger

from ..rewards.corrections import LengthControl
from ..rewards.endogenous import EndogenousReward


logger = get_logger(__name__)

REMEDY = "With `token_reward='log_prob'`, no setting does this."


def warn_of_constants(
    reward_funcs: Sequence[Any],
    gamma: float | None,
    *,
    sentences: bool = False,
    baseline: bool = True,
    bootstrap: bool = False,
    batch: bool = False,
) -> None:
    """
    Warns of each endogenous reward whose advantages would depend on constants in the frozen model's logits, with all
    reasons.

    `gamma` discounts the returns from one step to the next (`None`: completions are credited with their outcome), and
    a step is a token, or with `sentences` a sentence. `baseline`: the soft value is subtracted from the return;
    `bootstrap`: it is added to that of a completion that was cut off; `batch`: outcomes of different prompts are
    compared.
    """
    for reward in reward_funcs:
        if not isinstance(reward, EndogenousReward) or reward.token_reward != "bellman":
            continue
        reasons = []
        step = reward.rule.step_discount
        if sentences and gamma is not None and gamma < 1.0:
            reasons.append(
                "`gamma` discounts from sentence to sentence, and soft values change from token to token: use 1.0."
            )
        elif gamma is not None and abs(gamma * step - reward.gamma) > 1e-9:
            reasons.append(
                f"The discount of the returns is {gamma * step:g} and that inside the endogenous reward "
                f"{reward.gamma:g}: set both the same, so that soft values telescope."
            )
        is_read = gamma is None or isinstance(reward.correction, LengthControl)
        if is_read and abs(step - reward.gamma) > 1e-9:
            reasons.append(
                f"The outcome of a completion discounts by {step:g}, and `gamma` of the endogenous reward is "
                f"{reward.gamma:g}: set both the same."
            )
        elif gamma is None and batch and reward.aggregate == "discounted":
            reasons.append(
                "The discounted outcome contains the soft value of the prompt, and `scale_rewards='batch'` compares "
                "prompts: use 'group' or 'none'."
            )
        if reward.aggregate.startswith(("first", "min")):
            reasons.append(f"The aggregate '{reward.aggregate}' keeps the soft value of the state where it stops.")
        if not baseline:
            reasons.append(
                "`soft_value_baseline=False` leaves the soft value to the critic, which has to learn it: use `True`, "
                "the default."
            )
        if reward.truncation == "bootstrap" and not bootstrap:
            reasons.append(
                "The endogenous reward has `truncation='bootstrap'`, which subtracts the soft value of the state that "
                "a completion was cut off in: use 'terminal'."
            )
        if reasons:
            logger.warning(
                f"The advantages from '{reward.__name__}' depend on constants that the frozen model's logits may "
                f"contain. {' '.join(reasons)} {REMEDY}"
            )
