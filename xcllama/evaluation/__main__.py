"""`python -m xcllama.evaluation`: lm-eval with this project's models and tasks."""

import sys

from xcllama.evaluation.command import main

if __name__ == "__main__":
    sys.exit(main())
