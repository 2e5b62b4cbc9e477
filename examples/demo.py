"""What `make demo` runs: the bundled model looks at bundled pictures. No network, no other file.

pebble knows coloured shapes and signs with a short word, and nothing else; pebble/README.md says how often it is right.

python examples/demo.py
"""

from pathlib import Path

import pumice

PICTURES = Path(__file__).resolve().parent.parent / "docs" / "images"
ASKED = (
    ("star.png", "What colour is it?"),
    ("star.png", "Is it a circle, a square or a star?"),
    ("shapes.png", "What shape is it?"),
    ("shapes.png", "Describe the picture."),
    ("sign.png", "What colour is the sign?"),
    ("sign.png", "What does the sign say?"),
)

model = pumice.load("pebble")
for name, question in ASKED:
    answer = model.ask(question, PICTURES / name)
    print(
        f"docs/images/{name}: {question}\n  {answer}   ({answer.timings.total_s:.2f} s, {answer.prompt_tokens} tokens)"
    )
