"""Certificates that TLS accepts for their names, and keys that only their owner reads."""

from __future__ import annotations

import socket
import ssl
import stat
import threading
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from deployment import certificates


@pytest.fixture
def server(tmp_path: Path) -> tuple[Path, Path, Path]:
    """An authority's certificate, and a server's certificate and key."""
    files = tmp_path / "authority.pem", tmp_path / "certificate.pem", tmp_path / "key.pem"
    authority = certificates.Authority("test authority")
    authority.write(files[0])
    authority.issue(("gateway", "127.0.0.1"), files[1], files[2])
    return files


def handshake(server: tuple[Path, Path, Path], trusted: Path, name: str) -> None:
    """Connect a client that trusts an authority to a server, and verify its name."""
    _, certificate, key = server
    serving = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    serving.load_cert_chain(certificate, key)
    near, far = socket.socketpair()

    def serve() -> None:
        try:
            serving.wrap_socket(far, server_side=True).close()
        except (ssl.SSLError, OSError):
            far.close()

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        ssl.create_default_context(cafile=trusted).wrap_socket(near, server_hostname=name).close()
    finally:
        near.close()
        thread.join()


def mode(file: Path) -> int:
    return stat.S_IMODE(file.stat().st_mode)


@pytest.mark.parametrize("name", ["gateway", "127.0.0.1"])
def test_a_server_is_recognised_by_its_names(server: tuple[Path, Path, Path], name: str) -> None:
    handshake(server, server[0], name)


def test_a_server_is_not_taken_for_another(server: tuple[Path, Path, Path], tmp_path: Path) -> None:
    with pytest.raises(ssl.SSLCertVerificationError, match="mismatch"):
        handshake(server, server[0], "superlink")
    certificates.Authority("test authority").write(tmp_path / "other.pem")
    with pytest.raises(ssl.SSLCertVerificationError, match=r"verify failed"):
        handshake(server, tmp_path / "other.pem", "gateway")


def test_private_files_are_their_owners_and_never_replaced(
    server: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    certificates.write_node_key(tmp_path / "node", tmp_path / "node.pub")
    certificates.write_secret(tmp_path / "secret")
    private = [server[2], tmp_path / "node", tmp_path / "secret"]
    assert [mode(file) for file in private] == [0o600] * 3

    before = (tmp_path / "node").read_bytes()
    with pytest.raises(FileExistsError):
        certificates.write_node_key(tmp_path / "node", tmp_path / "node.pub")
    assert (tmp_path / "node").read_bytes() == before


def test_node_keys_are_pairs_of_the_kind_that_flower_takes(tmp_path: Path) -> None:
    certificates.write_node_key(tmp_path / "a", tmp_path / "a.pub")
    certificates.write_node_key(tmp_path / "b", tmp_path / "b.pub")

    private = serialization.load_ssh_private_key((tmp_path / "a").read_bytes(), None)
    public = [serialization.load_ssh_public_key((tmp_path / f"{n}.pub").read_bytes()) for n in "ab"]

    assert isinstance(private, ec.EllipticCurvePrivateKey)
    assert private.curve.name == "secp384r1"
    assert private.public_key() == public[0] != public[1]


def test_secrets_differ(tmp_path: Path) -> None:
    certificates.write_secret(tmp_path / "a")
    certificates.write_secret(tmp_path / "b")
    assert len((tmp_path / "a").read_bytes()) == 32
    assert (tmp_path / "a").read_bytes() != (tmp_path / "b").read_bytes()
