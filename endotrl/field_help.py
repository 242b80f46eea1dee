# SPDX-License-Identifier: Apache-2.0
"""Command-line help of dataclass fields, from the class docstring."""

import re
from dataclasses import Field
from inspect import cleandoc
from types import MappingProxyType
from typing import Any, TypeVar


Class = TypeVar("Class", bound=type)

_ENTRY = re.compile(r"^( +)(\w+) \(`.*\):\n((?:\1 +\S.*(?:\n|$))+)", re.MULTILINE)


def with_help(cls: Class) -> Class:
    """
    Sets the `help` of each field of a dataclass from its docstring, in TRL's format. Apply it above `@dataclass`, so
    that each setting is explained only once.
    """
    entries = {name: _plain(text) for _, name, text in _ENTRY.findall(cleandoc(cls.__doc__ or ""))}
    fields: dict[str, Field[Any]] = vars(cls)["__dataclass_fields__"]
    for name in entries.keys() & vars(cls).get("__annotations__", {}).keys():
        fields[name].metadata = MappingProxyType({"help": entries[name], **fields[name].metadata})
    return cls


def _plain(text: str) -> str:
    """Text for a terminal: without line breaks, references and LaTeX; `%` escaped for argparse."""
    text = re.sub(r"\[(`[^`]*`)\]", r"\1", " ".join(text.split()).replace("~", ""))
    return re.sub(r"\$([^$]*)\$", lambda math: re.sub(r"\\text\{(\w+)\}|\\[,;]|\\", r"\1", math[1]), text).replace(
        "%", "%%"
    )
