"""Run the Space on this machine with the repository's checkpoint.

python scripts/run_space.py [--model NAME] [--port PORT]
"""

import argparse
import sys
from pathlib import Path

from load_model import load_model

SPACE = Path(__file__).resolve().parent.parent / "space"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder of added weights, model folder or Hub id; default: the checkpoint")
    parser.add_argument("--port", type=int, help="default: the first free one from 7860, or GRADIO_SERVER_PORT")
    arguments = parser.parse_args()
    # a Space runs from its own folder: its files import each other by name
    sys.path.insert(0, str(SPACE))
    from app import make_page
    from page import launch_options

    page = make_page(*load_model(arguments.model))
    page.launch(**launch_options(server_name="127.0.0.1", server_port=arguments.port))
    return 0


if __name__ == "__main__":
    sys.exit(main())
