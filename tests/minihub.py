"""A Hugging Face Hub on loopback for tests: the part of its HTTP API that the real clients call.

    python tests/minihub.py --root FOLDER        # prints its URL; then HF_ENDPOINT=URL HF_TOKEN=anything

Models, datasets, spaces and kernels; commits, branches, tags, pull requests, private repositories, LFS uploads,
range reads. Written for huggingface_hub 2.4, transformers 5.23, datasets 5.2 and kernels 0.17. Set
`HF_HUB_DISABLE_XET=1`: there is no Xet. Files lie in FOLDER/blobs by their SHA-256, all else in FOLDER/state.json,
so a server can be stopped and started again.
"""

import argparse
import sys
import threading
from http.server import ThreadingHTTPServer
from pathlib import Path

from minihub_routes import Handler
from minihub_store import Store


def serve(root: str | Path, port: int = 0, token: str | None = None) -> ThreadingHTTPServer:
    """Start a server on 127.0.0.1 in a thread and return it; `shutdown()`, then `server_close()` stop it.

    `server.store` is what it keeps; `server.store.faults` are called with each request before it is answered.
    """
    store = Store(root, token=token)
    server = ThreadingHTTPServer(("127.0.0.1", port), type("StoreHandler", (Handler,), {"store": store}))
    server.store = store
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--root", required=True, help="folder to keep everything in")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--token", help="the only token accepted; default: any")
    options = parser.parse_args()
    server = serve(options.root, options.port, options.token)
    print(f"http://127.0.0.1:{server.server_port}", flush=True)
    # ends with the test that started it: its end of the pipe closes
    sys.stdin.read()
    return 0


if __name__ == "__main__":
    sys.exit(main())
