"""Every figure is shown with its command, its image is there, and it is small."""

import re
from pathlib import Path

from tts_jax.experiments import additive, animation, marion_berthier, varpro


DOCS = Path(__file__).parent.parent / "docs"
# the figures of each system, and the page that shows them
PAGES = {
    "gallery.md": marion_berthier.FIGURES | additive.FIGURES,
    "varpro.md": varpro.FIGURES,
}


def test_every_figure_and_animation_has_its_command_and_image():
    shown = set()
    for page, figures in PAGES.items():
        text = (DOCS / page).read_text(encoding="utf-8")
        images = set(re.findall(r"!\[[^\]]+\]\(([^)]+)\)", text))
        for name in figures:
            assert f"`tts-jax reproduce {name}`" in text
            assert any(Path(image).stem == name for image in images), name
        assert all((DOCS / image).is_file() for image in images)
        shown |= images
    for name in animation.FIGURES:
        assert f"gallery/animation_{name}.gif" in shown


def test_images_are_small():
    sizes = {path.name: path.stat().st_size for path in (DOCS / "gallery").iterdir()}
    assert max(size for name, size in sizes.items() if name.endswith(".png")) < 80_000
    assert max(sizes.values()) < 400_000
    assert sum(sizes.values()) < 900_000
