# SPDX-License-Identifier: Apache-2.0
r"""
GRPO on the endogenous reward, or on a control. `credit` sets the credit of each token: the reward from it on
(`token`), from its sentence on (`sentence`), or of the whole completion (`outcome`), which equals TRL's `GRPOTrainer`
step by step.

    accelerate launch --config_file accelerate_configs/cpu.yaml \
        -m endotrl.launch.grpo --config recipes/smollm2-135m/grpo.yaml

Everything in the YAML file can be overridden on the command line, such as `--reward random --output_dir
output/random`.
"""

from functools import partial

from ..trainers.dense_grpo_config import DenseGRPOConfig
from ..trainers.dense_grpo_trainer import DenseGRPOTrainer
from .pipeline import launch


main = partial(launch, DenseGRPOTrainer, DenseGRPOConfig)

if __name__ == "__main__":
    main()
