"""The gallery shows every figure, its images are there, and they are small."""

import re
from pathlib import Path

from tts_jax.experiments import additive, animation, marion_berthier


DOCS = Path(__file__).parent.parent / "docs"
PAGE = (DOCS / "gallery.md").read_text(encoding="utf-8")


def test_every_figure_and_animation_has_its_command_and_image():
    images = set(re.findall(r"!\[[^\]]+\]\(([^)]+)\)", PAGE))
    for name in marion_berthier.FIGURES | additive.FIGURES:
        assert f"`tts-jax reproduce {name}`" in PAGE
        assert any(Path(image).stem == name for image in images), name
    for name in animation.FIGURES:
        assert f"gallery/animation_{name}.gif" in images
    assert all((DOCS / image).is_file() for image in images)


def test_images_are_small():
    sizes = {path.name: path.stat().st_size for path in (DOCS / "gallery").iterdir()}
    assert max(size for name, size in sizes.items() if name.endswith(".png")) < 80_000
    assert max(sizes.values()) < 400_000
    assert sum(sizes.values()) < 700_000
