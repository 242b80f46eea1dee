# SPDX-License-Identifier: Apache-2.0
"""W&B workspace for training runs, with curves grouped by question."""

from typing import Any


NAME = "endotrl"
# By section, panels with their metrics, as regular expressions (RE2's: without lookaround) for the part after `train/`
# or `eval/`. The first two sections are open.
LAYOUT = {
    "1 Is it learning?": {
        "Held-out accuracy": r"collapse/held_out/.*|rewards/[^/]*accuracy[^/]*/mean|accuracy",
        "Reward, as trained": r"reward|token_rewards/.*/mean",
        "Rewards by function": r"rewards/.*/mean",
        "KL to the reference": r"kl|objective/kl|ppo/(kl_.*|approx_kl)",
        "Length of completions": r"completions/(mean|min|max).*length",
        "Cut off at the limit": r"completions/clipped_ratio|endogenous_reward/truncated_fraction",
    },
    "2 Is it collapsing?": {
        "Alarm, and symptoms": r"collapse/(alarm|symptoms)",
        "Evidence of a fall, in standard errors": r"collapse/evidence",
        "Held-out reward against the first policy": r"collapse/((asked_)?change/.*|reward_change)",
        "Does the reward agree with the held-out one?": r"collapse/(agreement|slope).*",
        "Standard errors": r"collapse/.*_error.*",
        "Repetition": r"collapse/repetition",
        "Different completions per group": r"collapse/(distinct_completions|reward_is_verdict)",
        "Entropy": r"entropy|endogenous_reward/entropy",
        "Correlation with length and probability": r".*/(length|probability)_correlation",
    },
    "3 What does the reward look at?": {
        "Per token": r"endogenous_reward/(reward|log_prob)_per_token",
        "Soft value": r"endogenous_reward/soft_value",
        "Corrections": r"endogenous_reward/(correction|length_slope).*",
        "Spread within groups": r"reward_std|frac_reward_zero_std|rewards/.*/std|margin|mean_reward",
        "Advantages": r"advantage/.*|ppo/advantages_.*",
    },
    "4 Optimization": {
        "Loss": r"loss|ppo/(policy|value)_loss",
        "Gradient norm": r"grad_norm",
        "Learning rate": r"learning_rate",
        "Clipping": r"clip_ratio/.*|ppo/value_clip_ratio",
        "Critic": r"ppo/(explained_variance|values_mean|returns_.*)",
    },
    "5 Speed and memory": {
        "Tokens per second": r"perf/tokens_per_second",
        "Seconds per step": r"perf/seconds_per_step|step_time",
        "Memory, GiB": r"perf/memory_gib",
        "Tokens seen": r"num_tokens",
    },
}


def make_workspace(entity: str, project: str) -> Any:
    """The workspace, not saved yet. `ImportError` if wandb-workspaces is not installed."""
    try:
        from wandb_workspaces.reports.v2 import LinePlot
        from wandb_workspaces.workspaces import Section, Workspace
    except ImportError as error:
        raise ImportError(
            "The workspace requires wandb-workspaces, which is not installed. Run `pip install 'endotrl[wandb]'`."
        ) from error
    sections = [
        Section(
            name=name,
            is_open=name.startswith(("1", "2")),
            panels=[
                LinePlot(title=title, x="train/global_step", y=[], metric_regex=f"^(train|eval)/({metrics})$")
                for title, metrics in panels.items()
            ],
        )
        for name, panels in LAYOUT.items()
    ]
    return Workspace(entity=entity, project=project, name=NAME, sections=sections)
