"""The client and a server with TLS; certificates are made by the openssl program."""

import subprocess

import grpc
import pytest

from kvservice import Client, KvServiceError, TlsFiles
from kvservice_demo.server import find_program

IDENTITIES = """[{"uri": "spiffe://example.org/worker", "tenant": "a", "roles": ["ROLE_READER"]}]"""


def openssl(folder, *arguments):
    subprocess.run(["openssl", *arguments], cwd=folder, check=True, capture_output=True)


def sign(folder, name, names, purpose):
    """Makes NAME.pem and NAME.key."""
    openssl(folder, "req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes",
            "-keyout", f"{name}.key", "-out", f"{name}.csr", "-subj", f"/CN={name}")
    (folder / "extensions").write_text(f"subjectAltName={names}\nextendedKeyUsage={purpose}\n")
    openssl(folder, "x509", "-req", "-in", f"{name}.csr", "-CA", "ca.pem", "-CAkey", "ca.key",
            "-CAcreateserial", "-out", f"{name}.pem", "-days", "1", "-extfile", "extensions")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("tls")
    openssl(made, "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256",
            "-nodes", "-keyout", "ca.key", "-out", "ca.pem", "-subj", "/CN=ca", "-days", "1")
    sign(made, "server", "DNS:localhost", "serverAuth")
    sign(made, "worker", "URI:spiffe://example.org/worker", "clientAuth")
    (made / "who.json").write_text(IDENTITIES)
    return made


@pytest.fixture(scope="module")
def endpoint(folder):
    command = [find_program(), "--listen=127.0.0.1:0", f"--admin-listen=unix:{folder}/admin",
               f"--tls-cert={folder}/server.pem", f"--tls-key={folder}/server.key",
               f"--tls-client-ca={folder}/ca.pem", f"--identities-file={folder}/who.json",
               "--pool-bytes=16MiB", "--device=cpu"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        lines = iter(server.stdout.readline, "ready\n")
        address = next(line for line in lines if line.startswith("listening on ")).split()[-1]
        yield address
        server.terminate()


def files(folder, **other):
    named = {"ca": "ca.pem", "certificate": "worker.pem", "key": "worker.key"} | other
    return TlsFiles(**{name: str(folder / file) for name, file in named.items()},
                    server_name="localhost")


def test_the_certificate_says_who_this_is(folder, endpoint):
    with Client(endpoint, tls=files(folder)) as client:
        with pytest.raises(KvServiceError) as missing:
            client.get_model("none")
        assert missing.value.reason == "MODEL_NOT_FOUND"
        with pytest.raises(KvServiceError) as refused:
            client.sequence("none")
        assert refused.value.reason == "ROLE_MISSING"


def test_a_certificate_for_servers_or_none_gets_nowhere(folder, endpoint):
    for tls in (files(folder, certificate="server.pem", key="server.key"), None):
        with Client(endpoint, tls=tls, deadline_s=5) as client:
            with pytest.raises(KvServiceError) as error:
                client.get_model("none")
        assert error.value.code == grpc.StatusCode.UNAVAILABLE


def test_wrong_files_are_errors_at_once(folder):
    with pytest.raises(FileNotFoundError):
        Client("127.0.0.1:1", tls=files(folder, key="none"))
    with pytest.raises(ValueError, match="Unix sockets have none"):
        Client(f"unix:{folder}/socket", tls=files(folder))
