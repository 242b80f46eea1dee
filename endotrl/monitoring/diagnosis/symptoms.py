# SPDX-License-Identifier: Apache-2.0
"""
Checks for common problems of a run in its log. Each check yields its findings, or nothing if the log lacks its
metrics.
"""

import filecmp
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from pathlib import Path
from statistics import correlation, fmean, median_high
from typing import Literal, get_args

from safetensors import safe_open

from ..collapse_thresholds import ENTROPY_RATIO, LENGTH_CORRELATION, WARMUP, CollapseThresholds
from ..detector import ENTROPY_KEYS, HELD_OUT, REWARD_KEYS, Detector
from ..series import FEWEST
from .run_logs import Run, evidence_of, tail, trend


Level = Literal["failure", "warning", "note"]
LEVELS = get_args(Level)
LR_KEYS = ("learning_rate", "lr")  # the second: TRL's PPO until 1.12
ZERO_STD = "frac_reward_zero_std"
CLIPPED = "completions/clipped_ratio"
LENGTH = "collapse/length_correlation"
# Logged by PPO, in which a completion may be a group of its own, compared with the critic.
GROUPS_OF_ONE = "ppo/advantages_std"
KL_KEYS = ("kl", "objective/kl")
# Of a KL or an entropy per token, and per completion, assumed to have a hundred tokens.
UNITS = dict.fromkeys(("kl", "entropy"), 1.0) | dict.fromkeys(("objective/kl", "objective/entropy"), 100.0)
LENGTH_KEYS = ("completions/mean_length", "completion_length", "words")
# Metrics that should improve, in order of preference, with their names in a sentence. All but the loss should rise.
PROGRESS = dict.fromkeys(REWARD_KEYS, "The reward")
PROGRESS |= dict.fromkeys(("rewards/accuracies", "accuracy"), "The accuracy on preferences") | {"loss": "The loss"}
ENOUGH = 10  # with fewer entries, a trend cannot be told from noise


@dataclass(frozen=True)
class Finding:
    """
    A problem of a run. `level` is `"failure"` if the run is not worth continuing as it is, `"warning"` if it may be,
    and `"note"` for information.
    """

    name: str  # kind of finding, such as `"zero_gradient"`
    level: Level
    says: str  # what is wrong, in one sentence
    evidence: str  # numbers that show it
    change: str  # what to change
    reference: str  # where it is described
    curves: list[str] = field(default_factory=list)  # logged metrics that show it


