# SPDX-License-Identifier: Apache-2.0
"""What a run was made with: command, settings, versions, git revision, model."""

import hashlib
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, is_dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from .. import __version__
from .files import replace_text
from .jsonl import changed_settings


RECORD_FILE = "recipe.json"
SECRET = "<SECRET>"
# In a command line with words separated by a null character.
_SECRET_OPTION = re.compile(r"(--[\w-]*(?:token|api[_-]?key|secret|password)[=\0])(?!--)[^\0]*")
_HUB_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{16,}")
# The `token` argument of `from_pretrained`, in JSON.
_JSON_TOKEN = re.compile(r'("token"\s*:\s*)"[^"]*"')
PACKAGES = ("torch", "transformers", "trl", "accelerate", "datasets", "peft", "deepspeed", "vllm")
# Weights up to this size, in bytes, are read as a whole to identify a model: at 1.3 GiB/s (sha256 on one core), 0.4 s
# for a model of 0.5 GiB and 1.5 s at the limit.
WHOLE_WEIGHTS = 2 * 2**30
_SMALL_FILE = 4 * 2**20  # bytes; files up to this size are always read as a whole
# Settings that may differ between a run and its continuation: length, hardware, logging and saving intervals.
FREE_PREFIXES = ("logging", "log_", "save", "eval", "per_device_eval", "dataloader", "hub", "push", "vllm", "ddp")
FREE = {
    *("output_dir", "resume_from_checkpoint", "resume", "report_to", "run_name", "max_steps", "num_train_epochs"),
    *("disable_tqdm", "project", "trackio_space_id", "num_completions_to_print", "accelerator_config", "deepspeed"),
    *("fsdp", "fsdp_config", "use_cpu", "reward_max_tokens_per_batch", "reward_shard", "reward_offload", "do_eval"),
    *("per_device_train_batch_size", "gradient_accumulation_steps", "generation_batch_size", "steps_per_generation"),
    *("gradient_checkpointing", "attn_implementation", "prediction_loss_only", "model_init_kwargs"),
    *("num_generations_eval", "heat_map_steps", "on_collapse", "activation_checkpointing", "use_vllm"),
}


def make_record(settings: Mapping[str, Any]) -> dict[str, Any]:
    """`settings`, `command`, `versions` and, in a git clone, its revision and whether files were changed."""
    return {
        "command": without_secrets(sys.argv),
        "settings": {name: _plain(value) for name, value in settings.items()},
        "versions": versions(*PACKAGES),
        # Of the clone with the script, or else of that with this package.
        "git": _git(Path(sys.argv[0]).resolve().parent) or _git(Path(__file__).parent),
    }


def versions(*packages: str) -> dict[str, str]:
    """Versions of endotrl, Python and the given packages, if installed."""
    found = {"endotrl": __version__, "python": platform.python_version()}
    for package in packages:
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def now() -> str:
    """Current time in UTC."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def machine() -> str:
    """Operating system, architecture and number of CPUs."""
    return f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPUs"


def model_digest(model: str) -> str | None:
    """
    Digest that identifies a model folder, and changes with further training: of its files, which are read as a whole
    if they have up to 2 GiB together. For a larger model's large files it uses size, modification time and 64 samples
    of 4 KiB, so that a changed file whose size and time were restored may go unnoticed, and a copied one counts as
    changed. `None` if `model` is not a folder.
    """
    if not Path(model).is_dir():
        return None
    digest = hashlib.sha256()
    suffixes = (".json", ".jinja", ".safetensors", ".bin", ".model", ".txt")
    paths = sorted(path for path in Path(model).iterdir() if path.suffix in suffixes and path.is_file())
    whole = sum(path.stat().st_size for path in paths) <= WHOLE_WEIGHTS
    for path in paths:
        stat = path.stat()
        size = stat.st_size
        digest.update(f"{path.name}\0{size}\0".encode())
        with path.open("rb") as file:
            if whole or size <= _SMALL_FILE:
                digest.update(hashlib.file_digest(file, "sha256").digest())
            else:
                digest.update(f"{stat.st_mtime_ns}\0".encode())
                for i in range(64):
                    file.seek((size - 4096) * i // 63)
                    digest.update(file.read(4096))
    return digest.hexdigest()


def without_secrets(words: Sequence[str]) -> list[str]:
    """A command line without tokens: values of options such as `--hub_token`, `token` in JSON, and hub tokens."""
    return _hide(_SECRET_OPTION.sub(rf"\1{SECRET}", "\0".join(words))).split("\0")


def write_record(output_dir: str, record: Mapping[str, Any]) -> None:
    """Writes the record to `output_dir/recipe.json`."""
    Path(output_dir).mkdir(parents=True, exist_ok=True)
    replace_text(Path(output_dir) / RECORD_FILE, json.dumps(record, indent=2, ensure_ascii=False))


def recorded_settings(output_dir: str | None) -> dict[str, Any]:
    """All settings of the run in a folder by name; empty if there is none."""
    path = Path(output_dir or "") / RECORD_FILE
    return _flat(json.loads(path.read_text(encoding="utf-8"))["settings"]) if path.is_file() else {}


def check_same_settings(output_dir: str, record: Mapping[str, Any]) -> None:
    """Raises `ValueError` if the run in `output_dir` has other settings: resuming it would mix two runs."""
    before, now = recorded_settings(output_dir), _flat(record["settings"])
    fixed = {key for key in before.keys() & now.keys() if key not in FREE and not key.startswith(FREE_PREFIXES)}
    if changed := changed_settings(*({key: run[key] for key in sorted(fixed)} for run in (before, now))):
        raise ValueError(
            f"{output_dir} has checkpoints of a run with other settings ({changed}), from which this run would "
            "resume. Choose another `output_dir`, or start over with `--resume False`."
        )


def _flat(settings: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    return {key: value for part in settings.values() for key, value in part.items()}


def _plain(value: Any) -> Any:
    """A value as JSON values."""
    if is_dataclass(value) and not isinstance(value, type):
        # transformers hides tokens in its own dataclasses.
        value = value.to_dict() if hasattr(value, "to_dict") else asdict(value)
    return json.loads(_hide(json.dumps(value, default=str)))


def _hide(text: str) -> str:
    return _HUB_TOKEN.sub(SECRET, _JSON_TOKEN.sub(rf'\1"{SECRET}"', text))


def _git(folder: Path) -> dict[str, Any] | None:
    def git(*arguments: str) -> str:
        command = ["git", "-C", str(folder), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        return {"revision": git("rev-parse", "HEAD"), "changed": bool(git("status", "--porcelain", "-uno"))}
    except (OSError, subprocess.SubprocessError):  # no git, or no clone
        return None
