# SPDX-License-Identifier: Apache-2.0
"""Endogenous reward for `trl grpo`, with its settings from environment variables."""

import os
from collections.abc import Mapping
from functools import cached_property
from typing import Any

from ..frozen.served import ServedModel, is_url
from ..frozen.served.client import API_KEY
from .endogenous import EndogenousReward
from .protocol import DenseScores
from .settings import SETTINGS


class _EnvironmentReward:
    """
    Endogenous reward for `trl grpo --reward_funcs endotrl.rewards.endogenous_reward`, which takes a ready callable
    without parameters: created on first use from the environment variables that the `env:` block of TRL's YAML sets.
    """

    __name__ = "endogenous_reward"

    @cached_property
    def _reward(self) -> EndogenousReward:
        return reward_from_environment(os.environ)

    def __call__(self, **kwargs: Any) -> list[float | None]:
        return self._reward(**kwargs)

    def outcome_and_token_rewards(self, **kwargs: Any) -> DenseScores:
        return self._reward.outcome_and_token_rewards(**kwargs)


_PARAMETERS = ("model", *(setting.name for setting in SETTINGS.values() if "environment" not in setting.absent))


def reward_from_environment(environ: Mapping[str, str]) -> EndogenousReward:
    """Returns an [`EndogenousReward`] with the variables `ENDOTRL_<PARAMETER>` as arguments."""
    settings: dict[str, Any] = {}
    for key, value in environ.items():
        # The latter two belong to the quickstart model and to servers.
        if not key.startswith("ENDOTRL_") or key in ("ENDOTRL_CACHE", API_KEY):
            continue
        parameter = key.removeprefix("ENDOTRL_").lower()
        if parameter not in _PARAMETERS:
            known = ", ".join(f"ENDOTRL_{name.upper()}" for name in _PARAMETERS)
            raise ValueError(
                f"The environment variable {key} is not a setting of the endogenous reward. The settings are {known}."
            )
        try:
            settings[parameter] = value if parameter == "model" else SETTINGS[parameter].read(value)
        except ValueError as error:
            raise ValueError(f"The environment variable {key} is {value!r}, but it {error}.") from error
    if "model" not in settings:
        raise ValueError(
            "`endotrl.rewards.endogenous_reward` reads its settings from environment variables, but ENDOTRL_MODEL, "
            "the path or hub id of the frozen model, is not set. Set it in TRL's YAML file: "
            "`env: {ENDOTRL_MODEL: <model>}`."
        )
    if is_url(settings["model"]):
        settings["model"] = ServedModel(settings["model"], asynchronous=False)  # TRL calls the object below
    return EndogenousReward(**settings)


endogenous_reward = _EnvironmentReward()
