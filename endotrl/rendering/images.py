# SPDX-License-Identifier: Apache-2.0
"""Images of prompts: from columns and message parts to pictures, and to the processor's inputs."""

import base64
import binascii
import hashlib
import io
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from transformers import PretrainedConfig, ProcessorMixin

from .messages import Message, Prompt, has_parts, image_parts, images_of_rows, is_image_part


# Treatment of images in prompts: read by the frozen model, or left out.
Images = Literal["read", "ignore"]
# Keys of an image part that hold its image, in the order of chat templates' own loaders.
IMAGE_KEYS = ("image", "url", "path", "base64", "image_url")
# Token types from processors; zero for the tokens of a completion, as in TRL.
TOKEN_KEYS = ("token_type_ids", "mm_token_type_ids")


@dataclass(frozen=True)
class ImageInputs:
    """A processor's pixels, sizes and token types for a prompt alone. Two are equal if all their tensors are."""

    tensors: Mapping[str, Tensor] = field(compare=False, repr=False)
    digest: str

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> "ImageInputs":
        digest = hashlib.blake2b()
        for key in sorted(tensors):
            tensor = tensors[key].contiguous()
            digest.update(f"{key} {tensor.dtype} {list(tensor.shape)} ".encode())
            digest.update(tensor.flatten().view(torch.uint8).numpy().tobytes())
        return cls(tensors, digest.hexdigest())

    def with_token_types(self, ids: Sequence[int], others: Sequence[int]) -> "ImageInputs":
        """The same for a prompt with other token ids: each gets the type that it has in `ids`."""
        types = {key: dict(zip(ids, self.tensors[key][0].tolist(), strict=True)) for key in self._token_keys}
        moved = {key: torch.tensor([[of.get(token_id, 0) for token_id in others]]) for key, of in types.items()}
        return ImageInputs.of({**self.tensors, **moved})

    def before(self, num_tokens: int, device: torch.device) -> dict[str, Tensor]:
        """Model inputs besides the prompt's ids and `num_tokens` tokens of a completion."""
        own = {key: torch.nn.functional.pad(self.tensors[key], (0, num_tokens)) for key in self._token_keys}
        return {key: own.get(key, tensor).to(device) for key, tensor in self.tensors.items()}

    @property
    def _token_keys(self) -> list[str]:
        return [key for key in TOKEN_KEYS if key in self.tensors]


@dataclass(frozen=True)
class Placeholders:
    """Placeholder tokens of a model for inputs other than text."""

    image: int | None = None  # `None` if the model reads no images
    others: frozenset[int] = frozenset()  # for video and audio

    @classmethod
    def of(cls, config: PretrainedConfig) -> "Placeholders":
        settings = config.to_dict()

        def token_id(kind: str) -> int | None:
            found = settings.get(f"{kind}_token_id")
            return settings.get(f"{kind}_token_index") if found is None else found

        reads_images = any(key in config.sub_configs for key in ("vision_config", "vision_tower_config"))
        others = [token_id("video"), token_id("audio")] if config.sub_configs else []
        return cls(token_id("image") if reads_images else None, frozenset(i for i in others if i is not None))

    @property
    def all(self) -> frozenset[int]:
        return self.others if self.image is None else self.others | {self.image}


def refuse_images(columns: Mapping[str, Any], num_rows: int, who: str) -> None:
    """Raises `ValueError` if the columns of a batch have images, as `who` reads only text."""
    for row, images in enumerate(images_of_rows(columns.get("image"), columns.get("images"), num_rows) or []):
        if images:
            raise ValueError(f"Row {row} has images, but {who} reads only text. Remove such rows.")


def place_images(row: int, prompt: Prompt, column: Sequence[Any] | None) -> tuple[Prompt, list[Any]]:
    """
    A prompt with image parts as bare placeholders, `{"type": "image"}`, and the images for them. Images of the row's
    columns fill empty placeholders; without placeholders, they are put before the first user message, as in
    [`~trl.data_utils.prepare_multimodal_messages`]. Images that a trainer has placed already are not placed again.
    """
    given = list(column or [])
    if isinstance(prompt, str):
        if given:
            raise ValueError(
                f"Row {row} has {len(given)} images, but its prompt is plain text, which has no place for them. Pass "
                "conversational prompts and completions (lists of messages)."
            )
        return prompt, []
    pictures = [_picture_of(part) for part in image_parts(prompt)]
    if given and not pictures:
        prompt, pictures = _before_first_user(row, prompt, len(given)), [None] * len(given)
    empty = sum(picture is None for picture in pictures)
    placed = empty == 0 and all(any(_is_same(picture, other) for other in pictures) for picture in given)
    if empty != len(given) and not placed:
        raise ValueError(
            f"The prompt of row {row} has {len(pictures)} image parts, {empty} of them empty (`{{'type': 'image'}}`), "
            f"but the columns `image` and `images` have {len(given)} images for it. Pass one image per empty part, in "
            "order, and no other images in the columns."
        )
    if not pictures:
        return prompt, []
    filler = iter(given)
    prompt = _with_parts(prompt, lambda parts: [{"type": "image"} if is_image_part(p) else p for p in parts])
    return prompt, [next(filler) if picture is None else picture for picture in pictures]


