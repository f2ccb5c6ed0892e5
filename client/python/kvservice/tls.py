"""TLS to a server on another host."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc


@dataclass(frozen=True)
class TlsFiles:
    """PEM files: authorities that sign the server's certificate, the client's own, and its key.

    They are read when the connection is opened. `server_name` is the name that the server's
    certificate must have instead of the endpoint's host.
    """

    ca: str
    certificate: str
    key: str
    server_name: str | None = None


def open_channel(
    endpoint: str, tls: TlsFiles | None, options: list[tuple[str, Any]]
) -> grpc.Channel:
    """A channel; OSError for a file that cannot be read."""
    if tls is None:
        return grpc.insecure_channel(endpoint, options=options)
    if endpoint.startswith("unix:"):
        raise ValueError("tls is for host:port: Unix sockets have none")
    credentials = grpc.ssl_channel_credentials(
        root_certificates=Path(tls.ca).read_bytes(),
        private_key=Path(tls.key).read_bytes(),
        certificate_chain=Path(tls.certificate).read_bytes(),
    )
    if tls.server_name is not None:
        options = [*options, ("grpc.ssl_target_name_override", tls.server_name)]
    return grpc.secure_channel(endpoint, credentials, options=options)
