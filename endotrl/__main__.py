# SPDX-License-Identifier: Apache-2.0
"""`python -m endotrl`, and `accelerate launch -m endotrl`: the command `endotrl`."""

import sys

from .commands.main import main


if __name__ == "__main__":
    sys.exit(main())
