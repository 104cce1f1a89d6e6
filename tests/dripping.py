"""A server that never ends its answer: a byte every 50 ms, so that no read waits for long."""

import contextlib
import socketserver
import threading
from collections.abc import Iterator


@contextlib.contextmanager
def dripping(said: bytes) -> Iterator[str]:
    """Its address; it begins each answer with `said`."""
    over = threading.Event()

    class Peer(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            self.wfile.write(said)
            while not over.wait(0.05):
                self.wfile.write(b"x")

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Peer) as server:
        server.daemon_threads = True  # they would be waited for
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        over.set()
        server.shutdown()
