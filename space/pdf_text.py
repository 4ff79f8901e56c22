"""A PDF on stdin, its text as JSON on stdout; run as a process of its own, with limits on time and memory.

python pdf_text.py SECONDS
"""

import io
import json
import logging
import resource
import sys

from pypdf import PdfReader
from pypdf.errors import FileNotDecryptedError, PyPdfError

MAX_PAGES = 200
MAX_MEMORY_BYTES = 2**30


def pdf_text(data: bytes) -> dict:
    """`{"text"}`, or `{"fault"}`: "damaged", "encrypted", "pages" (too many) or "scanned" (no text)."""
    try:
        pages = PdfReader(io.BytesIO(data)).pages
        counts = {"pages": len(pages), "limit": MAX_PAGES}
        if len(pages) > MAX_PAGES:
            return counts | {"fault": "pages"}
        text = "\n\n".join(page.extract_text() for page in pages).strip()
    except FileNotDecryptedError:
        return {"fault": "encrypted"}
    # the parser meets every kind of nonsense; these are what it raises for it
    except (PyPdfError, ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError, OSError):
        return {"fault": "damaged"}
    return {"text": text} if text else counts | {"fault": "scanned"}


if __name__ == "__main__":
    seconds = int(sys.argv[1])
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY_BYTES, MAX_MEMORY_BYTES))
    logging.disable(logging.CRITICAL)
    print(json.dumps(pdf_text(sys.stdin.buffer.read())))
