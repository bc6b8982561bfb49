"""What one sees of a run while it trains: a progress bar, metrics.jsonl, and TensorBoard files."""

import contextlib
import dataclasses
import hashlib
import json
import tempfile
from pathlib import Path

from ml_collections import ConfigDict
from tqdm import tqdm

from sora_jax import hosts
from sora_jax.errors import InputError, Refused
from sora_jax.video import Video


class Log:
    """What one sees of a run: metrics.jsonl, TensorBoard and a progress bar, by the first process alone."""

    def __init__(self, config: ConfigDict, workdir: Path, start: int):
        self._first, self._workdir, self._path = hosts.is_first(), workdir, workdir / "metrics.jsonl"
        self._bar = tqdm(
            total=config.steps,
            initial=start,
            unit="step",
            desc=f"train {config.task}",
            smoothing=0.05,
            disable=not self._first,
        )
        if self._first:
            from tensorboardX import SummaryWriter

            # What was logged after the checkpoint is logged again.
            _forget_after(self._path, start)
            self._writer = SummaryWriter(str(workdir / "tensorboard"), purge_step=start + 1)

    def advance(self) -> None:
        self._bar.update()

    def say(self, text: str) -> None:
        if self._first:
            tqdm.write(text)

    def scalars(self, step: int, values: dict[str, float]) -> None:
        if not self._first:
            return
        if self._has_tensorboard():
            for name, value in values.items():
                self._writer.add_scalar(name, value, step)
        with open(self._path, "a") as log:
            log.write(json.dumps({"step": step, **values}) + "\n")
        shown = {k: f"{values[k]:.4g}" for k in ("loss", "clips_per_second") if k in values}
        if shown:
            self._bar.set_postfix(shown, refresh=False)

    def videos(self, step: int, videos: dict[str, Video]) -> None:
        """Videos for TensorBoard, which plays an animated GIF given as an image."""
        if not self._first:
            return
        from tensorboardX.proto.summary_pb2 import Summary

        # In place of a digest of the weights, for which they would have to be gathered.
        run = hashlib.sha256((self._workdir / "config.json").read_bytes()).hexdigest()
        for name, video in videos.items():
            config = {**video.claim.config, "run_sha256": run, "step": step}
            claim = dataclasses.replace(video.claim, model=self._workdir.resolve().name, config=config)
            try:
                with tempfile.TemporaryDirectory() as folder:
                    shown = dataclasses.replace(video, claim=claim)
                    gif = shown.save(Path(folder, "preview.gif")).read_bytes()
            except (Refused, InputError) as error:  # no reason to lose a run
                reason = "the frame scan withholds it" if isinstance(error, Refused) else error
                self.say(f"the preview of step {step} is not shown: {reason}")
                continue
            _, height, width, _ = video.frames.shape
            image = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=gif)
            if not self._has_tensorboard():
                return
            self._writer.file_writer.add_summary(Summary(value=[Summary.Value(tag=name, image=image)]), step)

    def _has_tensorboard(self) -> bool:
        """Whether events still find a file: the thread that writes them ends at the first failure, as on a full disk.

        What is added after that waits for it without end.
        """
        # The thread is not part of tensorboardX's interface.
        worker = getattr(self._writer and self._writer.file_writer.event_writer, "_worker", None)
        if worker is not None and not worker.is_alive():
            self.say("TensorBoard files can no longer be written: is the disk full? metrics.jsonl goes on")
            self._writer = None
        return self._writer is not None

    def close(self) -> None:
        self._bar.close()
        if self._first and self._has_tensorboard():
            self._writer.close()


def _forget_after(path: Path, step: int) -> None:
    """Drops the records of later steps, and a last one that was cut off, from a log of JSON lines."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines():
        with contextlib.suppress(ValueError):
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
    hidden = path.with_name(f".{path.name}")
    hidden.write_text("".join(kept))
    hidden.replace(path)
