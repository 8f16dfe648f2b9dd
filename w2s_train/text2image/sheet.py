"""A contact sheet: a row for each prompt, a column for each seed."""

import textwrap
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torchvision.transforms.functional import pil_to_tensor, to_pil_image

from w2s_train.errors import UserError
from w2s_train.evaluation.images import image_grid
from w2s_train.shards.decode import BrokenImage, open_image

SIDE = 256  # pixels of the longer side of an image, at most
LABEL, HEAD, FONT = 240, 20, 15  # pixels, of the column of prompts, the row of seeds, letters
PADDING = 2  # of the grid


def contact_sheet(
    prompts: Sequence[str], seeds: Sequence[int], files: Sequence[Path]
) -> Image.Image:
    """Prompts on the left, seeds above, and their images, made smaller where they are large.

    Args:
        prompts: Of the rows.
        seeds: Of the columns.
        files: Of the images, row by row; all of one size.

    Raises:
        UserError: One cannot be read.
    """
    images = [_read(path) for path in files]
    width, height = (side + PADDING for side in images[0].size)
    grid = image_grid(torch.stack([pil_to_tensor(image) for image in images]), len(seeds), 1)
    size = (LABEL + PADDING + width * len(seeds), HEAD + PADDING + height * len(prompts))
    sheet = Image.new("RGB", size, "white")
    sheet.paste(to_pil_image(grid), (LABEL, HEAD))
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(FONT)
    for i, seed in enumerate(seeds):
        draw.text((LABEL + PADDING + i * width, 1), str(seed), "black", font)
    letters, lines = int(LABEL / font.getlength("n")), max(1, height // (FONT + 4))
    for i, prompt in enumerate(prompts):
        text = "\n".join(textwrap.wrap(prompt, letters, max_lines=lines))
        draw.multiline_text((4, HEAD + PADDING + i * height), text, "black", font)
    return sheet


def read_image(path: Path) -> Image.Image:
    """One that was made, in RGB.

    Raises:
        UserError: It cannot be read.
    """
    try:
        return open_image(path.read_bytes()).convert("RGB")
    except BrokenImage as error:
        raise UserError(f"{path}: {error}; delete it, and it is made again") from error


def _read(path: Path) -> Image.Image:
    small = read_image(path)
    small.thumbnail((SIDE, SIDE))
    return small
