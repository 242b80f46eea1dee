# SPDX-License-Identifier: Apache-2.0
"""Model card section on a trained model's rewards."""

import json
from pathlib import Path
from typing import Any

from ..rewards import AccuracyReward, EndogenousReward, SentenceReward
from ..rewards.frozen_model_reward import FrozenModelReward


# Settings that do not change rewards.
NOT_SHOWN = ("max_tokens_per_batch", "trust_remote_code", "chat_template_kwargs", "processing_class", "length_slope")


def with_rewards(card: str, trainer: Any) -> str:
    """TRL's model card with a section on the rewards: frozen models, settings, and whether labels were used."""
    rewards = list(zip(trainer.reward_func_names, trainer.reward_funcs, trainer.reward_weights.tolist(), strict=True))
    lines = ["### Rewards", ""]
    if all(isinstance(reward, FrozenModelReward) for _, reward, weight in rewards if weight):
        lines += ["No labels and no reward model were used: the rewards come from a frozen language model.", ""]
    for name, reward, weight in rewards:
        use = f"weight {weight:g}" if weight else "weight 0: only logged"
        lines += [f"- `{name}` ({use}): {_described(reward)}"]
        if isinstance(reward, FrozenModelReward):
            settings = json.dumps(_settings(reward), indent=2, ensure_ascii=False, default=str)
            lines += ["", "  ```json", *(f"  {line}" for line in settings.splitlines()), "  ```", ""]
    lines += ["", f"KL penalty: `beta` {trainer.args.beta:g}.", "", ""]
    card = card.replace("[None](https://huggingface.co/None)", "a model in a local folder")
    before, heading, after = card.partition("### Framework versions")
    return before + "\n".join(lines) + heading + after


def _described(reward: Any) -> str:
    if isinstance(reward, FrozenModelReward):
        endogenous = "the [endogenous reward](https://huggingface.co/papers/2506.23235) of"
        kind = endogenous if isinstance(reward, EndogenousReward) else f"{type(reward).__name__} of endotrl with"
        return f"{kind} {_frozen(reward)}, with the settings"
    if isinstance(reward, SentenceReward):
        return "a sentence-level reward model trained on preferences"
    if isinstance(reward, AccuracyReward):
        return f"agreement with the answers in the column `{reward.column}` of the dataset"
    return "a reward function"


def _frozen(reward: FrozenModelReward) -> str:
    if reward.is_served:
        return repr(reward.model)
    # Of a folder, as in TRL's cards, only the last part is meaningful to others.
    path = Path(reward.config._name_or_path)
    name = f"`{path.name if path.is_dir() else path}`" if path.name else "a model without a name"
    return f"{name}, frozen" + (": the policy before training" if reward.is_shared else "")


def _settings(reward: FrozenModelReward) -> dict[str, Any]:
    settings = {key: value for key, value in vars(reward).items() if not key.startswith("_") and key not in NOT_SHOWN}
    if isinstance(reward, EndogenousReward):
        settings |= vars(settings.pop("rule"))
    if settings.get("aggregate") != "discounted":
        settings.pop("discount", None)
    return settings
