"""Writes the golden values: tiny random models in the published layout, and what the public implementations make of
given inputs. Needs the extra `parity`; the tests that read the values do not.

    python tests/golden/make.py

Each of the folders `t2v` (Wan 2.1), `ti2v` (Wan 2.2 5B), `a14b` (Wan 2.2 A14B), `i2v` and `flf` (Wan 2.1 image to
video, and first to last image) and `i2v-a14b` (Wan 2.2 image to video) is a whole pipeline as `save_pretrained` writes
it, with `expected.npz` beside it.
"""

import shutil
from pathlib import Path

import numpy as np
import torch
from diffusers import (
    AutoencoderKLWan,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
    WanImageToVideoPipeline,
    WanPipeline,
    WanTransformer3DModel,
)
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    PreTrainedTokenizerFast,
    UMT5Config,
    UMT5EncoderModel,
)

HERE = Path(__file__).parent
KINDS = ("t2v", "ti2v", "a14b", "i2v", "flf", "i2v-a14b")
FROM_IMAGE = ("i2v", "flf", "i2v-a14b")
SEEING = ("i2v", "flf")  # with an image encoder
WORDS = ("<pad>", "</s>", "<unk>", "a", "red", "ball", "rolls", "behind", "gray", "wall", "blue", "cube")
FRAMES = 9


def randomise(module):
    """Weights of every kind that matter: no norm at one, no bias and no gate at zero."""
    for name, parameter in module.named_parameters():
        fan_in = max(1, int(np.prod(parameter.shape[1:])))
        scale = 0.3 if parameter.ndim < 2 or "table" in name else 0.9 / fan_in**0.5
        torch.nn.init.normal_(parameter, std=scale)
        if "gamma" in name or (parameter.ndim == 1 and "norm" in name and "weight" in name):
            parameter.data += 1
    return module.eval()


def tokenizer():
    """Words in place of UMT5's 256,384 pieces, in the same file format and with the same end token."""
    words = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


def codec(kind, channels, base=4, decoder=6, multipliers=(1, 2, 2), time=(True, True), blocks=1):
    sizes = {
        "base_dim": base,
        "z_dim": channels,
        "dim_mult": list(multipliers),
        "num_res_blocks": blocks,
        "temperal_downsample": list(time),
        "latents_mean": np.linspace(-0.5, 0.5, channels).tolist(),
        "latents_std": np.linspace(0.5, 2.0, channels).tolist(),
        "scale_factor_temporal": 2 ** sum(time),
        "scale_factor_spatial": 2 ** len(time),
    }
    if kind == "ti2v":
        sizes |= {"is_residual": True, "decoder_base_dim": decoder, "in_channels": 12, "out_channels": 12}
        sizes |= {"patch_size": 2, "scale_factor_spatial": 2 ** (len(time) + 1)}
    return randomise(AutoencoderKLWan(**sizes))


def transformer(
    channels,
    heads=2,
    head_width=16,
    feed_forward=48,
    layers=3,
    text=24,
    frequencies=32,
    condition=0,
    image=0,
    positions=0,
    patch=(1, 2, 2),
):
    return randomise(
        WanTransformer3DModel(
            patch_size=patch,
            num_attention_heads=heads,
            attention_head_dim=head_width,
            in_channels=channels + condition,
            image_dim=image or None,
            added_kv_proj_dim=heads * head_width if image else None,
            pos_embed_seq_len=positions or None,
            out_channels=channels,
            text_dim=text,
            freq_dim=frequencies,
            ffn_dim=feed_forward,
            num_layers=layers,
        )
    )


def text_encoder(width=24, heads=3, head_width=8, feed_forward=40, layers=2):
    config = UMT5Config(
        vocab_size=32, d_model=width, d_kv=head_width, d_ff=feed_forward, num_layers=layers, num_heads=heads
    )
    return randomise(UMT5EncoderModel(config))


def image_encoder(width=20, size=28, heads=2, feed_forward=32, layers=3):
    config = CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=feed_forward,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        image_size=size,
        patch_size=14,
        hidden_act="gelu",
    )
    processor = CLIPImageProcessor(size={"shortest_edge": size}, crop_size={"height": size, "width": size})
    return randomise(CLIPVisionModel(config)), processor


def scheduler(kind):
    if kind == "ti2v":
        return FlowMatchEulerDiscreteScheduler(shift=5.0)
    return UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)


