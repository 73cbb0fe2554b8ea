"""Conversion of colors by ICC profiles."""

from __future__ import annotations

from io import BytesIO

from PIL import Image, ImageCms

MODES = ("RGB", "RGBA", "L", "CMYK", "LAB")  # pixels to which a profile can apply


def to_srgb(image: Image.Image, profile: bytes) -> Image.Image:
    """Convert an image to sRGB by its ICC profile.

    Perceptual intent. The result has the mode RGB, or RGBA if the image is transparent. Raises ValueError for a damaged
    profile and for one of another color space than the image.
    """
    transparent = image.has_transparency_data
    if image.mode == "LA" or (image.mode == "L" and transparent):  # Pillow converts gray without its alpha
        with_alpha = image.convert("LA")
        converted = to_srgb(with_alpha.getchannel("L"), profile)
        converted.putalpha(with_alpha.getchannel("A"))
        return converted
    if transparent or image.mode not in MODES:
        image = image.convert("RGBA" if transparent else "RGB")
    try:
        source = ImageCms.ImageCmsProfile(BytesIO(profile))
        mode = "RGBA" if transparent else "RGB"
        transform = ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), image.mode, mode)
        return transform.apply(image)
    except (OSError, ValueError, ImageCms.PyCMSError) as error:
        raise ValueError("the ICC profile is damaged, or of another color space") from error
