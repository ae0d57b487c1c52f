"""The ``trawl`` command line: parsing and printing only.

Nothing heavy is imported until a command runs, so that ``trawl --help`` answers at once.
"""

from __future__ import annotations

import sys
import traceback

import rich_click as click

from .compress import compress
from .densify import densify
from .diff import diff
from .eval import evaluate
from .inspect import inspect
from .plan import plan
from .report import report
from .sweep import sweep

__all__ = ["main", "trawl"]


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="trawl-llm", prog_name="trawl")
def trawl() -> None:
    """Shrink or denoise trained transformer checkpoints by tensor decomposition, without retraining.

    MODEL is a local folder, a hub id (org/name), or a .gguf file. Example:

        trawl compress meta-llama/Llama-3.1-8B --rank 64 --layers 20-30
    """


KEPT = {
    "compress": "; finished stacks are kept in OUT.partial, go on with --resume",
    "sweep": "; finished trials are kept, the same command goes on",
}

for command in (inspect, plan, compress, densify, diff, evaluate, sweep, report):
    trawl.add_command(command)


def main() -> None:
    """Run the command line; a user's mistake gives one line and exit code 2."""
    debug = "--debug" in sys.argv
    try:
        trawl.main(prog_name="trawl", standalone_mode=False)
    except click.ClickException as e:
        e.show()
        sys.exit(e.exit_code)
    except (click.Abort, KeyboardInterrupt):
        click.echo(f"interrupted{KEPT.get(''.join(sys.argv[1:2]), '')}", err=True)
        sys.exit(130)
    except Exception as e:  # noqa: BLE001 (the end of the line: what is not expected is shown whole)
        if debug or not _is_expected(e):
            traceback.print_exc()
        if _is_expected(e):
            click.echo(f"{type(e).__name__}: {' '.join(str(e).split())}", err=True)
            sys.exit(2)
        sys.exit(1)


def _is_expected(error: Exception) -> bool:
    """Whether an error is the user's to mend: TRAWL's own kinds, and the operating system's."""
    errors = sys.modules.get("trawl.errors")
    return isinstance(error, OSError) or (errors is not None and isinstance(error, errors.TrawlError))
