# SPDX-License-Identifier: Apache-2.0
"""The images of a prompt for a page, scaled down and embedded."""

from collections.abc import Sequence
from io import BytesIO
from typing import Any

from markupsafe import Markup

from ..rendering.images import load_picture, place_images
from ..reporting import figure


MAX_PIXELS = 320  # of a picture on the page, on its longer side


def pictures_of(prompt: Any, images: Sequence[Any] | None = None) -> Markup:
    """The images of a prompt, and those of its columns: see [`~endotrl.rendering.images.place_images`]."""
    shown = []
    _, pictures = place_images(0, prompt, images)
    for number, picture in enumerate(pictures, start=1):
        image = load_picture(0, picture).convert("RGB")
        image.thumbnail((MAX_PIXELS, MAX_PIXELS))
        buffer = BytesIO()
        image.save(buffer, format="png")
        shown.append(figure(buffer.getvalue(), alt=f"Image {number} of the prompt"))
    return Markup("").join(shown)
