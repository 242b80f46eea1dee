# SPDX-License-Identifier: Apache-2.0
"""endotrl: the reward model inside the language model, for TRL."""

import sys
from typing import TYPE_CHECKING

from ._lazy import attach
from ._moved import MovedModules


__version__ = "0.2.0"

__all__ = [
    "CollapseMonitor",
    "DenseGRPOConfig",
    "DenseGRPOTrainer",
    "EndogenousReward",
    "Forecast",
    "FrozenScorer",
    "HeldOut",
    "PPOConfig",
    "PPOTrainer",
    "SentenceReward",
    "SentenceRewardModel",
    "SentenceRewardTrainer",
    "SentenceRewardTrainerConfig",
    "ServedModel",
    "TokenStats",
    "__version__",
    "best_of_n",
    "diagnose",
    "forecast",
    "preference_pairs",
    "rank",
    "score_dataset",
]

if TYPE_CHECKING:
    from .forecasting.forecast import Forecast, forecast
    from .frozen.served import ServedModel
    from .monitoring.diagnosis import diagnose
    from .monitoring.held_out import HeldOut
    from .monitoring.monitor import CollapseMonitor
    from .rewards.endogenous import EndogenousReward
    from .rewards.sentence import SentenceReward
    from .scoring.scorer import FrozenScorer
    from .scoring.token_stats import TokenStats
    from .selection.datasets import best_of_n, preference_pairs, rank, score_dataset
    from .sentence.modeling import SentenceRewardModel
    from .sentence.trainer import SentenceRewardTrainer
    from .sentence.trainer_config import SentenceRewardTrainerConfig
    from .trainers.dense_grpo_config import DenseGRPOConfig
    from .trainers.dense_grpo_trainer import DenseGRPOTrainer
    from .trainers.ppo_config import PPOConfig
    from .trainers.ppo_trainer import PPOTrainer


# Resolved on first use (PEP 562), so that `import endotrl` and `endotrl --help` do not wait for torch.
__getattr__, __dir__ = attach(__name__, __all__)

sys.meta_path.insert(0, MovedModules())
