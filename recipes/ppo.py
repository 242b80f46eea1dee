# SPDX-License-Identifier: Apache-2.0
"""PPO, as `python -m endotrl.launch.ppo`."""

from endotrl.launch.ppo import main


if __name__ == "__main__":
    main()
