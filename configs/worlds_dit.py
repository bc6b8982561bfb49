"""The text encoder and DiT of the bundled model, trained on the procedural worlds.

The command:

    sora-jax train --config configs/worlds_dit.py --workdir runs/dit --config.codec=runs/codec

The bundled model was trained with it on two CPU cores, in three parts from one work directory: `--config.steps=100000`,
stopped by SIGTERM after 1,662 steps at the full learning rate (39 minutes, mostly beside other work);
`--config.steps=2080 --config.optimizer.decay=0.2`, which decays it (10 minutes); and
`--config.steps=2640 --config.optimizer.decay=0.25`, which raises it to 85 % and decays it to the end (12 minutes).
Encoding the 8,192 clips took 12 minutes.

Result: loss 0.238 on held-out clips (0.431, 0.322, 0.281 and 0.254 after 500, 1,000, 1,500 and 2,080 steps), still
falling; the README has the evaluation.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    return ConfigDict(
        dict(
            task="dit",
            seed=0,
            start_from="",  # a model folder to go on from, in place of fresh parameters
            steps=20000,
            batch=32,
            frames=17,
            size=128,
            codec="runs/codec",  # a codec run, or a model folder
            # Clips are drawn, or read from the TFDS data set in `dir`, whose split `held_out` training does not see.
            data=dict(dir="", held_out="held_out", seed=1, clips=8192, shard=512, captions=12),
            text=dict(vocabulary_size=259, width=128, heads=4, head_width=32, feed_forward=256, layers=3, length=128),
            dit=dict(heads=4, head_width=64, feed_forward=1024, layers=6, remat="dots"),
            flow=dict(shift=2.0, drop_text=0.1, known_share=0.2),
            align=dict(weight=0.5, layer=3),
            optimizer=dict(
                name="muon",
                learning_rate=2e-3,
                warmup=100,
                decay=0.2,
                b1=0.9,
                b2=0.98,
                weight_decay=0.01,
                clip=1.0,
            ),
            ema_decay=0.999,
            sampling=dict(steps=30, guidance=4.0, shift=3.0, solver="unipc", fps=8.0),
            prompts=(
                "a red ball rolls behind a gray wall",
                "a large blue cube slides to the right",
                "a small white star falls down at night",
                "a gray truck drives past a green pyramid",
                "the camera pans right past a yellow star",
                "a pink ball to the left of a blue cube",
                "a tiny purple ball bounces over the snow",
                "an orange star moves up on a plain gray background",
            ),
            mesh=dict(data=-1, fsdp=1, context=1, tensor=1),
            log_every=50,
            preview_every=1000,
            checkpoint_every=500,
        )
    )
