"""The pictures of the README and the demo.

python pebble/pictures.py
"""

from __future__ import annotations

from pathlib import Path

from draw import TRAINED_FONTS, Scene, Sign, Thing, paint

FOLDER = Path(__file__).resolve().parent.parent / "docs" / "images"
EDGE_PX = 384
SCENES = {
    "sign": Scene((206, 226, 240), sign=Sign("STOP", "red", "white", TRAINED_FONTS[0], (0.1, 0.28, 0.9, 0.7))),
    "shapes": Scene(
        (255, 255, 255),
        (
            Thing("circle", "blue", 0.27, 0.3, 0.17),
            Thing("circle", "blue", 0.7, 0.34, 0.17),
            Thing("circle", "blue", 0.45, 0.74, 0.17),
        ),
    ),
    "star": Scene((236, 224, 204), (Thing("star", "purple", 0.5, 0.5, 0.28),)),
}


def main() -> None:
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name, scene in SCENES.items():
        paint(scene, EDGE_PX).save(FOLDER / f"{name}.png", optimize=True)


if __name__ == "__main__":
    main()
