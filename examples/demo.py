"""What `make demo` runs: the bundled model looks at bundled pictures. No network, no other file.

python examples/demo.py
"""

from pathlib import Path

import pumice

PICTURES = Path(__file__).resolve().parent.parent / "docs" / "images"
ASKED = (
    ("sign.png", "What does the sign say?"),
    ("sign.png", "Describe the picture."),
    ("shapes.png", "Describe the picture."),
    ("shapes.png", "How many shapes are there?"),
    ("star.png", "Is it a circle, a square or a star?"),
)

model = pumice.load("pebble")
for name, question in ASKED:
    answer = model.ask(question, PICTURES / name)
    print(
        f"docs/images/{name}: {question}\n  {answer}   ({answer.timings.total_s:.2f} s, {answer.prompt_tokens} tokens)"
    )
