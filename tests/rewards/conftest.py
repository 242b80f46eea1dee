# SPDX-License-Identifier: Apache-2.0
from importlib.metadata import version

from packaging.version import Version


# These also create endotrl's own trainers.
NEED_NEWER_TRL = ["test_kl_penalty.py", "test_mistakes.py", "test_settings.py"]
collect_ignore = NEED_NEWER_TRL if Version(version("trl")) < Version("1.15") else []
