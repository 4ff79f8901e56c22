"""Tables from evaluations: python scripts/tabulate_results.py FOLDER... [--markdown FILE] [--results FILE]

Give the --output_path folders of `python -m xcllama.evaluation ... --log_samples`; prints Markdown.
"""

import argparse
import os
import sys
from pathlib import Path

from dataset_builders.provenance import write_result
from xcllama.evaluation.tables import load_runs, markdown, summarize


def main() -> int:
    """Parse the command line and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path, help="output folders of evaluations")
    parser.add_argument("--markdown", type=Path, help="also write the tables to this file")
    parser.add_argument("--results", type=Path, help="also write all figures to this JSON, for cards")
    arguments = parser.parse_args()
    try:
        summary = summarize(load_runs(arguments.folders))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    text = markdown(summary)
    print(text)
    if arguments.markdown:
        partial = arguments.markdown.with_name(f".{arguments.markdown.name}.partial")
        partial.write_text(text + "\n")
        os.replace(partial, arguments.markdown)
    if arguments.results:
        write_result(arguments.results, summary, seed=0)
    return 0


if __name__ == "__main__":
    sys.exit(main())
