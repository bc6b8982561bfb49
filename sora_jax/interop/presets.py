"""The published models by name: their exact sizes, without their weights."""

from sora_jax.codec import CodecConfig
from sora_jax.dit import DiTConfig
from sora_jax.model_config import ModelConfig, SamplingConfig
from sora_jax.text import TextConfig
from sora_jax.vision import VisionConfig

UMT5_XXL = TextConfig(
    vocabulary_size=256384,
    width=4096,
    heads=64,
    head_width=64,
    feed_forward=10240,
    layers=24,
    length=512,
    tokenizer="file",
)

# Statistics of the latents: the config of `AutoencoderKLWan` in Wan-AI/Wan2.1-T2V-14B-Diffusers and
# Wan-AI/Wan2.2-TI2V-5B-Diffusers.
CODEC_2_1 = CodecConfig(
    latent_channels=16,
    width=96,
    decoder_width=96,
    latents_mean=(-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508)
    + (0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921),
    latents_std=(2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743)
    + (3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160),
)
CODEC_2_2 = CodecConfig(
    latent_channels=48,
    width=160,
    decoder_width=256,
    patch=2,
    residual=True,
    latents_mean=(-0.2289, -0.0052, -0.1323, -0.2339, -0.2799, 0.0174, 0.1838, 0.1557)
    + (-0.1382, 0.0542, 0.2813, 0.0891, 0.1570, -0.0098, 0.0375, -0.1825)
    + (-0.2246, -0.1207, -0.0698, 0.5109, 0.2665, -0.2108, -0.2158, 0.2502)
    + (-0.2055, -0.0322, 0.1109, 0.1567, -0.0729, 0.0899, -0.2799, -0.1230)
    + (-0.0313, -0.1649, 0.0117, 0.0723, -0.2839, -0.2083, -0.0520, 0.3748)
    + (0.0152, 0.1957, 0.1433, -0.2944, 0.3573, -0.0548, -0.1681, -0.0667),
    latents_std=(0.4765, 1.0364, 0.4514, 1.1677, 0.5313, 0.4990, 0.4818, 0.5013)
    + (0.8158, 1.0344, 0.5894, 1.0901, 0.6885, 0.6165, 0.8454, 0.4978)
    + (0.5759, 0.3523, 0.7135, 0.6804, 0.5833, 1.4146, 0.8986, 0.5659)
    + (0.7069, 0.5338, 0.4889, 0.4917, 0.4069, 0.4999, 0.6866, 0.4093)
    + (0.5709, 0.6065, 0.6415, 0.4944, 0.5726, 1.2042, 0.5458, 1.6887)
    + (0.3971, 1.0600, 0.3943, 0.5537, 0.5444, 0.4089, 0.7468, 0.7744),
)

CLIP_VIT_H = VisionConfig(width=1280, heads=16, feed_forward=5120, layers=31)  # of the published 32

_UNIPC = {"solver": "unipc", "schedule": "wan-unipc"}
_LARGE = {"heads": 40, "head_width": 128, "feed_forward": 13824, "layers": 40, "text_width": 4096}

PRESETS = {
    "wan2.1-t2v-1.3b": ModelConfig(
        text=UMT5_XXL,
        codec=CODEC_2_1,
        dit=DiTConfig(16, heads=12, head_width=128, feed_forward=8960, layers=30, text_width=4096),
        sampling=SamplingConfig(50, 5.0, 3.0, frames=81, size=(480, 832), fps=16.0, **_UNIPC),
    ),
    "wan2.1-t2v-14b": ModelConfig(
        text=UMT5_XXL,
        codec=CODEC_2_1,
        dit=DiTConfig(16, **_LARGE),
        sampling=SamplingConfig(50, 5.0, 5.0, frames=81, size=(720, 1280), fps=16.0, **_UNIPC),
    ),
    "wan2.1-i2v-14b": ModelConfig(
        text=UMT5_XXL,
        codec=CODEC_2_1,
        dit=DiTConfig(16, **_LARGE, condition_channels=20, image_width=1280),
        sampling=SamplingConfig(40, 5.0, 5.0, frames=81, size=(720, 1280), fps=16.0, **_UNIPC),
        vision=CLIP_VIT_H,
    ),
    "wan2.1-flf2v-14b": ModelConfig(
        text=UMT5_XXL,
        codec=CODEC_2_1,
        dit=DiTConfig(16, **_LARGE, condition_channels=20, image_width=1280, image_positions=2 * CLIP_VIT_H.tokens),
        sampling=SamplingConfig(50, 5.5, 16.0, frames=81, size=(720, 1280), fps=16.0, **_UNIPC),
        vision=CLIP_VIT_H,
    ),
    "wan2.2-t2v-a14b": ModelConfig(
        text=UMT5_XXL,
        codec=CODEC_2_1,
        dit=DiTConfig(16, **_LARGE),
        sampling=SamplingConfig(40, 4.0, 12.0, frames=81, size=(720, 1280), fps=16.0, guidance_low=3.0, **_UNIPC),
        boundary=0.875,
    ),
    "wan2.2-i2v-a14b": ModelConfig(
        text=UMT5_XXL,
        codec=CODEC_2_1,
        dit=DiTConfig(16, **_LARGE, condition_channels=20),
        sampling=SamplingConfig(40, 3.5, 5.0, frames=81, size=(720, 1280), fps=16.0, guidance_low=3.5, **_UNIPC),
        boundary=0.9,
    ),
    "wan2.2-ti2v-5b": ModelConfig(
        text=UMT5_XXL,
        codec=CODEC_2_2,
        dit=DiTConfig(48, heads=24, head_width=128, feed_forward=14336, layers=30, text_width=4096),
        sampling=SamplingConfig(50, 5.0, 5.0, frames=121, size=(704, 1280), fps=24.0, **_UNIPC),
        known_frames=True,
    ),
}
