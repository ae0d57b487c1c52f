"""Secrets kept out of what is written down: tokens and passwords in command lines and addresses."""

from __future__ import annotations

import os
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

HIDDEN = "***"
TOKEN_VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HUGGINGFACE_HUB_TOKEN")
SHORTEST_TOKEN = 8  # of what a variable holds: shorter ones stand in ordinary words
HUB_TOKEN = re.compile(r"\b(?:hf|api_org)_[A-Za-z0-9]{8,}")
USER_INFO = re.compile(r"(?<=://)[^\s/]+@")
NAMED = r"(?:[\w-]*(?:token|password|passwd|secret|api[_-]?key|access[_-]?key))"  # not tokens, which are counted
PARAMETER = re.compile(rf"({NAMED}=)[^\s&;]+", re.IGNORECASE)
SECRET_OPTION = re.compile(rf"--?{NAMED}", re.IGNORECASE)


def redacted(text: str) -> str:
    """Return a text without hub tokens, passwords in addresses, and values of parameters that name a secret."""
    for name in TOKEN_VARIABLES:
        if len(value := os.environ.get(name, "")) >= SHORTEST_TOKEN:
            text = text.replace(value, HIDDEN)
    text = HUB_TOKEN.sub(HIDDEN, text)
    text = USER_INFO.sub(f"{HIDDEN}@", text)
    return PARAMETER.sub(rf"\g<1>{HIDDEN}", text)


def command_line(arguments: Sequence[str] | None = None) -> str | None:
    """Return the command line as it may be recorded.

    Args:
        arguments: by default those of this process.
    Returns: the command with its secrets replaced; None where this process is no ``trawl`` command.
    """
    if arguments is None:
        if Path(sys.argv[0]).name != "trawl":
            return None
        arguments = sys.argv[1:]
    shown: list[str] = []
    for argument in arguments:
        name, equals, _ = argument.partition("=")
        if shown and SECRET_OPTION.fullmatch(shown[-1]):
            shown.append(HIDDEN)
        elif equals and SECRET_OPTION.fullmatch(name):
            shown.append(f"{name}={HIDDEN}")
        else:
            shown.append(redacted(argument))
    return shlex.join(["trawl", *shown])
