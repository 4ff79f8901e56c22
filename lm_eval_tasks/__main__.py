"""`python -m lm_eval_tasks`: lm-eval with this project's models and tasks."""

import sys

from lm_eval_tasks.command import main

if __name__ == "__main__":
    sys.exit(main())
