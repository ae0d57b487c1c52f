"""The ``trawl`` command line: parsing and printing only.

Nothing heavy is imported until a command runs, so that ``trawl --help`` answers at once.
"""

from __future__ import annotations

import errno
import signal
import sys
import traceback
from types import FrameType

import rich_click as click
from click.exceptions import NoArgsIsHelpError

from .compress import compress
from .densify import densify
from .diff import diff
from .eval import evaluate
from .inspect import inspect
from .plan import plan
from .report import report
from .sample import sample
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
    "compress": "; finished parts are kept, go on with --resume",
    "sweep": "; finished trials are kept, the same command goes on",
}

DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)

for command in (inspect, plan, compress, densify, diff, evaluate, sample, sweep, report):
    trawl.add_command(command)


class Stopped(BaseException):
    """SIGTERM, as a job scheduler sends it; no KeyboardInterrupt, of which click makes another exception."""


def main() -> None:
    """Run the command line; a user's mistake gives one line and exit code 2."""
    debug = "--debug" in sys.argv
    signal.signal(signal.SIGTERM, _stop)
    try:
        trawl.main(prog_name="trawl", standalone_mode=False)
    except NoArgsIsHelpError as e:
        e.show()
        sys.exit(e.exit_code)
    except click.ClickException as e:
        click.echo(_usage_line(e), err=True)
        sys.exit(e.exit_code)
    except Stopped:
        click.echo(f"terminated{_kept()}", err=True)
        sys.exit(128 + signal.SIGTERM)
    except (click.Abort, KeyboardInterrupt):
        click.echo(f"interrupted{_kept()}", err=True)
        sys.exit(128 + signal.SIGINT)
    except Exception as e:  # noqa: BLE001 (the end of the line: what is not expected is shown whole)
        if debug or not _is_expected(e):
            traceback.print_exc()
        if _is_expected(e):
            click.echo(_one_line(e), err=True)
            sys.exit(2)
        sys.exit(1)


def _stop(_signal: int, _frame: FrameType | None) -> None:
    """Turn a signal into an exception, so that files are closed and temporary ones removed."""
    raise Stopped


def _kept() -> str:
    """Say what a command that broke off can go on from."""
    return KEPT.get("".join(sys.argv[1:2]), "")


def _usage_line(error: click.ClickException) -> str:
    """Return a mistake on the command line as one line that says where help is."""
    from .console import printable

    reason = printable(" ".join(error.format_message().split())).rstrip(".")
    command = getattr(getattr(error, "ctx", None), "command_path", None) or "trawl"
    return f"{command}: {reason}; see {command} --help"


def _one_line(error: Exception) -> str:
    """Return an expected error as one line without secrets and without characters that steer a terminal."""
    from trawl.redaction import redacted

    from .console import printable

    kind, reason = type(error).__name__, " ".join(str(error).split())
    if _is_out_of_memory(error):
        kind = "MemoryError"
        reason = (
            f"not enough memory ({reason[:200] or 'no more was given'}); see with trawl plan what it takes{_kept()}"
        )
    elif isinstance(error, OSError) and error.errno in DISK_ERRORS:
        reason += _kept()
    return f"{kind}: {printable(redacted(reason))}"


def _is_expected(error: Exception) -> bool:
    """Whether an error is the user's to mend: TRAWL's own kinds, the operating system's, and a lack of memory."""
    errors = sys.modules.get("trawl.errors")
    own = errors is not None and isinstance(error, errors.TrawlError)
    return own or isinstance(error, OSError) or _is_out_of_memory(error)


def _is_out_of_memory(error: Exception) -> bool:
    """Whether memory ran out, as Python, PyTorch or the kernel says it."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    said = str(error).lower()
    torchs = isinstance(error, RuntimeError) and ("can't allocate memory" in said or "out of memory" in said)
    return isinstance(error, MemoryError) or torchs
