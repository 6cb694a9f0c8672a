"""Pictures as PNG files, which keep every pixel; and reading those of strangers."""

import io

from PIL import Image


class TooLarge(Exception):
    """A picture has more pixels than allowed."""


def encode_png(image: Image.Image) -> bytes:
    """A PNG file of the picture, quickly rather than tightly packed."""
    file = io.BytesIO()
    image.save(file, "PNG", compress_level=1)
    return file.getvalue()


def open_png(data: bytes, max_pixels: int) -> Image.Image | None:
    """Opens a PNG file without unpacking its pixels yet; None if it is none. Raises TooLarge from the size it claims."""
    try:
        image = Image.open(io.BytesIO(data), formats=["PNG"])
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise TooLarge(str(error)) from None
    except Exception:  # noqa: BLE001  Pillow raises many kinds for damaged files
        return None
    if image.width * image.height > max_pixels:
        raise TooLarge(f"a picture of {image.width} x {image.height} has more than {max_pixels} pixels")
    return image


def unpack(image: Image.Image | None) -> Image.Image | None:
    """Unpacks the pixels; None if the file is cut short or damaged."""
    try:
        if image is not None:
            image.load()
    except Exception:  # noqa: BLE001
        return None
    return image
