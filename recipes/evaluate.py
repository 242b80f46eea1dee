# SPDX-License-Identifier: Apache-2.0
r"""
`endotrl eval` with its options in a YAML file: how good a reward is, or what training on it did.

    python recipes/evaluate.py --config recipes/smollm2-135m/evaluate.yaml

Everything in the YAML file can be overridden on the command line, such as `--model output/smollm2-135m-grpo`.
"""

import sys

from endotrl.recipes import evaluate


if __name__ == "__main__":
    sys.exit(evaluate())
