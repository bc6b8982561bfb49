"""Published configs: the JSON files of a Wan folder in the layout of diffusers, as a `ModelConfig`.

Every field is read by its kind, and what this project cannot do is an error that names the file and the field.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sora_jax.codec import CodecConfig
from sora_jax.dit import DiTConfig
from sora_jax.errors import InputError
from sora_jax.json_files import read_json
from sora_jax.model_config import ModelConfig, SamplingConfig
from sora_jax.model_folder import described_by
from sora_jax.text import TextConfig
from sora_jax.vision import MEAN, STD, VisionConfig

_SOLVERS = ("UniPCMultistepScheduler", "FlowMatchEulerDiscreteScheduler")
_CLASSES = {
    "transformer": ("WanTransformer3DModel",),
    "transformer_2": ("WanTransformer3DModel",),
    "vae": ("AutoencoderKLWan",),
    "text_encoder": ("UMT5EncoderModel",),
    "image_encoder": ("CLIPVisionModel", "CLIPVisionModelWithProjection"),
    "scheduler": _SOLVERS,
}
_NEEDED = ("transformer", "vae", "text_encoder")
_READ_ELSEWHERE = {"tokenizer", "image_processor"}
_TEXT_LENGTH = 512  # the pipelines pad and cut prompts to this
_MOST_LAYERS = 1000  # beyond what anybody has, and few enough to be counted up
_OTHER_SCHEDULES = (
    "use_karras_sigmas",
    "use_exponential_sigmas",
    "use_beta_sigmas",
    "use_dynamic_shifting",
    "shift_terminal",
    "invert_sigmas",
    "stochastic_sampling",
    "thresholding",
    "disable_corrector",
    "solver_p",
    "rescale_betas_zero_snr",
)


def pipeline_config(path: Path) -> ModelConfig:
    """The config of the model in the folder `path`, from its JSON files alone."""
    with described_by(path):
        index = read_json(path / "model_index.json")
        _one_of(path / "model_index.json", index, "_class_name", "WanPipeline", "WanImageToVideoPipeline")
        parts = {name for name, value in index.items() if isinstance(value, list) and value[1:] != [None]}
        if unknown := sorted(parts - _CLASSES.keys() - _READ_ELSEWHERE):
            words = "has parts of no published Wan, which would be left out"
            raise InputError(f"{path / 'model_index.json'}: {words}: {', '.join(unknown)}")
        named = {}
        for part, possible in _CLASSES.items():
            library_and_class = index.get(part) or [None, None]
            if not isinstance(library_and_class, list) or len(library_and_class) != 2:
                raise InputError(f"{path / 'model_index.json'}: {part} is {index[part]!r}; it must be a pair of names")
            found = library_and_class[1]
            if found not in (*possible, None):
                words = " or ".join(map(repr, possible))
                raise InputError(f"{path / 'model_index.json'}: {part} is {found!r}; only {words} can be read")
            if found is None and part in _NEEDED:
                raise InputError(f"{path / 'model_index.json'}: there is no {part}")
            named[part] = found
        low = named["transformer_2"] is not None
        if not low and index.get("boundary_ratio") is not None:
            raise InputError(f"{path / 'model_index.json'}: there is a boundary_ratio, and no transformer_2 below it")
        boundary = _positive(path / "model_index.json", index, "boundary_ratio") if low else None
        if low and boundary > 1:
            raise InputError(f"{path / 'model_index.json'}: boundary_ratio is {boundary}; it must be at most 1")
        scheduler = path / "scheduler" / "scheduler_config.json"
        if named["scheduler"] is not None:
            _one_of(scheduler, read_json(scheduler), "_class_name", named["scheduler"])
        dit = dit_config(path / "transformer" / "config.json")
        if low and dit_config(path / "transformer_2" / "config.json") != dit:
            raise InputError(f"{path}: transformer and transformer_2 have different sizes")
        level_per_frame = _optional(path / "model_index.json", index, "expand_timesteps", _flag, False)
        if level_per_frame and (low or dit.condition_channels):
            raise InputError(
                f"{path / 'model_index.json'}: expand_timesteps is for one transformer, told of no picture"
            )
        vision = vision_config(path / "image_encoder" / "config.json") if dit.image_width else None
        if vision is not None:
            _check_processor(path / "image_processor" / "preprocessor_config.json", vision.image_size)
        return ModelConfig(
            text=text_config(path / "text_encoder" / "config.json"),
            codec=codec_config(path / "vae" / "config.json"),
            dit=dit,
            sampling=sampling_config(scheduler, dit, low, level_per_frame),
            boundary=boundary,
            known_frames=level_per_frame,
            vision=vision,
        )


def text_config(path: Path) -> TextConfig:
    """Of a `UMT5EncoderModel`."""
    values = read_json(path)
    _one_of(path, values, "model_type", "umt5")
    _one_of(path, values, "feed_forward_proj", "gated-gelu")
    _one_of(path, values, "layer_norm_epsilon", 1e-6)
    _one_of(path, values, "pad_token_id", 0)
    return TextConfig(
        vocabulary_size=_whole(path, values, "vocab_size"),
        width=_whole(path, values, "d_model"),
        heads=_whole(path, values, "num_heads"),
        head_width=_whole(path, values, "d_kv"),
        feed_forward=_whole(path, values, "d_ff"),
        layers=_layers(path, values, "num_layers"),
        length=_TEXT_LENGTH,
        buckets=_optional(path, values, "relative_attention_num_buckets", _whole, 32),
        max_distance=_optional(path, values, "relative_attention_max_distance", _whole, 128),
        shared_positions=False,
        tokenizer="file",
    )


def codec_config(path: Path) -> CodecConfig:
    """Of an `AutoencoderKLWan`."""
    values = read_json(path)
    _one_of(path, values, "_class_name", "AutoencoderKLWan")
    if values.get("attn_scales"):
        raise InputError(f"{path}: attn_scales is {values['attn_scales']}; no published codec has any, nor has ours")
    patch = _optional(path, values, "patch_size", _whole, 1)
    _one_of(path, {"in_channels": 3, **values}, "in_channels", 3 * patch**2)
    width, channels = _whole(path, values, "base_dim"), _whole(path, values, "z_dim")
    with described_by(path):
        return CodecConfig(
            latent_channels=channels,
            width=width,
            decoder_width=_optional(path, values, "decoder_base_dim", _whole, width),
            multipliers=_each(path, values, "dim_mult", _whole),
            downsample_time=_each(path, values, "temperal_downsample", _flag),
            blocks=_layers(path, values, "num_res_blocks"),
            patch=patch,
            residual=_optional(path, values, "is_residual", _flag, False),
            latents_mean=_each(path, values, "latents_mean", _number, channels),
            latents_std=_each(path, values, "latents_std", _positive, channels),
        )


def dit_config(path: Path) -> DiTConfig:
    """Of a `WanTransformer3DModel`."""
    values = read_json(path)
    _one_of(path, values, "_class_name", "WanTransformer3DModel")
    _one_of(path, values, "qk_norm", "rms_norm_across_heads")
    _one_of(path, values, "cross_attn_norm", True)
    all_channels = _whole(path, values, "in_channels")
    channels = _optional(path, values, "out_channels", _whole, all_channels)
    image_width = _optional(path, values, "image_dim", _whole, 0)
    if image_width:
        heads, head_width = _whole(path, values, "num_attention_heads"), _whole(path, values, "attention_head_dim")
        _one_of(path, values, "added_kv_proj_dim", heads * head_width)
    with described_by(path):
        return DiTConfig(
            latent_channels=channels,
            condition_channels=all_channels - channels,
            image_width=image_width,
            image_positions=_optional(path, values, "pos_embed_seq_len", _whole, 0),
            heads=_whole(path, values, "num_attention_heads"),
            head_width=_whole(path, values, "attention_head_dim"),
            feed_forward=_whole(path, values, "ffn_dim"),
            layers=_layers(path, values, "num_layers"),
            text_width=_whole(path, values, "text_dim"),
            patch=_each(path, values, "patch_size", _whole, 3),
            frequency_width=_whole(path, values, "freq_dim"),
            epsilon=_positive(path, values, "eps"),
        )


def vision_config(path: Path) -> VisionConfig:
    """Of a `CLIPVisionModel`, without its last block."""
    values = read_json(path)
    _one_of(path, values, "model_type", "clip_vision_model")
    with described_by(path):
        return VisionConfig(
            width=_whole(path, values, "hidden_size"),
            heads=_whole(path, values, "num_attention_heads"),
            feed_forward=_whole(path, values, "intermediate_size"),
            layers=_layers(path, values, "num_hidden_layers") - 1,
            image_size=_whole(path, values, "image_size"),
            patch=_whole(path, values, "patch_size"),
            activation=field(path, values, "hidden_act"),
            epsilon=_optional(path, values, "layer_norm_eps", _positive, 1e-5),
        )


def _check_processor(path: Path, size: int) -> None:
    """Raises InputError if the file is there and asks for other pictures than `vision.preprocess` makes."""
    values = read_json(path) if path.is_file() else {}
    for name, possible in {
        "size": ({"shortest_edge": size}, size),
        "crop_size": ({"height": size, "width": size}, size),
        "resample": (3,),  # bicubic
        "rescale_factor": (1 / 255,),
        "image_mean": (list(MEAN),),
        "image_std": (list(STD),),
        **dict.fromkeys(("do_resize", "do_center_crop", "do_rescale", "do_normalize"), (True,)),
    }.items():
        if values.get(name) is not None:
            _one_of(path, values, name, *possible)


def sampling_config(path: Path, dit: DiTConfig, two_transformers: bool, level_per_frame: bool) -> SamplingConfig:
    """The solver and shift of the folder; steps, size and guidance as the models' authors recommend them."""
    values = read_json(path)
    kind = _one_of(path, values, "_class_name", *_SOLVERS)
    _one_of(path, values, "num_train_timesteps", 1000)
    for name in _OTHER_SCHEDULES:
        if values.get(name):
            raise InputError(f"{path}: {name} is {values[name]!r}, which is not supported")
    if kind == "UniPCMultistepScheduler":
        for name, value in {
            "prediction_type": "flow_prediction",
            "use_flow_sigmas": True,
            "solver_order": 2,
            "solver_type": "bh2",
            "predict_x0": True,
            "lower_order_final": True,
            "final_sigmas_type": "zero",
        }.items():
            _one_of(path, values, name, value)
        solver, schedule, shift = "unipc", "wan-unipc", _positive(path, values, "flow_shift")
    else:
        solver, schedule, shift = "euler", "wan-euler", _positive(path, values, "shift")
    # As the model cards of Wan 2.1 and 2.2 have it.
    usual = {"steps": 50, "guidance": 5.0, "frames": 81, "size": (480, 832), "fps": 16.0}
    if level_per_frame:
        usual |= {"frames": 121, "size": (704, 1280), "fps": 24.0}
    elif two_transformers:
        usual |= {"steps": 40, "guidance": 4.0, "guidance_low": 3.0, "size": (720, 1280)}
    if dit.image_positions:  # first to last frame is published for this size alone
        usual |= {"size": (720, 1280), "guidance": 5.5}
    elif dit.condition_channels:
        usual |= {"steps": 40}
        usual |= {"guidance": 3.5, "guidance_low": 3.5} if two_transformers else {}
    return SamplingConfig(solver=solver, schedule=schedule, shift=float(shift), **usual)


