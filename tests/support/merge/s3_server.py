"""A real S3 server on loopback for tests of remote models, and a record of its requests."""

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": "key",
    "AWS_SECRET_ACCESS_KEY": "secret",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
    "AWS_CONFIG_FILE": "/dev/null",
    "AWS_SHARED_CREDENTIALS_FILE": "/dev/null",
    "NO_PROXY": "127.0.0.1",
}


@dataclass(frozen=True)
class Request:
    method: str
    key: str  # bucket/object
    range: str  # of the request, "" for none
    sent: int  # bytes of the answer's body


class Recorder:
    """WSGI middleware: all requests in the order of their answers."""

    def __init__(self, app: Any) -> None:
        self.app = app
        self.requests: list[Request] = []
        self._lock = threading.Lock()

    def __call__(self, environ: dict[str, Any], start_response: Any) -> list[bytes]:
        body = b"".join(self.app(environ, start_response))
        key = environ["PATH_INFO"].strip("/")
        request = Request(environ["REQUEST_METHOD"], key, environ.get("HTTP_RANGE", ""), len(body))
        with self._lock:
            self.requests.append(request)
        return [body]

    def of(self, method: str, key_holds: str) -> list[Request]:
        return [
            request
            for request in self.requests
            if request.method == method and key_holds in request.key
        ]


@contextmanager
def s3_server() -> Iterator[Recorder]:
    """Runs moto's server; inside, s3fs finds it by the environment and looks nowhere else."""
    import logging

    import s3fs
    from moto.server import ThreadedMotoServer

    s3fs.S3FileSystem.clear_instance_cache()  # those of another server that still runs
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    wsgi: Any = server._server
    recorder = Recorder(wsgi.app)
    wsgi.app = recorder
    try:
        with mock.patch.dict(
            os.environ, {**ENVIRONMENT, "AWS_ENDPOINT_URL": f"http://{host}:{port}"}
        ):
            yield recorder
    finally:
        server.stop()
        s3fs.S3FileSystem.clear_instance_cache()  # those of this server would outlive it


def s3_server_or_skip() -> Iterator[Recorder]:
    """The body of a fixture: a running server; skips its tests where moto or s3fs is absent."""
    pytest.importorskip("moto")
    pytest.importorskip("s3fs")
    with s3_server() as recorder:
        yield recorder


def put_tree(directory: Path, place: Any) -> None:
    """Copies a local directory's files to a RemotePath."""
    for file in directory.iterdir():
        place.store.put_file(str(file), (place / file.name).path)


def get_tree(place: Any, directory: Path) -> Path:
    """Copies a RemotePath's objects into a new local directory."""
    directory.mkdir()
    for name in place.entries(fresh=True):
        (place / name).copy_to(directory / name)
    return directory
