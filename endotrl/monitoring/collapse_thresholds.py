# SPDX-License-Identifier: Apache-2.0
"""When the collapse monitor speaks, and where each number comes from."""

from dataclasses import dataclass, fields

from ..field_help import with_help


@with_help
@dataclass(frozen=True)
class CollapseThresholds:
    r"""
    Thresholds of [`CollapseMonitor`]. "Measured" means chosen on the runs of `docs/results/collapse.md`.

    Args:
        warmup (`int`, *optional*, defaults to `8`):
            Logged steps before anything is judged, which give the levels that symptoms are compared with. Measured:
            the noise of a step is known from 7 differences to about 30%.
        change_warmup (`int`, *optional*, defaults to `6`):
            Logged steps before a change since the first policy is judged: it needs no level to compare with, but
            Adam's first updates are erratic. Measured: healthy runs at a learning rate of 3e-4 lost 7 to 12 points in
            the first one, and had most of them back by the fourth.
        early_warmup (`int`, *optional*, defaults to `3`):
            As `change_warmup`, while the trained reward has not been higher, within groups, where the held-out one is
            (pooled over batches, by 2 standard deviations). What falls then is pushed there, or pushed nowhere, and
            does not come back by itself. Ours: the first batch is the first policy's own, which leaves two.
        held_out_fall (`float`, *optional*, defaults to `0.02`):
            Least fall of a held-out reward below its best level. Ours: less than half of the five points before which
            a collapse should be caught.
        evidence (`float`, *optional*, defaults to `5.0`):
            Evidence, in standard errors, at which a falling held-out reward alone raises the alarm. Simulated: it was
            reached in 1 of 240 runs of 1,000 healthy steps, for many comparisons are made.
        evidence_with_symptom (`float`, *optional*, defaults to `4.0`):
            The same while the trained reward prefers lower held-out rewards, or there is a symptom that decides
            without one. Simulated: noise alone reaches it in up to two thirds of runs of 1,000 steps, in which there
            was no symptom.
        drift_evidence (`float`, *optional*, defaults to `8.0`):
            Evidence (CUSUM with allowance 0.75, in standard deviations, Page 1954) at which a drift counts as a
            symptom. By Siegmund's approximation noise reaches it once in 800,000 steps.
        rise_evidence (`float`, *optional*, defaults to `5.0`):
            Evidence that the trained reward has risen, in standard errors, from which on a held-out reward that does
            not rise with it raises the alarm. Ours: the same as `evidence`.
        asked_evidence (`float`, *optional*, defaults to `3.0`):
            Evidence at which a fall of `HeldOut` questions raises the alarm, in two askings in a row. Ours: they share
            their questions and the first answers, so that many askings are about one comparison.
        evaluation_fall (`float`, *optional*, defaults to `0.05`):
            Fall of a held-out reward on the evaluation set, in two evaluations in a row. Ours: five points; of 400
            answers or more, that is two standard errors.
        length_ratio (`float`, *optional*, defaults to `0.33`):
            Mean length, relative to its first level, below which answers have collapsed: what probability rewards end
            in (https://huggingface.co/papers/2603.08660). Ours; verbose models that learn to be brief halve it.
        clipped_rise (`float`, *optional*, defaults to `0.5`):
            Rise of the fraction of completions that are cut off: answers that do not end any more. Ours.
        repetition_rise (`float`, *optional*, defaults to `0.3`):
            Rise of the fraction of repeated 4-grams: what entropy rewards end in
            (https://huggingface.co/papers/2603.08660). Ours; ordinary prose has less than 0.05.
        log_prob_fall (`float`, *optional*, defaults to `0.5`):
            Fall of the frozen model's log-probability of what the policy writes, nats per token: text that the model
            whose reward it earns finds improbable. Measured: healthy runs rise; the entropy reward loses it in 10
            steps.
        log_prob_drift (`float`, *optional*, defaults to `0.05`):
            The same, if it sinks by more than noise explains (`drift_evidence`). Measured: it rises in healthy runs on
            rewards of a frozen model, and sank in four of six runs that such rewards drove into collapse, at first by
            this much.
        first_log_prob_fall (`float`, *optional*, defaults to `0.02`):
            Least fall of the first policy's log-probability of what the policy writes, next to its own answers, nats
            per token, that raises the alarm without a held-out reward. Measured: it falls about as much as the
            accuracy, and rises in healthy runs.
        kl (`float`, *optional*, defaults to `1.0`):
            KL to the reference, nats per token. Measured: 0.05 in a healthy run with beta 0.1; a spike was reported
            for a collapse (https://github.com/sunblaze-ucb/Intuitor/issues/23).
        entropy_ratio (`float`, *optional*, defaults to `0.02`):
            Entropy of the policy, relative to its first level, below which it is deterministic. Counts only together
            with `distinct_completions`, and not for rewards that are verdicts, which such a policy may simply have
            learned. Measured: 0.14 and more in healthy runs.
        distinct_completions (`float`, *optional*, defaults to `1.1`):
            Different completions a group, at or below which the policy is deterministic. Ours.
        length_correlation (`float`, *optional*, defaults to `0.9`):
            Absolute correlation of reward and length within groups: the reward is little but length. Ours.
        patience (`int`, *optional*, defaults to `3`):
            Logged steps in a row for which a symptom must last to raise the alarm. Ours.

    Raises:
        `ValueError`: If a number is not positive.
    """

    warmup: int = 8
    change_warmup: int = 6
    early_warmup: int = 3
    held_out_fall: float = 0.02
    evidence: float = 5.0
    evidence_with_symptom: float = 4.0
    drift_evidence: float = 8.0
    rise_evidence: float = 5.0
    asked_evidence: float = 3.0
    evaluation_fall: float = 0.05
    length_ratio: float = 0.33
    clipped_rise: float = 0.5
    repetition_rise: float = 0.3
    log_prob_fall: float = 0.5
    log_prob_drift: float = 0.05
    first_log_prob_fall: float = 0.02
    kl: float = 1.0
    entropy_ratio: float = 0.02
    distinct_completions: float = 1.1
    length_correlation: float = 0.9
    patience: int = 3

    def __post_init__(self) -> None:
        for entry in fields(self):
            value = getattr(self, entry.name)
            if not value > 0:
                raise ValueError(f"`{entry.name}` is {value}, but every threshold of the monitor must be positive.")
