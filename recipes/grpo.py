# SPDX-License-Identifier: Apache-2.0
"""GRPO, as `python -m endotrl.launch.grpo`."""

from endotrl.launch.grpo import main


if __name__ == "__main__":
    main()
