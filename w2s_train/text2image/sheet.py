"""A contact sheet: a row for each prompt, a column for each seed."""

import textwrap
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torchvision.transforms.functional import pil_to_tensor, to_pil_image

from w2s_train.evaluation.images import image_grid

SIDE = 256  # pixels of the longer side of an image, at most
LABEL, FONT = 240, 15  # pixels, of the column of prompts and its letters
PADDING = 2  # of the grid


def contact_sheet(rows: Sequence[tuple[str, Sequence[Path]]]) -> Image.Image:
    """Prompts on the left, and their images, made smaller where they are large.

    Args:
        rows: A prompt, and the files of its images; of all prompts equally many.
    """
    images = [_read(path) for _, paths in rows for path in paths]
    columns, height = len(rows[0][1]), images[0].height
    tensors = torch.stack([pil_to_tensor(image) for image in images])
    grid = to_pil_image(image_grid(tensors, columns, 1))
    sheet = Image.new("RGB", (LABEL + grid.width, grid.height), "white")
    sheet.paste(grid, (LABEL, 0))
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(FONT)
    letters = int(LABEL / font.getlength("n"))
    for i, (prompt, _) in enumerate(rows):
        lines = textwrap.wrap(prompt, letters, max_lines=max(1, height // (FONT + 4)))
        draw.multiline_text((4, PADDING + i * (height + PADDING)), "\n".join(lines), "black", font)
    return sheet


def _read(path: Path) -> Image.Image:
    with Image.open(path) as image:
        small = image.convert("RGB")
    small.thumbnail((SIDE, SIDE))
    return small
