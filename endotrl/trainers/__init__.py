# SPDX-License-Identifier: Apache-2.0
"""Trainers with token-level credit assignment, on top of TRL's `GRPOTrainer`."""

import trl
from packaging.version import Version


# Before 1.15, TRL's log-probabilities, loss and generation went through other private methods. The rewards of endotrl
# use TRL's public contract only, and work with older versions.
if Version(trl.__version__) < Version("1.15"):
    raise ImportError(
        f"The trainers of endotrl need TRL 1.15 or newer, and TRL {trl.__version__} is installed. Upgrade it with "
        "`pip install 'trl>=1.15'`. The rewards work in TRL's own trainers with this version too."
    )
