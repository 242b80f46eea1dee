# SPDX-License-Identifier: Apache-2.0
"""Segmentation of text into sentences: protocol, neural segmenter, alignment, checks."""

from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any, Protocol

from .boundary_rules import RuleSegmenter


class Segmenter(Protocol):
    """Splits text into sentences: any function with this signature works."""

    def __call__(self, text: str) -> list[tuple[int, int]]:
        """Character spans `(start, end)` of the sentences, which tile the text exactly; none for an empty text."""
        ...


class SatSegmenter:
    """
    Segment any Text (SaT, https://huggingface.co/papers/2406.16678), the neural segmenter of the sentence-level reward
    model's paper (https://huggingface.co/papers/2503.04793), through the package `wtpsplit`: loaded on first use, by
    the name or path of a model, onto `device` (by default the CPU). `**kwargs` are those of `wtpsplit.SaT`, such as
    `language` or `style_or_domain`.

    Example:
    ```python
    >>> from endotrl.sentence import SatSegmenter

    >>> segmenter = SatSegmenter("sat-3l")
    >>> segmenter("this is one this is two")
    [(0, 12), (12, 23)]
    ```
    """

    def __init__(self, model: str = "sat-3l", device: str | None = None, **kwargs: Any) -> None:
        if find_spec("wtpsplit") is None:
            raise ImportError(
                f"The segmenter {model!r} requires the package `wtpsplit`, which is not installed. Install it with "
                "`pip install 'endotrl[sat]'`, or use the built-in `RuleSegmenter`."
            )
        self.name = model
        self._device, self._kwargs = device, kwargs
        self._sat: Any = None  # loaded on first use; not pickled

    def __call__(self, text: str) -> list[tuple[int, int]]:
        """Sentences of a text; see [`Segmenter`]."""
        if not text:
            return []
        if self._sat is None:
            from wtpsplit import SaT

            self._sat = SaT(self.name, **self._kwargs)
            if self._device is not None:
                self._sat.to(self._device)
        return align(text, self._sat.split(text))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_sat": None}

    def __repr__(self) -> str:
        return f"SatSegmenter({self.name!r})"


def load_segmenter(name: str) -> Segmenter:
    """Makes a segmenter by name: `"rules"` for [`RuleSegmenter`]; else the name or the path of a SaT model."""
    if name == "custom":
        raise ValueError(
            "The reward model was trained with a segmenter that was passed as an object, so it cannot be loaded by "
            "name. Pass the same one as `segmenter`."
        )
    return RuleSegmenter() if name == "rules" else SatSegmenter(name)


def align(text: str, sentences: Sequence[str]) -> list[tuple[int, int]]:
    """
    Spans of sentences that another tool has extracted from a text, in order, and between which it may have dropped
    whitespace. That goes to the sentence before.
    """
    starts, position = [], 0
    for sentence in sentences:
        if not sentence.strip():
            continue
        start = text.find(sentence, position)
        if start < 0 or text[position:start].strip():
            raise ValueError(
                f"The segmenter returned the sentence {sentence[:60]!r}, but the text continues differently from "
                f"character {position} on. A segmenter must split the text without changing it."
            )
        starts.append(start)
        position = start + len(sentence)
    if text[position:].strip():
        raise ValueError(f"The segmenter left out the text from character {position} on: {text[position:][:60]!r}.")
    starts[:1] = [0]
    return list(zip(starts, [*starts[1:], len(text)], strict=True)) if text else []


def check_tiling(text: str, spans: Sequence[tuple[int, int]]) -> None:
    """
    Raises `ValueError` if `spans` do not tile `text`: required of a segmenter, for rewards of sentences to sum to that
    of the response.
    """
    starts, ends = [start for start, _ in spans], [end for _, end in spans]
    if [*starts, len(text)] != [0, *ends] or any(start >= end for start, end in spans):
        raise ValueError(
            f"The segmenter's spans {list(spans)[:5]} do not tile the text of {len(text)} characters. Each span must "
            "be non-empty and start where the previous one ends, from the first character to the last."
        )
