# SPDX-License-Identifier: Apache-2.0
"""What several tests of recipes need."""

from typing import Any

import pytest

from endotrl.launch import launch


class Killed(BaseException):
    """What SIGKILL leaves behind: nothing is saved, nothing is closed."""


def kill() -> None:
    raise Killed


def refusal(capsys: pytest.CaptureFixture[str], *arguments: Any) -> str:
    """What a recipe says that is not begun, on one line."""
    with pytest.raises(SystemExit) as ended:
        launch(*arguments)
    assert ended.value.code == 2
    return " ".join(capsys.readouterr().err.split())