LOGGING = "https://huggingface.co/docs/trl/logging"
IS_TRAINABLE = (
    "https://huggingface.co/docs/peft/package_reference/peft_model#peft.PeftModel.from_pretrained.is_trainable"
)
# Remedy and reference of each finding, by its name (and variant).
CHANGES = {
    "not_finite": (
        "Resume from an earlier checkpoint with bfloat16 instead of float16, a lower `learning_rate` and "
        "`max_grad_norm=1.0`. Check for empty completions, and for logarithms of 0 in the reward.",
        "https://huggingface.co/docs/transformers/perf_train_gpu_one#mixed-precision-training",
    ),
    "not_finite/reward": (
        "Make the reward function return a number for every completion that it can judge, and read those that it "
        "cannot judge (`log_completions=True`).",
        "https://huggingface.co/docs/trl/grpo_trainer#using-a-custom-reward-function",
    ),
    "learning_rate": (
        "Set `learning_rate`, limit `warmup_steps` to a few percent of the steps, and let the schedule span the whole "
        "run (`max_steps` or `num_train_epochs`).",
        "https://huggingface.co/docs/transformers/main_classes/optimizer_schedules",
    ),
    "zero_gradient": (
        "Load a `PeftModel` with `PeftModel.from_pretrained(model, path, is_trainable=True)`. Check that "
        "`sum(p.requires_grad for p in trainer.model.parameters())` is not 0.",
        IS_TRAINABLE,
    ),
    "truncated": (
        "Raise `max_completion_length`, ask for brief answers, or check that the model knows the chat template and "
        "its end-of-turn token. `mask_truncated_completions=True` excludes truncated completions from the loss.",
        "https://huggingface.co/papers/2503.14476 (DAPO, overlong filtering)",
    ),
    "equal_rewards": (
        "Read the completions (`log_completions=True`) and check that the reward function parses them correctly. "
        "Remove questions that are always right or always wrong, raise `num_generations` or `temperature`, or use a "
        "reward that differs between completions, such as `EndogenousReward`.",
        "https://huggingface.co/papers/2503.14476 (DAPO, dynamic sampling)",
    ),
    "unchanged_weights": (
        "Check that the parameters require a gradient (`is_trainable=True` for a `PeftModel`; the logged gradient may "
        "be that of `ref`, TRL's copy of the adapter), that the learning rate is not zero, and that updates are not "
        "rounded away in bfloat16 weights: keep the weights in float32 and set `bf16=True`.",
        IS_TRAINABLE,
    ),
    "entropy": (
        "Set `beta` above 0 or raise it, lower the `learning_rate`, raise `epsilon_high` (0.28) or the sampling "
        "`temperature`, and stop when the held-out reward no longer rises.",
        "https://huggingface.co/papers/2505.22617 (The Entropy Mechanism)",
    ),
    "kl_divergence": (
        "Raise `beta`, lower the `learning_rate`, and clip gradients (`max_grad_norm`). With an endogenous reward, "
        "`beta` determines where training converges: see docs/theory.md.",
        "https://github.com/sunblaze-ucb/Intuitor/issues/23",
    ),
    "reward_is_length": (
        "Remove the length from the reward (`EndogenousReward(correction=LengthControl())`, or the mean per token), "
        "set `beta` above 0, and add a reward that verifies answers.",
        "https://huggingface.co/papers/2310.03716 (A Long Way to Go)",
    ),
    "collapse": (
        "Go back to the last checkpoint before the collapse, raise `beta` or lower the `learning_rate`, and train "
        'with `CollapseMonitor(action="stop")`. For corrections of the reward, see docs/collapse.md.',
        "https://huggingface.co/papers/2603.08660",
    ),
    "reward_alone": (
        "The policy exploits the trained reward: compare completions from the beginning and the end of the run, raise "
        "`beta`, fix the reward, or mix in the held-out reward (`reward_weights`).",
        "https://huggingface.co/papers/2210.10760 (Scaling Laws for Reward Model Overoptimization)",
    ),
    "not_learning": (
        "Fix the other findings first, check the sign of the reward (better must be higher), and read the "
        "completions. If the metric gets worse, lower the `learning_rate`; if it does not move, raise it (1e-6 for "
        "full fine-tuning, 1e-5 to 1e-4 for LoRA), sample more completions per step, or use easier questions.",
        LOGGING,
    ),
    "off_policy": ("Lower the `learning_rate`, set `max_grad_norm`, and raise `beta`.", LOGGING),
    "critic": (
        "Raise the learning rate of the value head, warm it up before training the policy, or train with "
        '`critic="none"`.',
        "https://huggingface.co/papers/2006.05990 (What Matters In On-Policy RL?)",
    ),
    "overfitting": (
        "Stop earlier (`load_best_model_at_end`), train for fewer epochs, or use more data.",
        "https://huggingface.co/docs/transformers/main_classes/callback#transformers.EarlyStoppingCallback",
    ),
}


def all_findings(run: Run) -> list[Finding]:
    """Findings of all checks: failures first, then warnings and notes, each in order of importance."""
    checks = [_not_finite, _learning_rate, _zero_gradient, _truncated, _equal_rewards, _unchanged_weights, _entropy]
    checks += [_kl_divergence, _reward_is_length, _collapse, _reward_alone, _not_learning, _gradient_explodes, _critic]
    found = [finding for check in [*checks, _overfitting] for finding in check(run)]
    return sorted(found, key=lambda finding: LEVELS.index(finding.level))


