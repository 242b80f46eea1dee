# SPDX-License-Identifier: Apache-2.0
"""Exact resuming of trainers that generate: rollouts, reward states and sampling order, beyond TRL's checkpoints."""

import json
from pathlib import Path
from typing import Any

import torch
from accelerate.logging import get_logger
from accelerate.utils import send_to_device
from torch.distributed.checkpoint.stateful import Stateful
from transformers.trainer import TRAINER_STATE_NAME
from trl import GRPOTrainer
from trl.trainer.utils import RepeatSampler


logger = get_logger(__name__)

STATE_FILE = "rollout_state.json"
ROLLOUT_FILE = "rollout_{rank}.pt"
REWARDS_FILE = "rewards_{rank}.pt"


def save_rollouts(trainer: GRPOTrainer, folder: Path) -> None:
    """
    Writes the rest of the generation batch to a checkpoint (TRL would generate a new batch on resuming), and the state
    of reward functions that have `state_dict` and `load_state_dict`.
    """
    args = trainer.args
    folder.mkdir(parents=True, exist_ok=True)
    if states := {name: reward.state_dict() for name, reward in _stateful_rewards(trainer).items()}:
        torch.save(states, folder / REWARDS_FILE.format(rank=args.process_index))
    if trainer._step % (args.steps_per_generation * trainer.num_iterations):
        # The next steps use the samples of an earlier policy.
        torch.save(trainer._buffered_inputs, folder / ROLLOUT_FILE.format(rank=args.process_index))
    if args.should_save:
        (folder / STATE_FILE).write_text(json.dumps({"step": trainer._step, "world_size": args.world_size}))


def load_rollouts(trainer: GRPOTrainer, checkpoint: Path) -> None:
    """Restores the data written by [`save_rollouts`], if any."""
    if not (checkpoint / STATE_FILE).exists():
        return
    state, args = json.loads((checkpoint / STATE_FILE).read_text()), trainer.args
    if state["world_size"] != args.world_size:
        logger.warning(
            f"The checkpoint was written by {state['world_size']} processes but is resumed by {args.world_size}, so "
            "its unfinished generation batch and the state of its reward functions are discarded."
        )
        return

    def load(name: str) -> Any:
        path = checkpoint / name.format(rank=args.process_index)
        return torch.load(path, map_location="cpu", weights_only=True) if path.exists() else None

    trainer._step = state["step"]
    trainer._buffered_inputs = send_to_device(load(ROLLOUT_FILE), trainer.accelerator.device)
    states, rewards = load(REWARDS_FILE) or {}, _stateful_rewards(trainer)
    for name in states.keys() & rewards.keys():
        rewards[name].load_state_dict(states[name])


def _stateful_rewards(trainer: GRPOTrainer) -> dict[str, Stateful]:
    """Reward functions with a state, except reward models, whose frozen weights are not the checkpoint's."""
    functions = dict(zip(trainer.reward_func_names, trainer.reward_funcs, strict=True))
    return {n: f for n, f in functions.items() if isinstance(f, Stateful) and not isinstance(f, torch.nn.Module)}


def skip_epochs(sampler: RepeatSampler | None, checkpoint: Path) -> None:
    """
    Draws the orders of the epochs before a checkpoint: TRL's sampler restarts its generator in a resumed run, which
    would get the prompts of the first epoch again.
    """
    path = checkpoint / TRAINER_STATE_NAME
    if sampler is None or not sampler.shuffle or not path.exists():
        return
    for _ in range(int(json.loads(path.read_text(encoding="utf-8"))["epoch"] or 0)):
        torch.randperm(sampler.num_samples, generator=sampler.generator)
