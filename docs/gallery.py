"""Draw the figures in docs/gallery.md and the pages of the systems: `make gallery`, or this script.

Computes the figures that `tts-jax reproduce` knows at `--scale quick`, and an animation, and writes
them to docs/gallery/ at the resolution of the page. Figure 4 is docs/figure4.png, at the paper's
scale: `tts-jax reproduce figure4 --scale paper`.
"""

import argparse
import sys
from pathlib import Path

from PIL import Image

from tts_jax import cli, plot
from tts_jax.experiments import SYSTEMS, animation, system_of


HERE = Path(__file__).parent
ELSEWHERE = {"figure4"}
DPI = 110.0
COLORS = 96


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=Path("results/gallery"))
    parser.add_argument("--out", type=Path, default=HERE / "gallery")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="of these figures only")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    names = [name for one in SYSTEMS.values() for name in one.figures if name not in ELSEWHERE]
    names += [f"animation_{experiment}" for experiment in animation.FIGURES]
    for name in arguments.only or names:
        path = (
            animated(name, arguments) if name.startswith("animation_") else drawn(name, arguments)
        )
        print(f"{path}: {path.stat().st_size / 1024:.0f} KiB")
    return 0


def drawn(name: str, arguments: argparse.Namespace) -> Path:
    """A figure as a PNG in few colours, which flat drawings do not miss."""
    run(["reproduce", name, "--scale", "quick", "--out", str(arguments.data)])
    home = next(home for home in system_of(name).homes() if name in home.FIGURES)
    figure = home.FIGURES[name].draw(home.load_data(arguments.data, name))
    (image,) = plot.Movie(figure, 1, lambda frame: None).images(DPI)
    path = arguments.out / f"{name}.png"
    image.quantize(COLORS, dither=Image.Dither.NONE).save(path, optimize=True)
    return path


def animated(name: str, arguments: argparse.Namespace) -> Path:
    """An animation as a small GIF."""
    small = ["--dpi", "64", "--frames", "40", "--fresh"]
    experiment = name.removeprefix("animation_")
    run(["animate", experiment, *small, "--out", str(arguments.data)])
    path = arguments.out / f"{name}.gif"
    path.write_bytes((arguments.data / f"{name}.gif").read_bytes())
    return path


def run(command: list[str]) -> None:
    code = cli.main(command)
    if code:
        sys.exit(code)


if __name__ == "__main__":
    sys.exit(main())
