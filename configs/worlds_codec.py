"""The codec of the bundled model, trained on the procedural worlds.

    sora-jax train --config configs/worlds_codec.py --workdir runs/codec

takes 5,000 steps, an hour and forty minutes on two CPU cores that do nothing else (1.2 s each). The bundled codec saw
more, in nine parts, the first seven of clips of 17 frames (`--config.clip_frames=17`, and windows as they say, or
`--config.frames=17`):

1. windows of 9 frames (`--config.frames=9 --config.batch=4`), stopped by SIGTERM after 2,370 steps (15 minutes), and
2. in the same work directory, windows of the whole 17 frames to step 3,700 (13 minutes): 29.3 dB. Both with
   `--config.loss.absolute=1` and windows from anywhere in the frame;
3. from the model folder this gave, as the configuration now stands, with half of the windows around an object:
   `--config.start_from=MODEL --config.steps=5000 --config.optimizer.decay=0.58` (52 minutes, beside other work);
4. once the DiT was trained, the decoder alone, 900 steps (10 minutes, beside other work), from the run's own codec:
   `--config.start_from=runs/dit/codec --config.freeze_encoder=True --config.optimizer.learning_rate=0.002
   --config.optimizer.decay=0.85`; `sora-jax export --workdir runs/dit --codec RUN OUT` takes it into the model folder;
5. encoder and decoder again, from the model folder this gave, with stars drawn twice as often as other shapes and most
   windows around an object: `--config.start_from=MODEL --config.on_object=0.8 --config.steps=2200
   --config.optimizer.decay=0.6 --config.optimizer.learning_rate=0.002 --config.seed=5` (28 minutes, beside other work);
6. the same on worlds with stars more pointed and small objects less small than before, and with much of the loss on
   outlines: `--config.start_from=MODEL --config.on_object=0.8 --config.loss.outlines=0.5 --config.steps=2600
   --config.optimizer.decay=0.5 --config.optimizer.learning_rate=0.002 --config.seed=8` (47 minutes, beside other work);
7. the decoder alone, on the worlds as they are now, whose nights are lighter and have fewer and softer stars, once the
   DiT was trained on them: `--config.start_from=runs/dit/codec --config.freeze_encoder=True
   --config.optimizer.learning_rate=0.002 --config.optimizer.decay=0.6 --config.loss.outlines=0.3 --config.on_object=0.6
   --config.steps=1700 --config.seed=16` (14 minutes, beside other work), exported as in part 4.
8. the decoder alone, on clips of 33 frames, whole (parts 1 to 7 had 17): `--config.start_from=MODEL
   --config.freeze_encoder=True --config.batch=2 --config.optimizer.learning_rate=0.0015 --config.optimizer.decay=0.6
   --config.loss.outlines=0.3 --config.on_object=0.6 --config.steps=700 --config.seed=33` (13 minutes, beside other
   work). Before it the last ten frames of a clip came back 0.7 dB worse than the first ten, on 16 held-out clips;
   after it they are alike, and a clip has 33.2 dB in place of 32.9.
9. the same again: `--config.loss.outlines=0.15 --config.steps=1000 --config.seed=34` (29 minutes, beside other work).
   Sixteen other held-out clips have 33.35 dB in place of 32.84.

Result: 32.2 dB PSNR on eight held-out clips (`held_out_psnr` of the last step) after part 5, 31.4 dB after part 6, 31.8
dB after part 7, each in the worlds of its time; 32 clips of 33 frames come back at 33.0 dB (`sora-jax evaluate`).
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    return ConfigDict(
        dict(
            task="codec",
            seed=0,
            start_from="",  # a model folder, or the folder `codec` of a DiT run, to go on from
            steps=5000,
            batch=3,
            # Clips are drawn, or read from the TFDS data set in `dir`, whose split `held_out` training does not see.
            data=dict(dir="", held_out="held_out"),
            clip_frames=33,  # clips have this length ...
            size=128,
            dtype="float32",  # of the convolutions; "bfloat16" on TPUs and GPUs
            frames=33,  # ... of which training sees windows of this length
            crop=64,  # ... and this many rows and columns
            on_object=0.5,  # share of the windows around an object, where clips have their truth
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
            freeze_encoder=False,  # train the decoder alone, from `start_from`: the folder `codec` of a DiT run
            loss=dict(absolute=0.1, squared=4.0, outlines=0.0, kl=2e-4),
            optimizer=dict(
                name="muon",
                learning_rate=3e-3,
                warmup=50,
                decay=0.58,
                b1=0.9,
                b2=0.99,
                weight_decay=0.0,
                clip=1.0,
            ),
            ema_decay=0.995,
            mesh=dict(data=-1, fsdp=1, context=1, tensor=1),
            log_every=50,
            preview_every=500,  # 0: none
            checkpoint_every=500,
        )
    )
