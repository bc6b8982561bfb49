"""Pictures are resized as PIL does it, on which the published pipelines rely."""

import numpy as np
import pytest
from PIL import Image

from sora_jax.vision import resize


@pytest.mark.parametrize("method,filter", [("cubic", Image.BICUBIC), ("lanczos3", Image.LANCZOS)])
@pytest.mark.parametrize("size", [(64, 64), (20, 30), (64, 30), (20, 90), (5, 40), (7, 48), (32, 48)])
def test_a_picture_is_resized_as_pil_does_it(size, method, filter):
    """One of noise: what is smooth would not tell."""
    image_HWC = np.random.default_rng(0).integers(0, 256, (32, 48, 3), np.uint8)
    expected_HWC = np.asarray(Image.fromarray(image_HWC).resize(size[::-1], filter))
    found_HWC = resize(image_HWC, size, method)
    assert found_HWC.dtype == np.float32 and found_HWC.shape == expected_HWC.shape
    # A level here and there, since PIL's weights are whole numbers.
    apart = np.abs(found_HWC - expected_HWC)
    assert apart.max() <= 1 and (apart > 0).mean() < 0.02
