"""Animations: a figure, what changes in it from frame to frame, and files of them."""

import contextlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from tts_jax._checkpoint import replacing
from tts_jax.plot._style import theme


_COLORS = 64  # of a GIF: few flat colours and their blends into white
_HOLD = 2.0  # seconds for which a GIF shows its last frame


@dataclass(frozen=True)
class Movie:
    """A figure that changes from frame to frame.

    Attributes:
        figure: what is shown.
        frames: number of frames.
        show: changes the figure to frame 0 ≤ k < `frames`.
    """

    figure: Figure
    frames: int
    show: Callable[[int], None]

    def images(self, dpi: float = 100.0) -> Iterator[Image.Image]:
        """Each frame as an RGB image; the layout is that of the first one throughout."""
        canvas = FigureCanvasAgg(self.figure)
        self.figure.set_dpi(dpi)
        with theme():
            for index in range(self.frames):
                self.show(index)
                canvas.draw()
                if index == 0:
                    # panels stay where they are, whatever their labels become
                    self.figure.set_layout_engine("none")
                yield Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3])


def save_gif(
    images: Sequence[Image.Image], path: str | os.PathLike[str], *, fps: float = 12.0
) -> Path:
    """Write frames as a GIF that loops, in one palette of 64 colours; the last frame stays 2 s.

    Args:
        images: RGB images of one size.
        path: the file.
        fps: frames per second, to a hundredth of a second per frame.

    Raises:
        OSError: the file cannot be written; one that was there is as before.
    """
    first, middle, last = images[0], images[len(images) // 2], images[-1]
    sample = Image.new("RGB", (first.width, 3 * first.height))
    for row, image in enumerate((first, middle, last)):
        sample.paste(image, (0, row * first.height))
    found = sample.quantize(_COLORS, dither=Image.Dither.NONE).getpalette() or []
    # what is nearly white becomes white
    colors = np.reshape(found, (-1, 3))
    colors[colors.min(axis=1) >= 248] = 255
    palette = Image.new("P", (1, 1))
    palette.putpalette(colors.ravel().tolist())
    # one palette, undithered: what does not change costs no bytes
    flat = [image.quantize(palette=palette, dither=Image.Dither.NONE) for image in images]
    durations = [round(1000.0 / fps)] * (len(flat) - 1) + [round(1000.0 * _HOLD)]
    with replacing(Path(path)) as temporary:
        flat[0].save(
            temporary,
            format="GIF",
            save_all=True,
            append_images=flat[1:],
            duration=durations,
            loop=0,
            optimize=True,
        )
    return Path(path)


def ffmpeg() -> str | None:
    """The path of ffmpeg, which MP4 needs, or None where there is none."""
    return shutil.which("ffmpeg")


def save_mp4(
    images: Sequence[Image.Image], path: str | os.PathLike[str], *, fps: float = 12.0
) -> Path:
    """Write frames as an MP4, in the codec that ffmpeg takes for it (H.264 where it has one).

    Args:
        images: RGB images of one size.
        path: the file.
        fps: frames per second.

    Raises:
        FileNotFoundError: there is no ffmpeg on the PATH.
        OSError: ffmpeg failed, in its own words; a file that was there is as before.
    """
    program = ffmpeg()
    if program is None:
        raise FileNotFoundError("An MP4 needs `ffmpeg` on the PATH; there is none. Install it.")
    width, height = images[0].size
    source = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}", "-r", f"{fps:g}"]
    # 4:2:0 colour, which every player reads, wants an even width and height
    film = ["-vf", "pad=ceil(iw/2)*2:ceil(ih/2)*2:color=white", "-pix_fmt", "yuv420p"]
    film += ["-movflags", "+faststart", "-f", "mp4"]
    with replacing(Path(path)) as temporary, tempfile.TemporaryFile() as said:
        command = [program, "-y", "-loglevel", "error", *source, "-i", "-", *film, str(temporary)]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stderr=said) as process:
            assert process.stdin is not None
            # a program that fails stops reading; its words are in `said`
            with contextlib.suppress(BrokenPipeError):
                for image in images:
                    process.stdin.write(image.tobytes())
                process.stdin.close()
        if process.returncode != 0:
            said.seek(0)
            words = said.read().decode(errors="replace").strip() or f"code {process.returncode}"
            raise OSError(f"ffmpeg failed: {words}")
    return Path(path)