def pipeline(kind, channels=None):
    channels = channels or (12 if kind == "ti2v" else 4)
    two = kind.endswith("a14b")
    if kind in FROM_IMAGE:
        options, encoder, processor = {"condition": 4 + channels}, None, None
        if kind in SEEING:
            encoder, processor = image_encoder()
            options |= {"image": 20, "positions": 10 if kind == "flf" else 0}
        made = WanImageToVideoPipeline(
            tokenizer=tokenizer(),
            text_encoder=text_encoder(),
            vae=codec(kind, channels),
            scheduler=scheduler(kind),
            image_encoder=encoder,
            image_processor=processor,
            transformer=transformer(channels, **options),
            transformer_2=transformer(channels, **options) if two else None,
            boundary_ratio=0.875 if two else None,
        )
        made.set_progress_bar_config(disable=True)
        return made
    made = WanPipeline(
        tokenizer=tokenizer(),
        text_encoder=text_encoder(),
        vae=codec(kind, channels),
        scheduler=scheduler(kind),
        transformer=transformer(channels),
        transformer_2=transformer(channels) if two else None,
        boundary_ratio=0.875 if two else None,
        expand_timesteps=kind == "ti2v",
    )
    made.set_progress_bar_config(disable=True)
    return made


def channels_first(x):
    """(B, T, H, W, C) to torch's (B, C, T, H, W)."""
    return torch.tensor(np.moveaxis(x, -1, 1))


def channels_last(x):
    return np.moveaxis(np.asarray(x), 1, -1)