def _finding(key: str, level: Level, says: str, evidence: str, *curves: str) -> Finding:
    """A finding with its remedy and reference, which are in [`CHANGES`] under `key`."""
    return Finding(key.partition("/")[0], level, says, evidence, *CHANGES[key], list(curves))


def _not_finite(run: Run) -> Iterator[Finding]:
    for key in ("loss", "grad_norm", *REWARD_KEYS, "kl", "entropy"):
        points = run.series(key)
        bad = [step for step, value in points if not math.isfinite(value)]
        always = len(bad) == len(points)
        if not bad or (always and key in ("kl", "entropy")):  # never measured
            continue
        evidence = f"`{key}` is not finite in {len(bad)} of {len(points)} log entries, first at step {bad[0]:g}."
        lasting = not any(math.isfinite(value) for _, value in points[-3:])
        level: Level = "failure" if lasting else "warning"
        if key in REWARD_KEYS:
            says = "The reward functions return no reward." if always else "The reward functions no longer return one."
            says = says if lasting else "The reward functions return no reward at some steps."
            evidence += " TRL excludes completions for which every function returns `None`."
            yield _finding("not_finite/reward", level, says, evidence, key)
        elif lasting:
            says = f"`{key}` has become NaN or infinite: all later training is lost."
            yield _finding("not_finite", level, says, evidence, key)
        elif len(bad) > 0.05 * len(points):
            yield _finding("not_finite", level, f"`{key}` is repeatedly NaN or infinite.", evidence, key)


def _learning_rate(run: Run) -> Iterator[Finding]:
    points = run.series(*LR_KEYS)
    rates = [rate for _, rate in points]
    if len(rates) < 3:
        return
    (start, first), (end, last) = points[0], points[-1]
    evidence = f"The learning rate was {first:.3g} at step {start:g} and is {last:.3g} at step {end:g}."
    zeros = rates.count(0)
    if not any(rates):
        says = "The learning rate is zero: nothing is trained."
        yield _finding("learning_rate", "failure", says, evidence, LR_KEYS[0])
    elif zeros > 0.2 * len(rates) and rates[-2:] == [0, 0]:
        says = f"The learning rate has been zero in {zeros} of {len(rates)} log entries."
        yield _finding("learning_rate", "warning", says, evidence, LR_KEYS[0])
    rising = len(rates) >= ENOUGH and all(a < b for a, b in pairwise(rates))
    if rising and (run.max_steps is None or end > 0.5 * run.max_steps):
        place = f" at step {end:g} of {run.max_steps}" if run.max_steps else ""
        says = f"The warm-up has not ended: the learning rate is still rising{place}."
        yield _finding("learning_rate", "warning", says, evidence, LR_KEYS[0])


def _zero_gradient(run: Run) -> Iterator[Finding]:
    norms = run.values("grad_norm")
    zeros, equal = norms.count(0), _all_equal(run)
    if len(norms) < 3 or zeros < 0.9 * len(norms) or equal >= 0.9 or _cut_off(run) >= 0.99:
        return
    differ = f", although the rewards differ in {1 - equal:.0%} of the groups" if run.series(ZERO_STD) else ""
    says = "The gradient is zero: no parameter is trained, whatever the curves show."
    evidence = f"`grad_norm` is 0 in {zeros} of {len(norms)} log entries{differ}."
    yield _finding("zero_gradient", "failure", says, evidence, "grad_norm", *REWARD_KEYS)


def _truncated(run: Run) -> Iterator[Finding]:
    fraction = _cut_off(run)
    if fraction >= 0.5:
        share = "Nearly all" if fraction >= 0.9 else f"{fraction:.0%} of the"
        says = f"{share} completions are truncated at `max_completion_length`: the reward judges unfinished answers."
        evidence = f"`{CLIPPED}` was {run.values(CLIPPED)[0]:.2f} at first and is {fraction:.2f} at the end."
        level: Level = "failure" if fraction >= 0.9 else "warning"
        yield _finding("truncated", level, says, evidence, CLIPPED, LENGTH_KEYS[0])


