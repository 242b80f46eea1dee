# SPDX-License-Identifier: Apache-2.0
"""Alarm thresholds of the collapse monitor, with the origin of each number."""

from dataclasses import dataclass


# Logged steps before anything is judged; 7 differences give the noise of a step to within about 30%.
WARMUP = 8
# The same for a change since the first policy, which needs no level: healthy runs at a learning rate of 3e-4 lost 7 to
# 12 points in Adam's first update, and had recovered most of them by the fourth.
CHANGE_WARMUP = 6
# The same while the trained reward is not higher where the held-out one is: a fall does then not recover.
EARLY_WARMUP = 3
# CUSUM with allowance 0.75, in standard deviations (Page 1954), at which a drift counts as a symptom: by Siegmund's
# approximation, noise reaches it once in 800,000 steps.
DRIFT_EVIDENCE = 8.0
# Standard errors at which falls of a held-out reward and of the completions' log-probability under the first policy,
# which rises in healthy runs, raise the alarm together. Chosen on the runs of seeds 0 to 2. Simulated: if nothing
# changes, noise reaches it in 3 of 150 runs of 300 steps (in 2 of them, `evidence` alone), and in 3 of 800 resampled
# healthy runs (7).
BOTH_EVIDENCE = 3.0
# Standard errors of a fall on `HeldOut` questions, in two consecutive evaluations, which share questions and first
# answers; and of many evaluations, by their noise.
ASKED_EVIDENCE = 3.0
# Symptoms that are not a collapse by themselves: a rise of the fractions of truncated completions and of repeated
# 4-grams (below 0.05 in ordinary prose; https://huggingface.co/papers/2603.08660), a fall of the frozen model's
# log-probability per token, entropy relative to its first level (0.14 and more in healthy runs) with so many distinct
# completions per group, and the correlation of reward and length within groups.
CLIPPED_RISE, REPETITION_RISE, LOG_PROB_FALL = 0.5, 0.3, 0.5
ENTROPY_RATIO, DISTINCT_COMPLETIONS, LENGTH_CORRELATION = 0.02, 1.1, 0.9


@dataclass(frozen=True)
class CollapseThresholds:
    r"""
    Thresholds of [`CollapseMonitor`]. "Measured" means chosen on the runs of `docs/results/collapse.md`.

    Args:
        held_out_fall (`float`, *optional*, defaults to `0.02`):
            Minimum fall of a held-out reward below its best level. Our choice: less than half of the five points
            before which a collapse should be detected.
        evidence (`float`, *optional*, defaults to `5.0`):
            Evidence, in standard errors, at which a falling held-out reward alone raises the alarm. Simulated: since
            many comparisons are made, 1 of 240 healthy runs of 1,000 steps reached it.
        evidence_with_symptom (`float`, *optional*, defaults to `4.0`):
            The same if the trained reward prefers lower held-out rewards, or there is a symptom that would raise the
            alarm without a held-out reward. Simulated: noise alone reaches it in up to two thirds of runs of 1,000
            steps, but these had no symptom.
        evaluation_fall (`float`, *optional*, defaults to `0.05`):
            Fall of a held-out reward on the evaluation set, in two consecutive evaluations. Our choice: five points,
            which is two standard errors with 400 answers or more.
        first_log_prob_fall (`float`, *optional*, defaults to `0.02`):
            Minimum fall of the log-probability of the completions under the first policy, relative to its own
            completions, in nats per token, that raises the alarm without a held-out reward. Measured: it falls about
            as much as the accuracy, and rises in healthy runs.
        log_prob_drift (`float`, *optional*, defaults to `0.05`):
            The same for the mean over a batch, in nats per token, if it falls by more than its noise. Measured: it
            rises in healthy runs on rewards of a frozen model.
        length_ratio (`float`, *optional*, defaults to `0.33`):
            Mean length, relative to its first level, below which answers have collapsed: the outcome of probability
            rewards (https://huggingface.co/papers/2603.08660). Our choice: verbose models that learn to be brief halve
            their length.
        kl (`float`, *optional*, defaults to `1.0`):
            KL divergence from the reference model, in nats per token. Measured: 0.05 in a healthy run with beta 0.1. A
            collapse has been reported with a spike (https://github.com/sunblaze-ucb/Intuitor/issues/23).
        patience (`int`, *optional*, defaults to `3`):
            Number of consecutive logged steps with a symptom before it raises the alarm. Our choice.

    Raises:
        `ValueError`: If a number is not positive.
    """

    held_out_fall: float = 0.02
    evidence: float = 5.0
    evidence_with_symptom: float = 4.0
    evaluation_fall: float = 0.05
    first_log_prob_fall: float = 0.02
    log_prob_drift: float = 0.05
    length_ratio: float = 0.33
    kl: float = 1.0
    patience: int = 3

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not value > 0:
                raise ValueError(f"`{name}` must be positive, got {value}.")
