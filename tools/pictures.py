"""Pictures of samples with captions: rows of images, scatter plots of 2-D points."""

import math
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from common.files import atomic
from tools.video import is_animated, key_frames, save_animation, save_video
from training.report import to_image

MARGIN = 12
GAP = 2  # between images
SIDE = 200  # of a scatter plot
FINE = 3  # scatter plots are drawn this much larger and shrunk, which smooths them
GREY = (215, 215, 215)


def sample_rows(path, rows):
    """Rows of images or videos with their captions on the left.

    rows: list of (caption of one or two lines, images uint8 [n, C, H, W] or videos uint8
    [n, C, F, H, W]), C 1 or 3. Small images are enlarged by whole pixels. Videos: animated where
    the suffix of the path says so, else the first, the middle and the last frame.
    """
    if rows[0][1].ndim == 4:
        save(path, draw_rows(rows))
    elif is_animated(path):
        count = rows[0][1].shape[2]
        frames = ([(text, videos[:, :, i]) for text, videos in rows] for i in range(count))
        save_animation(path, [draw_rows(row) for row in frames])
    else:
        save(path, draw_rows([(text, key_frames(videos)) for text, videos in rows]))


def draw_rows(rows):
    """Sheet of rows of images, as `sample_rows` has them."""
    font = ImageFont.load_default(14)
    height, width = rows[0][1].shape[-2:]
    scale = max(1, 56 // width)
    height, width = scale * height, scale * width
    columns = max(len(images) for _, images in rows)
    text_width, text_height = largest_text([caption for caption, _ in rows], font)
    left = MARGIN + text_width + MARGIN
    pitch = max(height, text_height) + GAP
    sheet = Image.new(
        "RGB",
        (left + columns * (width + GAP) - GAP + MARGIN, len(rows) * pitch - GAP + 2 * MARGIN),
        "white",
    )
    pen = ImageDraw.Draw(sheet)
    for row, (caption, images) in enumerate(rows):
        middle = MARGIN + row * pitch + (pitch - GAP) // 2
        pen.text((MARGIN, middle), caption, fill="black", font=font, anchor="lm")
        for column, image in enumerate(images):
            tile = to_image(image).resize((width, height), Image.NEAREST)
            sheet.paste(tile, (left + column * (width + GAP), middle - height // 2))
    return sheet


def captioned(path, images, captions, notes, columns=5):
    """PNG of images, each with its caption and a note of one line below, in rows of up to 8.

    images: list of PIL images of one size; small ones are enlarged by whole pixels. Or of lists of
    the frames of a video: animated where the suffix of the path says so, else the middle frames.
    """
    if not isinstance(images[0], list):
        save(path, draw_captioned(images, captions, notes, columns))
    elif is_animated(path):
        sheets = [draw_captioned(frames, captions, notes, columns) for frames in zip(*images)]
        save_animation(path, sheets)
    else:
        middle = [frames[len(frames) // 2] for frames in images]
        save(path, draw_captioned(middle, captions, notes, columns))


def draw_captioned(images, captions, notes, columns):
    """Sheet of images, as `captioned` has them."""
    columns = min(columns, len(images), 8)
    width, height = images[0].size
    scale = max(1, 128 // width)
    width, height = scale * width, scale * height
    font = ImageFont.load_default(12)
    texts = [f"{wrapped(text, font, width)}\n{note}" for text, note in zip(captions, notes)]
    text_height = largest_text(texts, font)[1] + MARGIN
    rows = math.ceil(len(images) / columns)
    size = (columns * (width + MARGIN) + MARGIN, rows * (height + text_height) + MARGIN)
    sheet = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(sheet)
    for i, (image, text) in enumerate(zip(images, texts)):
        left = MARGIN + i % columns * (width + MARGIN)
        top = MARGIN + i // columns * (height + text_height)
        sheet.paste(image.resize((width, height), Image.NEAREST), (left, top))
        pen.text((left, top + height + GAP), text, fill="black", font=font)
    return sheet


def wrapped(text, font, width):
    """The text in up to three lines of at most `width` pixels; what is longer ends with dots."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    if len(lines) > 3:
        lines = [*lines[:2], f"{lines[2]} ..."]
    for i, line in enumerate(lines):
        while font.getlength(line) > width and len(line) > 1:
            line = line[:-1]
        lines[i] = line
    return "\n".join(lines)


def scatter(path, panels, colours, rings=(), extent=1.6):
    """PNG of scatter plots of the square [-extent, extent]^2, with captions above.

    panels: list of (caption of one or two lines, points [n, 2]). colours: one per point, the same
    in all panels. rings: list of (x, y, radius). Points outside are drawn at the border.
    """
    font = ImageFont.load_default(14)
    columns = min(len(panels), 6)
    rows = math.ceil(len(panels) / columns)
    text_width, text_height = largest_text([caption for caption, _ in panels], font)
    pitch_x = max(SIDE, text_width) + MARGIN
    pitch_y = SIDE + text_height + 2 * MARGIN
    sheet = Image.new("RGB", (columns * pitch_x + MARGIN, rows * pitch_y + MARGIN), "white")
    pen = ImageDraw.Draw(sheet)
    for i, (caption, points) in enumerate(panels):
        x = MARGIN + i % columns * pitch_x
        y = MARGIN + i // columns * pitch_y
        pen.text((x, y), caption, fill="black", font=font)
        sheet.paste(draw_points(points, colours, rings, extent), (x, y + text_height + MARGIN))
    save(path, sheet)


def draw_points(points, colours, rings, extent):
    size = FINE * SIDE
    plot = Image.new("RGB", (size, size), "white")
    pen = ImageDraw.Draw(plot)

    def circle(x, y, radius, **style):
        x, y = (extent + x) / (2 * extent) * size, (extent - y) / (2 * extent) * size
        pen.ellipse([x - radius, y - radius, x + radius, y + radius], **style)

    for x, y, radius in rings:
        circle(x, y, radius / (2 * extent) * size, outline=GREY, width=FINE)
    border = extent * (1 - 6 / SIDE)
    for (x, y), colour in zip(np.nan_to_num(points).clip(-border, border), colours):
        circle(x, y, FINE, fill=colour)
    pen.rectangle([0, 0, size - 1, size - 1], outline=GREY, width=FINE)
    return plot.resize((SIDE, SIDE), Image.LANCZOS)


def save_numbered(folder, numbers, images):
    """PNG files 000000.png, ... of images uint8 [n, C, H, W], C 1 or 3; WebP files of videos."""
    for number, image in zip(numbers.tolist(), images):
        if image.ndim == 4:
            save_video(folder / f"{number:06d}.webp", image)
        else:
            to_image(image).save(folder / f"{number:06d}.png")


def by_angle(points):
    """A colour for each point [n, 2]: its direction from the middle."""
    degrees = np.degrees(np.arctan2(points[:, 1], points[:, 0])) % 360
    return [f"hsv({angle:.0f}, 85%, 85%)" for angle in degrees]


def largest_text(texts, font):
    """Width and height of the largest of some texts, in pixels."""
    pen = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    boxes = [pen.textbbox((0, 0), text, font=font) for text in texts]
    return math.ceil(max(box[2] for box in boxes)), math.ceil(max(box[3] for box in boxes))


def save(path, sheet):
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with atomic(path) as f:
        sheet.save(f, "PNG", optimize=True)