def _equal_rewards(run: Run) -> Iterator[Finding]:
    fractions, rewards, overall = run.values(ZERO_STD), run.values(*REWARD_KEYS), _all_equal(run)
    late = fmean(tail(fractions)) if len(fractions) >= 3 else overall
    if run.series(GROUPS_OF_ONE) or max(overall, late) < 0.5:
        return
    risen = len(rewards) >= ENOUGH and trend(rewards).z > 3
    level: Level = "warning"
    says = f"{max(overall, late):.0%} of the groups have equal rewards and do not contribute to training."
    if overall >= 0.9 and not (risen and fractions and fmean(fractions[:3]) < 0.9):
        level, says = "failure", "All completions of a group have the same reward: there is nothing to learn from."
    elif risen and late >= 0.5:
        level = "note"
        says = f"{late:.0%} of the groups have equal rewards by now: the policy has learned these questions."
    measured = f"`{ZERO_STD}` is {overall:.2f} on average and {late:.2f} at the end"
    last = fmean(tail(rewards)) if rewards else math.nan
    evidence = f"{measured if fractions else '`reward_std` is 0 at every step'}; the mean reward is {last:.3g}."
    yield _finding("equal_rewards", level, says, evidence, ZERO_STD, "reward_std", *REWARD_KEYS)


def _unchanged_weights(run: Run) -> Iterator[Finding]:
    evidence, kl = _unchanged(run.checkpoints), run.values("kl") if run.series(*REWARD_KEYS) else []
    if evidence is None and len(kl) >= 5 and not any(kl[1:]):
        evidence = f"The KL divergence from the reference model is exactly 0 in all {len(kl)} log entries."
    if evidence is not None:
        says = "The weights do not change: training returns the initial model."
        yield _finding("unchanged_weights", "failure", says, evidence, "kl", "grad_norm")


def _unchanged(checkpoints: Sequence[Path]) -> str | None:
    """Sentence on checkpoints that show that nothing was trained; `None` if they do not show it."""
    files = [{file.name: file for file in folder.glob("*.safetensors")} for folder in checkpoints]
    if len(files) > 1 and files[0].keys() == files[-1].keys():
        if all(filecmp.cmp(file, files[-1][name], shallow=False) for name, file in files[0].items()):
            return f"The weights of {checkpoints[0].name} and {checkpoints[-1].name} are bit-identical."
    if files and (adapter := files[-1].get("adapter_model.safetensors")):
        with safe_open(adapter, "pt") as opened:
            matrices = [opened.get_tensor(name) for name in opened.keys() if "lora_B" in name]
        if matrices and not any(matrix.count_nonzero() for matrix in matrices):  # PEFT's initialization of an adapter
            return f"The adapter in {checkpoints[-1].name} is untrained: all its LoRA B matrices are zero."
    return None


def _entropy(run: Run) -> Iterator[Finding]:
    key = run.first_logged(*ENTROPY_KEYS)
    values = run.values(key)
    if len(values) < ENOUGH or not run.series(*REWARD_KEYS):  # a model has little on what it has memorized
        return
    first, last = fmean(values[:3]), fmean(tail(values, part=8))
    if last < 0.1 * first and last < 0.05 * UNITS[key]:
        says = "The entropy has collapsed: the policy samples one answer only and no longer explores."
        evidence = f"The entropy was {first:.3g} nats at first and is {last:.3g} nats at the end."
        level: Level = "failure" if last < ENTROPY_RATIO * first else "warning"
        yield _finding("entropy", level, says, evidence, key, ZERO_STD)


