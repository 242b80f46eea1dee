# SPDX-License-Identifier: Apache-2.0
"""Some parameters of an optimizer with a learning rate of their own."""

from collections.abc import Iterable

from torch import nn
from torch.optim import Optimizer
from transformers import TrainingArguments


def has_one_learning_rate(args: TrainingArguments) -> bool:
    """
    Whether DeepSpeed's configuration has an optimizer of its own, which knows one learning rate for all parameters.
    """
    plugin = args.deepspeed_plugin
    return plugin is not None and "optimizer" in plugin.deepspeed_config


def set_learning_rate(optimizer: Optimizer, parameters: Iterable[nn.Parameter], learning_rate: float) -> None:
    """
    Gives some of an optimizer's parameters another learning rate, in groups of their own; weight decay and the rest
    stay as they are. Before the scheduler is made, which starts from the rates that it finds. Parameters that the
    optimizer does not have, such as frozen ones, are passed over.
    """
    ids = set(map(id, parameters))
    for group in list(optimizer.param_groups):
        chosen = [parameter for parameter in group["params"] if id(parameter) in ids]
        if chosen:
            group["params"] = [parameter for parameter in group["params"] if id(parameter) not in ids]
            # Last, since the first group's learning rate is the one that is logged.
            optimizer.add_param_group({**group, "params": chosen, "lr": learning_rate})
