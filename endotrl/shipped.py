# SPDX-License-Identifier: Apache-2.0
"""Recipes and accelerate configs shipped with the package: listing, paths, copies."""

import shutil
from pathlib import Path

from .checks import did_you_mean


SCHEME = "endotrl://"
# A wheel has both in the package; in a clone they are beside it.
_INSTALLED = Path(__file__).with_name("_shipped")
ROOT = _INSTALLED if _INSTALLED.is_dir() else Path(__file__).parents[1]


def recipes() -> dict[str, str]:
    """Returns every recipe, such as `smollm2-135m/grpo.yaml`, with the first sentence of its file, its description."""
    folder = ROOT / "recipes"
    return {
        path.relative_to(folder).as_posix(): path.read_text(encoding="utf-8").partition(". ")[0].lstrip("# ")
        for path in sorted(folder.glob("*/*.yaml"))
    }


def accelerate_configs() -> list[str]:
    """Names of the accelerate configs, such as `zero3.yaml`."""
    return sorted(path.name for path in (ROOT / "accelerate_configs").glob("*.yaml"))


def shipped_path(name: str) -> Path:
    """
    Path of a recipe (`smollm2-135m/grpo.yaml`), of all recipes of a model (`smollm2-135m`), or of an accelerate config
    (`zero3.yaml`), with or without `endotrl://` in front. `ValueError` if there is none of that name.
    """
    known = {name: "recipes" for recipe in recipes() for name in (recipe, recipe.split("/")[0])}
    known |= dict.fromkeys(accelerate_configs(), "accelerate_configs")
    wanted = name.removeprefix(SCHEME)
    if wanted not in known:
        raise ValueError(
            f"Unknown recipe or accelerate config {wanted!r}{did_you_mean(wanted, known)}. `endotrl recipes` lists "
            "them."
        )
    return ROOT / known[wanted] / wanted


def local_path(name: str) -> str:
    """Resolves a name that starts with `endotrl://` to its path; returns any other name unchanged."""
    return str(shipped_path(name)) if name.startswith(SCHEME) else name


def copy_shipped(name: str, folder: Path) -> Path:
    """Copies the files of a name ([`shipped_path`]) into a folder. Raises `ValueError` if one would be overwritten."""
    source = shipped_path(name)
    target = folder / source.name
    if target.exists():
        raise ValueError(f"{target} already exists. Remove it, or choose another folder.")
    folder.mkdir(parents=True, exist_ok=True)
    if source.is_dir():
        shutil.copytree(source, target)
    else:
        shutil.copyfile(source, target)
    return target
