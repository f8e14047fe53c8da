"""Numerals in the fonts that ship with matplotlib."""

from __future__ import annotations

import functools
from pathlib import Path

from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from miniature.emoji import SPRITE

FONTS = (  # shipped with matplotlib; each has a shape of its own for the numerals
    "DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSans-BoldOblique",
    "DejaVuSansMono", "DejaVuSansMono-Bold", "DejaVuSansMono-Oblique", "DejaVuSansMono-BoldOblique",
    "DejaVuSerif", "DejaVuSerif-Bold", "DejaVuSerif-Italic", "DejaVuSerif-BoldItalic",
    "STIXGeneral", "STIXGeneralBol", "STIXGeneralItalic", "STIXGeneralBolIta",
    "cmr10", "cmb10", "cmss10", "cmtt10",
)  # fmt: skip


def draw_numeral(font: str, digit: str, beside: tuple[str, str], ink: tuple[int, int, int]) -> UInt8[Tensor, "4 72 72"]:
    from torchvision.transforms.functional import pil_to_tensor  # takes a second to import

    face = _font(font)
    image = Image.new("RGBA", (SPRITE, SPRITE), (*ink, 0))
    draw = ImageDraw.Draw(image)
    rim = (255, 255, 255) if sum(ink) < 383 else (0, 0, 0)
    width = face.getlength(digit)
    for text, left in ((digit, 0.0), (beside[0], -width), (beside[1], width)):
        place = (SPRITE / 2 + left, SPRITE / 2)
        draw.text(place, text, font=face, fill=(*ink, 255), stroke_width=2, stroke_fill=(*rim, 255), anchor="mm")
    return pil_to_tensor(image)


@functools.cache
def _font(name: str) -> ImageFont.FreeTypeFont:
    import matplotlib

    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts/ttf" / f"{name}.ttf", 56)
