"""python -m pumice.train RECIPE.toml --output DIR

Exit codes: 0 done, 2 something given was wrong, 130 stopped by Ctrl-C, 143 by SIGTERM.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from pumice.errors import UserError
from pumice.train import read_recipe, train


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m pumice.train",
        description="Run one stage of training. Stopped, by Ctrl-C or otherwise, the same command goes on.",
    )
    parser.add_argument("recipe", type=Path, help="a TOML file; recipes/ has some")
    parser.add_argument("--output", type=Path, required=True, help="log, state and the trained model go there")
    chosen = parser.parse_args()
    try:
        print(train(read_recipe(chosen.recipe), output=chosen.output))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:
        print(str(stop) or "stopped", file=sys.stderr)
        return 130
    except SystemExit as stop:
        print(stop, file=sys.stderr)
        return 143
    return 0


if __name__ == "__main__":
    sys.exit(main())