def read_by_processor(
    processor: ProcessorMixin, text: str, special: bool, pictures: Sequence[Image.Image]
) -> tuple[list[int], ImageInputs | None]:
    """Token ids of a prompt, with expanded placeholders of its images, and the further model inputs."""
    name = type(processor).__name__
    given: dict[str, Any] = {"images": [list(pictures)], "return_tensors": "pt"} if pictures else {}
    try:
        encoded = processor(text=[text], add_special_tokens=special, **given)
    except (ValueError, TypeError, LookupError, StopIteration) as error:
        raise ValueError(f"The frozen model's {name} rejects a prompt with {len(pictures)} images: {error}") from error
    ids = [int(token_id) for token_id in encoded["input_ids"][0]]
    if not pictures:
        return ids, None
    rest = {key: value for key, value in encoded.items() if key not in ("input_ids", "attention_mask")}
    for key, value in rest.items():
        if not isinstance(value, Tensor):
            raise ValueError(
                f"The {name} returns `{key}` as {type(value).__name__}, but endotrl supports only tensors. Please "
                "open an issue with the model's name."
            )
    return ids, ImageInputs.of(rest)


def without_images(prompt: Prompt) -> Prompt:
    """A prompt without its image parts."""
    if isinstance(prompt, str):
        return prompt
    return _with_parts(prompt, lambda parts: [part for part in parts if not is_image_part(part)])


def load_picture(row: int, picture: Any) -> Image.Image:
    """
    Loads a picture as a `PIL` image: from one; from the path, data URI, base64 or bytes of a file; from an undecoded
    value of a dataset's `Image` feature, `{"bytes": ..., "path": ...}`; or from 8-bit values of shape `(height,
    width[, 3])`. Files are turned upright by their EXIF orientation, as transformers and datasets do; transparency is
    dropped where transformers drops it: from files named or encoded in a text.
    """
    if isinstance(picture, Image.Image):
        return picture
    in_text = isinstance(picture, str | os.PathLike)
    if isinstance(picture, Mapping) and ("bytes" in picture or "path" in picture):
        picture = picture.get("bytes") or picture.get("path")
    try:
        if isinstance(picture, np.ndarray) and picture.dtype == np.uint8:
            return Image.fromarray(picture)
        if isinstance(picture, str):
            picture = _file_of(row, picture)
        if isinstance(picture, bytes | bytearray):
            picture = io.BytesIO(picture)
        elif not isinstance(picture, os.PathLike):
            raise TypeError(
                f"An image of row {row} must be a PIL image, a path, a data URI, base64, the bytes of a file or a "
                f"uint8 array, got {type(picture).__name__}."
            )
        loaded = ImageOps.exif_transpose(Image.open(picture))
        return loaded.convert("RGB") if in_text else loaded
    except (OSError, Image.DecompressionBombError, binascii.Error) as error:
        raise ValueError(f"An image of row {row} cannot be read: {str(error)[:200]}") from error


def picture_digest(picture: Image.Image) -> str:
    """Digest of a picture's content."""
    shown = (picture.mode, picture.size, picture.getpalette(), picture.info.get("transparency"))
    return hashlib.blake2b(repr(shown).encode() + picture.tobytes()).hexdigest()


def _file_of(row: int, text: str) -> bytes | os.PathLike[str]:
    """Resolves the text of an image: a path, or the base64 content of a file."""
    if text.startswith("data:"):
        return base64.b64decode(text.partition(",")[2], validate=True)
    if text.startswith(("http:", "https:", "ftp:", "s3:", "gs:", "hf:")):
        raise ValueError(
            f"An image of row {row} is the URL {text[:80]!r}, but rewards do not download images. Store the images in "
            "the dataset (`dataset.cast_column(name, datasets.Image())`), or pass local paths."
        )
    path = Path(text.removeprefix("file://"))
    # Base64 of a file is longer than any file name.
    if len(text) < 1024 and (path.is_file() or len(text) < 64 or path.suffix):
        return path
    return base64.b64decode(text, validate=True)


def _picture_of(part: Message) -> Any:
    picture = next((part[key] for key in IMAGE_KEYS if part.get(key) is not None), None)
    # `{"type": "image_url", "image_url": {"url": ...}}`
    return picture["url"] if isinstance(picture, Mapping) and "url" in picture else picture


def _is_same(picture: Any, other: Any) -> bool:
    return picture is other or (isinstance(picture, str | Image.Image) and bool(picture == other))


def _before_first_user(row: int, prompt: Sequence[Message], count: int) -> list[Message]:
    first = next((i for i, message in enumerate(prompt) if message["role"] == "user"), None)
    if first is None:
        raise ValueError(
            f"Row {row} has images in its columns, but its prompt has no user message to put them in. Add one, or "
            "mark their places with `{'type': 'image'}` parts."
        )
    content = prompt[first].get("content")
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else list(content or [])
    message = {**prompt[first], "content": [{"type": "image"}] * count + parts}
    return [*prompt[:first], message, *prompt[first + 1 :]]


def _with_parts(prompt: Sequence[Message], change: Callable[[list[Any]], list[Any]]) -> list[Message]:
    """Messages with changed parts, if their content has any."""
    return [
        {**message, "content": change(message["content"])} if has_parts(message) else message for message in prompt
    ]
