"""The image encoder of Wan 2.1's image-to-video models: the vision transformer of CLIP (arXiv:2103.00020).

    image_HWC -> 224 x 224 -> patches and one class token -> blocks -> features of every token

Published as `CLIPVisionModel`; the pipelines take the tokens before the last block, which therefore is not here.
"""

from dataclasses import dataclass

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from sora_jax import media
from sora_jax.layers import Dense, LayerNorm, check_sizes

# Of the pictures CLIP was trained on, in [0, 1].
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class VisionConfig:
    """Sizes of the image encoder.

    Attributes:
      width: D. heads: K. feed_forward: M. layers: blocks that are run.
      image_size: rows and columns of the picture it sees. patch: of each token.
      activation: "gelu" (exact) or "quick_gelu", x sigmoid(1.702 x).
      epsilon: of the norms.
    """

    width: int
    heads: int
    feed_forward: int
    layers: int
    image_size: int = 224
    patch: int = 14
    activation: str = "gelu"
    epsilon: float = 1e-5

    def __post_init__(self):
        check_sizes(self, "width", "heads", "feed_forward", "layers", "image_size", "patch")
        if self.activation not in ("gelu", "quick_gelu"):
            raise ValueError(f"activation is {self.activation!r}; it can be 'gelu' or 'quick_gelu'")

    @property
    def tokens(self) -> int:
        """L: the class token and the patches."""
        return 1 + (self.image_size // self.patch) ** 2


def preprocess(image_HWC: np.ndarray, size: int) -> np.ndarray:
    """A picture, uint8 (H, W, 3), as CLIP sees it: shorter side `size`, the middle square, normalised; float32."""
    H, W, _ = image_HWC.shape
    rows, columns = (size, int(size * W / H)) if H <= W else (int(size * H / W), size)
    resized = media.resize(image_HWC, (rows, columns), "bicubic")
    top, left = (rows - size) // 2, (columns - size) // 2
    middle = resized[top : top + size, left : left + size] / np.float32(255)
    return (middle - np.float32(MEAN)) / np.float32(STD)


class VisionBlock(nn.Module):
    """Self-attention, then the feed-forward, each after a norm and added to its input."""

    config: VisionConfig

    @nn.compact
    def __call__(self, x_BLD: jax.Array):
        config = self.config
        B, L, D = x_BLD.shape
        init = nn.initializers.lecun_normal()
        h = LayerNorm(config.epsilon, name="attention_norm")(x_BLD)
        q, k, v = (
            Dense(D, ("width", "heads"), jnp.float32, init, name=name)(h).reshape(B, L, config.heads, -1)
            for name in ("query", "key", "value")
        )
        h = jax.nn.dot_product_attention(q, k, v).reshape(B, L, D)
        x_BLD += Dense(D, ("heads", "width"), jnp.float32, init, name="out")(h)
        h = LayerNorm(config.epsilon, name="feed_forward_norm")(x_BLD)
        h = Dense(config.feed_forward, ("width", "feed_forward"), jnp.float32, init, name="up")(h)
        h = nn.gelu(h, approximate=False) if config.activation == "gelu" else h * nn.sigmoid(1.702 * h)
        return x_BLD + Dense(D, ("feed_forward", "width"), jnp.float32, init, name="down")(h), None


class VisionEncoder(nn.Module):
    """Preprocessed pictures (B, image_size, image_size, 3) float32 to features (B, L, D) float32."""

    config: VisionConfig

    @nn.compact
    def __call__(self, image_BHWC: jax.Array) -> jax.Array:
        config = self.config
        B, side, _, C = image_BHWC.shape
        rows, p, D = side // config.patch, config.patch, config.width
        patches = image_BHWC.reshape(B, rows, p, rows, p, C).transpose(0, 1, 3, 2, 4, 5).reshape(B, rows**2, -1)

        def parameter(name, shape, axes):
            return self.param(name, nn.with_logical_partitioning(nn.initializers.normal(0.02), axes), shape)

        kernel = parameter("patches_kernel", (p * p * C, D), (None, "width"))
        first = jnp.broadcast_to(parameter("class", (D,), ("width",)), (B, 1, D))
        x_BLD = jnp.concatenate([first, patches @ kernel], axis=1)
        x_BLD += parameter("positions", (config.tokens, D), (None, "width"))
        blocks = nn.scan(
            VisionBlock,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=config.layers,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        x_BLD, _ = blocks(config, name="blocks")(LayerNorm(config.epsilon, name="norm_in")(x_BLD))
        return x_BLD.astype(jnp.float32)