def _kl_divergence(run: Run) -> Iterator[Finding]:
    key = run.first_logged(*KL_KEYS)
    values, unit = run.values(key), UNITS[key]
    if len(values) < ENOUGH or not run.series(*REWARD_KEYS):  # KTO's `kl` is its baseline
        return
    last = median_high(tail(values, part=8))
    far = last > CollapseThresholds().kl * unit
    if far or (last > 0.3 * unit and last > 10 * median_high(values[: max(3, len(values) // 2)])):
        says = "The KL divergence explodes: the policy is moving far away from the reference model."
        per = "token" if unit == 1 else "completion"
        evidence = f"`{key}` is {last:.3g} nats per {per} at the end (median {median_high(values):.3g}, "
        evidence += f"maximum {max(values):.3g})."
        yield _finding("kl_divergence", "failure" if far else "warning", says, evidence, key, *REWARD_KEYS)


def _reward_is_length(run: Run) -> Iterator[Finding]:
    key, within = run.first_logged(*LENGTH_KEYS), run.values(LENGTH)
    lengths, found = run.values(key), fmean(tail(within)) if len(within) >= 3 else 0.0
    evidence = f"Within groups, the correlation between reward and length is {found:+.2f} at the end."
    # With completions alone it is the correlation with words, which is lower.
    if abs(found) <= LENGTH_CORRELATION and (not within or abs(found) >= 0.3):
        pairs = [(e[reward], e[key]) for e in run.steps for reward in REWARD_KEYS if {reward, key} <= e.keys()]
        columns = zip(*(pair for pair in pairs if all(map(math.isfinite, pair))), strict=True)  # rewards, lengths
        changes = [[after - before for before, after in pairwise(column)] for column in columns]
        if not changes or len(changes[0]) < 2 * ENOUGH or any(len({*column}) < 2 for column in changes):
            return
        found = correlation(*changes)
        evidence = f"From step to step, the correlation between changes of reward and length is {found:+.2f}."
    if abs(found) <= LENGTH_CORRELATION:
        return
    ratio = fmean(tail(lengths, part=8)) / fmean(lengths[:3]) if len(lengths) >= 3 and fmean(lengths[:3]) else 1.0
    better = "longer" if found > 0 else "shorter"
    says = f"The reward measures mostly length: {better} completions score higher, whatever they say."
    evidence += f" The mean length is {ratio:.2f} times the initial one."
    level: Level = "warning" if 0.5 < ratio < 2 else "failure"
    yield _finding("reward_is_length", level, says, evidence, LENGTH, key, *REWARD_KEYS)


def _collapse(run: Run) -> Iterator[Finding]:
    detector = Detector(held_out=run.held_out)
    verdicts = [detector.update(entry) for entry in run.entries]
    alarms = [(i, verdict.alarm) for i, verdict in enumerate(verdicts) if verdict.alarm]
    if not alarms:
        return
    step, evidence = run.entries[alarms[0][0]]["step"], alarms[0][1]
    level: Level = "failure"
    says = f"The run has been collapsing since step {step:g}: the reward does not fall, but the answers get worse."
    quiet = sum(any(key in entry for key in REWARD_KEYS) for entry in run.entries[alarms[-1][0] + 1 :])
    levels = [verdict.level for verdict in verdicts if verdict.level is not None] or [0.0]
    if quiet >= WARMUP and levels[-1] >= (min(levels) + max(levels)) / 2:  # a level that stays low is not noise
        level, says = "warning", f"The run seemed to collapse at step {step:g}, but has recovered since."
    held_out = [f"rewards/{name}/mean" for name in run.held_out]
    yield _finding("collapse", level, says, evidence, *held_out, HELD_OUT, *REWARD_KEYS, LENGTH_KEYS[0])


def _reward_alone(run: Run) -> Iterator[Finding]:
    rewards = run.values(*REWARD_KEYS)
    if len(rewards) < ENOUGH or (risen := trend(rewards)).z < 5:
        return
    logged = sorted({key for entry in run.entries for key in entry if key.startswith(HELD_OUT)})
    keys = [f"{prefix}rewards/{name}/mean" for name in run.held_out for prefix in ("", "eval_")]
    for key in [*logged, *keys, "eval_reward"]:
        values = run.values(key)
        if len(values) < FEWEST or (moved := trend(values)).z > 2 or min(values) >= 0.98:
            continue
        falls = moved.z < -3
        says = f"The reward rises, but `{key}` {'falls' if falls else 'does not'}."
        evidence = (
            f"The reward went from {risen.first:.3g} to {risen.last:.3g} ({risen.z:+.0f} standard errors), `{key}` "
            f"from {moved.first:.3g} to {moved.last:.3g} ({moved.z:+.1f})."
        )
        yield _finding("reward_alone", "failure" if falls else "warning", says, evidence, key, *REWARD_KEYS)


def progress(run: Run) -> tuple[str, list[float], float]:
    """The metric that should improve, its values, and its improvement in standard errors; without one, no values."""
    key = next((key for key in PROGRESS if run.values(key)), "")
    values = run.values(key)
    z = trend(values).z if values else 0.0
    return key, values, -z if key == "loss" else z


def _not_learning(run: Run) -> Iterator[Finding]:
    key, values, z = progress(run)
    if len(values) < 2 * ENOUGH:
        return
    change, window = trend(values), len(tail(values))
    sums = list(accumulate(values, initial=0.0))
    means = [(after - before) / window for before, after in zip(sums, sums[window:], strict=False)]
    best = min(means) if key == "loss" else max(means)
    lost = best - change.last
    loses = abs(lost) > 0.5 * abs(best - change.first) and abs(evidence_of(values, lost, window, window)) > 5
    if z > 2 and not loses:
        return
    if z > -5 and key == "reward" and min(values) >= 0.98 and max(values) <= 1.0:
        return  # right from the beginning: covered by `equal_rewards`
    what = "gets worse" if z < -5 else "has lost most of what it had gained" if loses else "does not improve"
    evidence = (
        f"`{key}` was {change.first:.4g} at first and is {change.last:.4g} in the last third "
        f"({change.z:+.1f} standard errors, {len(values)} log entries)."
    )
    yield _finding("not_learning", "failure" if z < -5 else "warning", f"{PROGRESS[key]} {what}.", evidence, key)


def _gradient_explodes(run: Run) -> Iterator[Finding]:
    norms = run.values("grad_norm")
    if len(norms) >= 2 * ENOUGH:
        first, last = median_high(norms[: len(norms) // 3]), median_high(tail(norms))
        if last > 20 * first > 0:
            evidence = f"The median of `grad_norm` was {first:.3g} in the first third and is {last:.3g} in the last."
            yield _finding("off_policy", "warning", "The gradient explodes.", evidence, "grad_norm")


def _critic(run: Run) -> Iterator[Finding]:
    values = run.values(key := "ppo/explained_variance")
    if len(values) >= 2 * ENOUGH and (last := median_high(tail(values))) <= 0:
        says = "The critic predicts returns worse than their mean does: the advantages are mostly noise."
        yield _finding("critic", "warning", says, f"The median of `{key}` is {last:.2f} in the last third.", key)


def _overfitting(run: Run) -> Iterator[Finding]:
    for key, sign in (("eval_loss", -1), ("eval_reward", 1), ("eval_rewards/accuracies", 1)):
        values = [sign * value for value in run.values(key)]
        if len(values) < 4 or (key == "eval_loss" and run.series(*REWARD_KEYS)):  # uninformative in RL
            continue
        best = max(values)
        if best - max(values[-2:]) > max(0.25 * (best - values[0]), 0.02 * abs(best), 1e-9):
            says = f"`{key}` has been getting worse: an earlier checkpoint was better."
            last = f"{sign * values[-2]:.4g} and {sign * values[-1]:.4g}"
            evidence = f"The best value was {sign * best:.4g}, the last two are {last}."
            yield _finding("overfitting", "warning", says, evidence, key, key.removeprefix("eval_"))


def _all_equal(run: Run) -> float:
    """Fraction of groups with equal rewards over the run; 0 if unknown."""
    if run.series(GROUPS_OF_ONE):
        return 0.0
    if fractions := run.values(ZERO_STD):
        return fmean(fractions)
    deviations = run.values("reward_std")
    return float(len(deviations) >= 3 and not any(deviations))


def _cut_off(run: Run) -> float:
    """Fraction of truncated completions at the end of the run; 0 if unknown."""
    values = run.values(CLIPPED)
    return fmean(tail(values)) if len(values) >= 3 else 0.0