@torch.no_grad()
def run_dit(module, latents_BFYXZ, thousandths_BF, text_BLD, image_BLD=None):
    """The velocity; a level for each frame is given to each of its patches, as the 5B pipeline does."""
    B, F, Y, X, _ = latents_BFYXZ.shape
    _, py, px = module.config.patch_size
    if (thousandths_BF == thousandths_BF[:, :1]).all():
        levels = torch.tensor(thousandths_BF[:, 0])
    else:
        levels = torch.tensor(np.repeat(thousandths_BF, (Y // py) * (X // px), axis=1))
    inputs = [channels_first(latents_BFYXZ).to(module.dtype), levels, torch.tensor(text_BLD).to(module.dtype)]
    if image_BLD is not None:
        images = 2 if module.config.pos_embed_seq_len else 1  # they stand one below the other
        inputs.append(torch.tensor(image_BLD).to(module.dtype).reshape(B * images, -1, image_BLD.shape[-1]))
    return channels_last(module(*inputs, return_dict=False)[0].float())


@torch.no_grad()
def run_text(module, ids_BL):
    """Features, zero at the padding."""
    out = module(torch.tensor(ids_BL), torch.tensor(ids_BL > 0)).last_hidden_state.float().numpy()
    return out * (ids_BL > 0)[..., None]


@torch.no_grad()
def run_codec(module, video_BTHWC):
    """Mean and log variance of the latents, and the video decoded from the mean."""
    posterior = module.encode(channels_first(video_BTHWC)).latent_dist
    decoded = module.decode(posterior.mean).sample
    return channels_last(posterior.mean), channels_last(posterior.logvar), channels_last(decoded)


def run_pipeline(
    made, prompt, negative_prompt, noise_BFYXZ, size, frames, steps, guidance, guidance_low=None, image=None, last=None
):
    """Frames in [0, 1], (T, H, W, 3). `image` and `last` are uint8 (H, W, 3)."""
    pictures = {"image": image, "last_image": last}
    return made(
        prompt=prompt,
        **{name: Image.fromarray(picture) for name, picture in pictures.items() if picture is not None},
        negative_prompt=negative_prompt,
        height=size[0],
        width=size[1],
        num_frames=frames,
        num_inference_steps=steps,
        guidance_scale=guidance,
        guidance_scale_2=guidance_low,
        latents=channels_first(noise_BFYXZ),
        output_type="np",
    ).frames[0]


def run_scheduler(made, start, velocity, steps):
    """Latents after `steps` steps where the model gives `velocity(x, level)`."""
    made.set_timesteps(steps)
    x = torch.tensor(start)
    for t in made.timesteps:
        x = made.step(velocity(x, float(t) / 1000), t, x, return_dict=False)[0]
    return x.numpy()


@torch.no_grad()
def run_image_encoder(made, image):
    """Features of one picture, uint8 (H, W, 3), and what the encoder saw of it: (1, L, D), (1, size, size, 3)."""
    picture = Image.fromarray(image)
    seen = made.image_processor(images=picture, return_tensors="np")["pixel_values"]
    return made.encode_image(picture).numpy(), np.moveaxis(seen, 1, -1)


def pictures(random, height, width):
    """Two smooth pictures, uint8 (2, H, W, 3)."""
    small = random.integers(0, 256, (2, 3, 3, 3), np.uint8)
    return np.stack([np.asarray(Image.fromarray(picture).resize((width, height))) for picture in small])


def expected(kind, made):
    random = np.random.default_rng(1)

    def normal(*shape):
        return random.normal(size=shape).astype(np.float32)

    Z, stride = made.vae.config.z_dim, made.vae.config.scale_factor_spatial
    values = {
        "dit_latents": normal(2, 3, 4, 6, Z),
        "dit_levels": np.repeat([[999], [417]], 3, axis=1),
        "dit_text": normal(2, 512, 24).astype(np.float16).astype(np.float32),
        "text_ids": np.where(np.arange(512) < [[20], [300]], random.integers(3, 32, (2, 512)), 0),
        "video": random.uniform(-1, 1, (1, FRAMES, 4 * stride, 6 * stride, 3)).astype(np.float32),
        "noise": normal(1, 1 + (FRAMES - 1) // 4, 8, 4, Z),
        "solver_start": normal(1, 2, 4, 4, 2),
    }
    if kind == "ti2v":
        values["dit_levels"] = np.array([[0, 417, 900], [10, 20, 700]])
    size, options = (8 * stride, 4 * stride), {}
    if kind in (*FROM_IMAGE, "ti2v"):
        # Not of the video's size: the pipelines stretch them.
        values["image"], values["last_image"] = pictures(random, 10 * stride + 5, 9 * stride)
        options = {"image": values["image"], "last": values["last_image"] if kind == "flf" else None}
    if kind in SEEING:
        values["features"], values["seen"] = run_image_encoder(made, values["image"])
        values["dit_image"] = normal(2, 10 if kind == "flf" else 7, 20)
    values["dit_condition"] = normal(2, 3, 4, 6, made.transformer.config.in_channels - Z)
    latents = np.concatenate([values["dit_latents"], values["dit_condition"]], axis=-1)
    inputs = latents, values["dit_levels"], values["dit_text"], values.get("dit_image")
    values["dit"] = run_dit(made.transformer, *inputs)
    if kind.endswith("a14b"):
        values["dit_low"] = run_dit(made.transformer_2, *inputs)
    if kind == "t2v":
        # How far the reference in bfloat16 is from itself in float32.
        half = WanTransformer3DModel.from_pretrained(HERE / kind / "transformer", torch_dtype=torch.bfloat16)
        velocity = run_dit(half, *inputs)
        values["dit_bfloat16_error"] = np.linalg.norm(velocity - values["dit"]) / np.linalg.norm(values["dit"])
    values["text"] = run_text(made.text_encoder, values["text_ids"])
    if kind == "t2v":
        half = UMT5EncoderModel.from_pretrained(HERE / kind / "text_encoder", dtype=torch.bfloat16)
        features = run_text(half, values["text_ids"])
        values["text_bfloat16_error"] = np.linalg.norm(features - values["text"]) / np.linalg.norm(values["text"])
    values["mean"], values["log_variance"], values["decoded"] = run_codec(made.vae, values["video"])
    values["solver"] = run_scheduler(scheduler(kind), values["solver_start"], lambda x, t: torch.sin(3 * x) + t, 20)
    prompts = ("a red ball rolls behind a gray wall", "a blue cube")
    settings = {"size": size, "frames": FRAMES, "steps": 6, "guidance": 4.0}
    if kind == "ti2v":
        parts = {**made.components, "image_encoder": None, "image_processor": None}
        with_image = WanImageToVideoPipeline(**parts, expand_timesteps=True)
        with_image.set_progress_bar_config(disable=True)
        values["frames_from_image"] = run_pipeline(with_image, *prompts, values["noise"], **settings, **options)
        options = {}
    if kind.endswith("a14b"):
        options["guidance_low"] = 2.0
    values["frames"] = run_pipeline(made, *prompts, values["noise"], **settings, **options)
    if kind == "ti2v":  # as it is published; the folder has Euler steps
        made.scheduler = scheduler("t2v")
        values["frames_unipc"] = run_pipeline(made, *prompts, values["noise"], **settings)
    return values


def main():
    for number, kind in enumerate(KINDS):
        torch.manual_seed(number)
        folder = HERE / kind
        shutil.rmtree(folder, ignore_errors=True)
        made = pipeline(kind)
        made.save_pretrained(folder)
        values = expected(kind, made)
        np.savez_compressed(folder / "expected.npz", **values)


if __name__ == "__main__":
    main()
