"""Reports: one self-contained HTML page and its pictures, of a sweep or of a compress output."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trawl.errors import PlanError
from trawl.observers import Observer, silent
from trawl.report.reading import Study, read_folder
from trawl.shards import sealed

__all__ = ["WrittenReport", "write_report"]

PAGE_NAME = "report.html"
PICTURES_NAME = "report"


@dataclass(frozen=True)
class WrittenReport:
    """Where a report lies.

    Attributes:
        page: the HTML file, which needs no other.
        pictures: the PNG files.
    """

    page: Path
    pictures: tuple[Path, ...]

    def to_json(self) -> dict[str, Any]:
        """Return the paths as JSON-able values."""
        return {"page": str(self.page), "pictures": [str(path) for path in self.pictures]}


def write_report(folder: str | Path, out: str | Path | None = None, *, observer: Observer = silent) -> WrittenReport:
    """Write the report of a sweep or of a compress output.

    Args:
        folder: holds ``results.json`` of a sweep, finished or not, or ``trawl.json`` of a compress output.
        out: the folder to write ``report.html`` and ``report/*.png`` into; ``folder`` by default.
        observer: told of progress, where spectra are measured.
    Returns: the files written; each appears whole, by rename.
    Raises: PlanError: the folder holds neither, what it holds cannot be read, ``out`` is a file, or the extra ``plot``
        is not installed.
    Cost: seconds for the pictures, and for spectra where the source's folder is at hand; no weights are changed.
    """
    source = Path(folder)
    found = read_folder(source)
    try:
        import jinja2  # noqa: F401, PLC0415 (an optional extra, probed where it is needed)
        import matplotlib as mpl  # noqa: F401, PLC0415 (likewise)
    except ImportError as e:
        raise PlanError("a report needs the extra: pip install 'trawl-llm[plot]'") from e
    from trawl.report.output_page import output_page  # noqa: PLC0415 (imports the extra)
    from trawl.report.page import to_html  # noqa: PLC0415 (likewise)
    from trawl.report.sweep_page import sweep_page  # noqa: PLC0415 (likewise)

    target = Path(out) if out is not None else source
    taken = next((path for path in (target, *target.parents) if path.exists()), target)
    if not taken.is_dir():
        raise PlanError(f"cannot write a report into {target}: {taken} is no folder; choose another with -o")
    page = sweep_page(found, observer) if isinstance(found, Study) else output_page(found, observer)
    (target / PICTURES_NAME).mkdir(parents=True, exist_ok=True)
    pictures = []
    for picture in page.pictures:
        pictures.append(target / PICTURES_NAME / f"{picture.name}.png")
        with sealed(pictures[-1]) as file:
            file.write(picture.png)
    with sealed(target / PAGE_NAME) as file:
        file.write(to_html(page).encode())
    return WrittenReport(target / PAGE_NAME, tuple(pictures))