def field(path: Path, values: dict, name: str) -> Any:
    if values.get(name) is None:
        raise InputError(f"{path}: the field {name} is missing")
    return values[name]


def _number(path: Path, values: dict, name: str) -> float:
    value = field(path, values, name)
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or abs(value) > 1e30 or not math.isfinite(value):
        raise InputError(f"{path}: {name} is {value!r}; it must be a number")
    return value


def _positive(path: Path, values: dict, name: str) -> float:
    value = _number(path, values, name)
    if value <= 0:
        raise InputError(f"{path}: {name} is {value}; it must be above 0")
    return value


def _whole(path: Path, values: dict, name: str) -> int:
    value = _positive(path, values, name)
    if not isinstance(value, int):
        raise InputError(f"{path}: {name} is {value}; it must be a whole number")
    return value


def _layers(path: Path, values: dict, name: str) -> int:
    value = _whole(path, values, name)
    if value > _MOST_LAYERS:
        raise InputError(f"{path}: {name} is {value}; it must be at most {_MOST_LAYERS}")
    return value


def _flag(path: Path, values: dict, name: str) -> bool:
    value = field(path, values, name)
    if not isinstance(value, bool):  # 1 == True
        raise InputError(f"{path}: {name} is {value!r}; it must be true or false")
    return value


def _optional(path: Path, values: dict, name: str, get: Callable, default: Any) -> Any:
    """A field that `get` reads, and that may be missing or null."""
    return default if values.get(name) is None else get(path, values, name)


def _each(path: Path, values: dict, name: str, get: Callable, length: int | None = None) -> tuple:
    """A field that is a list, of `length` if that is given, whose entries `get` reads."""
    found = field(path, values, name)
    if not isinstance(found, list) or not found or length not in (None, len(found)):
        raise InputError(f"{path}: {name} is {found!r}; it must be a list of {length or 'some'} values")
    return tuple(get(path, {f"{name}[{i}]": value}, f"{name}[{i}]") for i, value in enumerate(found))


def _one_of(path: Path, values: dict, name: str, *possible: Any) -> Any:
    value = field(path, values, name)
    if value not in possible:
        raise InputError(f"{path}: {name} is {value!r}; only {' or '.join(map(repr, possible))} can be read")
    return value
