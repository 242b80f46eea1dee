# SPDX-License-Identifier: Apache-2.0
"""Training of a sentence-level reward model, as `python -m endotrl.launch.sentence_reward`."""

from endotrl.launch.sentence_reward import main


if __name__ == "__main__":
    main()
