"""A reward of one's own: how warm a picture's colours are. `recipes/nano-custom-reward.yaml` names it."""

import numpy as np


def warmth(images, prompts, **metadata):
    """Mean of red minus blue, from -1 (all blue) to 1 (all red)."""
    arrays = [np.asarray(image.convert("RGB"), dtype=np.float32) / 255 for image in images]
    return [float((array[..., 0] - array[..., 2]).mean()) for array in arrays]
