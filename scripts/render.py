"""Fill the tables of README.md and docs/, and the cards in checkpoints/, from configs and results/*.json.

    python scripts/render.py [--check]

A table stands between `<!-- table: NAME -->` and `<!-- end -->`; what is not measured yet says so.
"""

import argparse
import re
import sys
from pathlib import Path

from gpu_table import gpu_table
from reliability_tables import RELIABILITY_TABLES
from result_tables import RESULTS, ROOT
from result_tables import TABLES as OTHERS

from xcllama.publishing.model_card import readme

TABLES = OTHERS | RELIABILITY_TABLES | {"gpu": gpu_table}


def render(text: str) -> str:
    """`text` with every table made anew.

    Raises:
        ValueError: a table that is not known.
    """

    def fill(match: re.Match) -> str:
        name = match.group(1)
        if name not in TABLES:
            raise ValueError(f"there is no table {name!r}; known are {', '.join(TABLES)}.")
        return f"<!-- table: {name} -->\n{TABLES[name]()}\n<!-- end -->"

    return re.sub(r"<!-- table: (\w+) -->\n.*?<!-- end -->", fill, text, flags=re.DOTALL)


def rendered() -> dict[Path, str]:
    """Each file that this script writes, as it should be."""
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    cards = {folder / "README.md": readme(folder, RESULTS) for folder in sorted((ROOT / "checkpoints").glob("*/"))}
    return {page: render(page.read_text()) for page in pages} | cards


def is_up_to_date(path: Path, text: str) -> bool:
    """Whether a file is `text`, but for how many commits ago something was measured."""
    count = re.compile(r"\d+ commits ago")
    return path.is_file() and count.sub("", path.read_text()) == count.sub("", text)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="exit 1 if something is out of date; change nothing")
    arguments = parser.parse_args()
    old = {path: text for path, text in rendered().items() if not is_up_to_date(path, text)}
    if arguments.check:
        print(*(f"{path.relative_to(ROOT)} is out of date: python scripts/render.py" for path in old), sep="\n")
        return int(bool(old))
    for path, text in old.items():
        path.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
