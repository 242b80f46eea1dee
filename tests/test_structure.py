# SPDX-License-Identifier: Apache-2.0
"""Which part of the package may import which, as CONTRIBUTING.md says: nothing on the left imports from the right."""

import ast
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest


PACKAGE = Path(__file__).parents[1] / "endotrl"
ORDER = [
    # Leaves, which import nothing of ours.
    *("_lazy", "_moved", "checks", "data", "field_help", "learning_rates", "reporting", "runs", "shipped"),
    *("bellman", "credit", "rendering", "scoring", "frozen", "sentence", "grading", "rewards", "tasks", "trainers"),
    *("monitoring", "score_file", "selection", "evaluation", "forecasting", "demo", "launch", "planning", "commands"),
]


def imported_parts(path: Path) -> set[str]:
    """Parts of the package that a module imports anywhere, functions and `TYPE_CHECKING` included."""
    module = ["endotrl", *path.relative_to(PACKAGE).with_suffix("").parts]
    parts = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.ImportFrom):
            continue
        base = module[: len(module) - node.level] if node.level else []
        names = [*base, *(node.module.split(".") if node.module else [])]
        if names[0] == "endotrl":
            parts.update(names[1:2] or [alias.name for alias in node.names])
    return parts - {"__version__"}


def test_nothing_imports_from_the_right() -> None:
    seen = set()
    for path in PACKAGE.rglob("*.py"):
        part = path.relative_to(PACKAGE).with_suffix("").parts[0]
        if part in ("__init__", "__main__"):
            continue  # they name the public objects of all parts, and the command
        assert part in ORDER, f"Where does {part} belong?"
        seen.add(part)
        for other in imported_parts(path) - {part}:
            assert ORDER.index(other) < ORDER.index(part), (
                f"{path.relative_to(PACKAGE)} imports {other}, which is on its right."
            )
    assert seen == set(ORDER)


def test_a_name_means_one_module() -> None:
    # A command and what it runs may share a name.
    stems = Counter(path.stem for path in PACKAGE.rglob("*.py") if path.parent.name != "commands")
    assert {stem for stem, count in stems.items() if count > 1} == {"__init__"}


@pytest.mark.parametrize("as_ids", [True, False])
def test_a_reward_call_is_walked_in_twelve_files(as_ids: bool, tiny_policy_path: str) -> None:
    from endotrl import EndogenousReward

    messages = [{"role": "user", "content": "a b"}]
    answers = [[{"role": "assistant", "content": text}] for text in ("c d", "e")]
    batch: dict[str, Any] = {"prompts": [messages] * 2, "completions": answers}
    batch |= {"completion_ids": [[9, 10, 2], [11, 2]]} if as_ids else {}
    reward = EndogenousReward(tiny_policy_path)
    reward(**batch)  # loads the model, and tries it
    entered = set()
    sys.setprofile(lambda frame, event, _: entered.add(frame.f_code.co_filename) if event == "call" else None)
    try:
        reward(**batch)
    finally:
        sys.setprofile(None)
    ours = sorted(str(Path(file).relative_to(PACKAGE)) for file in entered if file.startswith(str(PACKAGE)))
    assert 5 < len(ours) <= 12, ours
