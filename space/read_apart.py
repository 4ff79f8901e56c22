"""The text of a file as JSON on stdout; run as a process of its own, with limits on time and memory.

python read_apart.py SECONDS PATH NAME
"""

import json
import logging
import resource
import sys

from xcllama.documents import read_file

MAX_MEMORY_BYTES = 2**30

if __name__ == "__main__":
    seconds, path, name = int(sys.argv[1]), sys.argv[2], sys.argv[3]
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY_BYTES, MAX_MEMORY_BYTES))
    logging.disable(logging.CRITICAL)
    try:
        print(json.dumps({"text": read_file(path, name)[0]}))
    except ValueError as error:
        print(json.dumps({"fault": str(error)}))
