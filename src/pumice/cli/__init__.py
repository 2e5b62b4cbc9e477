"""The command line: parse, call one function, print. Answers go to stdout, everything else to stderr."""

from __future__ import annotations

import functools
import gc
import os
import sys
from collections.abc import Callable
from typing import Annotated, Any

import typer

from pumice.cli import (
    caption,
    classify,
    convert,
    create,
    llava_cli,
    llava_flags,
    look,
    models,
    plan,
    run,
    serve,
    transfer,
    verify,
)
from pumice.cli.terminal import prepare_streams, print_error
from pumice.errors import UserError


def guarded(verb: Callable[..., None]) -> Callable[..., None]:
    """A verb whose errors become exit codes: 2 and two lines for what the user can mend, 130 for Ctrl-C."""

    @functools.wraps(verb)
    def run_guarded(*arguments: Any, **options: Any) -> None:
        try:
            verb(*arguments, **options)
        except UserError as error:
            print_error(error)
            sys.exit(2)
        except KeyboardInterrupt:
            sys.exit(130)
        except BrokenPipeError:
            # The reader has gone; what is left in the buffer has nowhere to go either.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(0)

    return run_guarded


def as_ollama(verb: Callable[..., None]) -> Callable[..., None]:
    """A verb that Ollama has too: its errors begin as Ollama's, and their exit code is 1."""

    @functools.wraps(verb)
    def run_verb(*arguments: Any, **options: Any) -> None:
        try:
            verb(*arguments, **options)
        except UserError as error:
            print_error(error, mark="Error")
            sys.exit(1)

    return guarded(run_verb)


app = typer.Typer(
    name="pumice",
    help="LLaVA 1.5 and 1.6 on your own machine: ask an image a question.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Exit codes: 0 done, 1 a bug of ours or bounds not met, 2 something given was wrong "
    "(what Ollama has too: 1, as there), 130 stopped by you.",
)
app.command("run")(guarded(run.run))
app.command("classify")(guarded(classify.classify))
app.command("caption")(guarded(caption.caption))
app.command("show", cls=look.ShowCommand)(guarded(look.show))
app.command("prompt")(guarded(look.prompt))
app.command("plan")(guarded(plan.plan))
app.command("verify")(guarded(verify.verify))
app.command("convert")(guarded(convert.convert))
app.command("quantize")(guarded(convert.quantize))
app.command("pull")(as_ollama(transfer.pull))
app.command("push")(as_ollama(transfer.push))
app.command("serve")(as_ollama(serve.serve))
app.command("ps")(as_ollama(serve.ps))
app.command("stop")(as_ollama(serve.stop))
app.command("create")(as_ollama(create.create))
app.command("list")(as_ollama(models.list_models))
app.command("ls", hidden=True)(as_ollama(models.list_models))
app.command("rm")(as_ollama(models.remove))
app.command("cp")(as_ollama(models.copy))
app.command(
    "llava-cli",
    help=llava_flags.help_text(),
    options_metavar="-m FILE [FLAGS]",
    add_help_option=False,
    no_args_is_help=True,
    # Not click's grammar: all words go to `llava_flags.read_flags` as they came.
    context_settings={"ignore_unknown_options": True, "allow_extra_args": True, "allow_interspersed_args": False},
)(guarded(llava_cli.llava_cli))


@app.callback(invoke_without_command=True)
def _options(
    version: Annotated[bool, typer.Option("--version", help="Print the version and leave.", is_eager=True)] = False,
) -> None:
    if version:
        # Its import takes longer than all of --help.
        import importlib.metadata

        print(f"pumice {importlib.metadata.version('pumice')}")
        raise typer.Exit


def main() -> None:
    """The entry point."""
    prepare_streams()
    try:
        app()
    finally:
        # The interpreter's last collection would walk all that PyTorch made, for half a second.
        gc.freeze()
