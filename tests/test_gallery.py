"""Every figure is shown with its command, its image is there, and it is small."""

import re
from pathlib import Path

from tts_jax.experiments import SYSTEMS, animation


DOCS = Path(__file__).parent.parent / "docs"


def test_every_figure_and_animation_has_its_command_and_image():
    shown = set()
    for name, system in SYSTEMS.items():
        page = "gallery.md" if name == "all" else f"{name}.md"
        text = (DOCS / page).read_text(encoding="utf-8")
        images = set(re.findall(r"!\[[^\]]+\]\(([^)]+)\)", text))
        assert set(system.specs()) == set(system.figures)
        for name in system.figures:
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
    assert sum(sizes.values()) < 1_100_000
