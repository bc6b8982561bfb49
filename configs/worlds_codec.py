"""The codec of the bundled model, trained on the procedural worlds.

    sora-jax train --config configs/worlds_codec.py --workdir runs/codec

The bundled codec was trained on two CPU cores in two parts, windows of 9 frames first:

    sora-jax train --config configs/worlds_codec.py --workdir runs/codec --config.frames=9 --config.batch=4

stopped with SIGTERM after 2,370 steps (15 minutes), when windows were rebuilt at 26 dB but frames beyond the ninth
badly; then, from the same work directory, windows of the whole 17 frames to the end (13 minutes):

    sora-jax train --config configs/worlds_codec.py --workdir runs/codec --config.frames=17 --config.batch=3

Result: 29.3 dB PSNR on held-out worlds (`held_out_psnr` of the last step); it was still rising.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    return ConfigDict(
        dict(
            task="codec",
            seed=0,
            start_from="",  # a model folder to go on from, in place of fresh parameters
            steps=3700,
            batch=3,
            # Clips are drawn, or read from the TFDS data set in `dir`, whose split `held_out` training does not see.
            data=dict(dir="", held_out="held_out"),
            clip_frames=17,  # clips have this length ...
            size=128,
            frames=17,  # ... of which training sees windows of this length
            crop=64,  # ... and this many rows and columns
            codec=dict(
                latent_channels=32,
                width=24,
                decoder_width=24,
                multipliers=(1, 4, 4),
                downsample_time=(True, True),
                blocks=1,
                patch=4,
                residual=True,
            ),
            freeze_encoder=False,  # train the decoder alone, for latents that a DiT already knows
            loss=dict(absolute=0.1, squared=4.0, kl=2e-4),
            optimizer=dict(
                name="muon",
                learning_rate=3e-3,
                warmup=50,
                decay=0.3,
                b1=0.9,
                b2=0.99,
                weight_decay=0.0,
                clip=1.0,
            ),
            ema_decay=0.995,
            mesh=dict(data=-1, fsdp=1, context=1, tensor=1),
            log_every=50,
            preview_every=500,
            checkpoint_every=500,
        )
    )
