"""Overrides that make the training configs small enough for a test."""

TINY_CODEC = [
    "--config.optimizer.name=adamw",  # it compiles faster
    "--config.size=32",
    "--config.crop=16",
    "--config.batch=2",
    "--config.frames=5",
    "--config.clip_frames=9",
    "--config.codec.width=4",
    "--config.codec.decoder_width=4",
    "--config.codec.latent_channels=4",
    "--config.codec.multipliers=(1,1,1)",
    "--config.codec.patch=2",
    "--config.log_every=2",
    "--config.preview_every=0",
    "--config.checkpoint_every=2",
]
TINY_DIT = [
    "--config.flow.seen_share=0",  # what it takes from the decoder is a test of its own,
    "--config.flow.mistaken_share=0",  # and so are mistakes
    "--config.optimizer.name=adamw",
    "--config.size=32",
    "--config.frames=9",
    "--config.batch=2",
    "--config.data.clips=16",
    "--config.data.shard=8",
    "--config.data.captions=2",
    "--config.text.width=8",
    "--config.text.heads=2",
    "--config.text.head_width=4",
    "--config.text.feed_forward=16",
    "--config.text.layers=1",
    "--config.dit.heads=2",
    "--config.dit.head_width=12",
    "--config.dit.feed_forward=16",
    "--config.dit.layers=2",
    "--config.align.layer=1",
    "--config.sampling.steps=2",
    "--config.log_every=2",
    "--config.preview_every=0",
    "--config.checkpoint_every=2",
]
