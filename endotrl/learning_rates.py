# SPDX-License-Identifier: Apache-2.0
"""Separate learning rate for some parameters of an optimizer."""

from collections.abc import Iterable

from torch import nn
from torch.optim import Optimizer
from transformers import TrainingArguments


def has_one_learning_rate(args: TrainingArguments) -> bool:
    """
    Whether DeepSpeed's configuration defines its own optimizer, which has one learning rate for all parameters.
    """
    plugin = args.deepspeed_plugin
    return plugin is not None and "optimizer" in plugin.deepspeed_config


def set_learning_rate(optimizer: Optimizer, parameters: Iterable[nn.Parameter], learning_rate: float) -> None:
    """
    Sets another learning rate for some of an optimizer's parameters, in parameter groups of their own; weight decay
    and the other options are kept. Call it before the scheduler is created, which starts from the rates that it finds.
    Parameters that are not in the optimizer, such as frozen ones, are skipped.
    """
    ids = set(map(id, parameters))
    for group in list(optimizer.param_groups):
        chosen = [parameter for parameter in group["params"] if id(parameter) in ids]
        if chosen:
            group["params"] = [parameter for parameter in group["params"] if id(parameter) not in ids]
            # Last, since the first group's learning rate is the one that is logged.
            optimizer.add_param_group({**group, "params": chosen, "lr": learning_rate})
