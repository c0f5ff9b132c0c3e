"""Certificates for the servers, keys for the SuperNodes, and the secret of the ServerApp's runner.

Whatever is private is written with mode 600, and never over a file that exists. The authority's own
key is not written at all: a new deployment makes a new authority.
"""

from __future__ import annotations

import datetime
import ipaddress
import os
import secrets
from collections.abc import Sequence
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

DAYS = 90  # that certificates are valid
_CLOCKS_APART = datetime.timedelta(hours=1)
_SECRET_BYTES = 32


class Authority:
    """Signs the certificates of one deployment.

    Parameters
    ----------
    name : str
        Its common name.
    """

    def __init__(self, name: str) -> None:
        self._key = ec.generate_private_key(ec.SECP384R1())
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        usage = x509.KeyUsage(
            digital_signature=False,
            content_commitment=False,
            key_encipherment=False,
            data_encipherment=False,
            key_agreement=False,
            key_cert_sign=True,
            crl_sign=True,
            encipher_only=False,
            decipher_only=False,
        )
        self.certificate = (
            _unsigned(self._name, self._name, self._key.public_key())
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(usage, critical=True)
            .sign(self._key, hashes.SHA256())
        )

    def write(self, file: Path) -> None:
        """Write the certificate by which others recognise what this authority signed (PEM)."""
        file.write_bytes(self.certificate.public_bytes(serialization.Encoding.PEM))

    def issue(self, hosts: Sequence[str], certificate: Path, key: Path) -> None:
        """Make a server's key, and a certificate for its names.

        Parameters
        ----------
        hosts : sequence of str
            Host names and IP addresses that it is reached by; the first is its common name.
        certificate, key : Path
            The files to write (PEM); `key` must not exist.
        """
        private = ec.generate_private_key(ec.SECP384R1())
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, hosts[0])])
        issuer = x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key())
        signed = (
            _unsigned(name, self._name, private.public_key())
            .add_extension(x509.SubjectAlternativeName([*map(_name, hosts)]), critical=False)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
            .add_extension(issuer, critical=False)
            .sign(self._key, hashes.SHA256())
        )
        write_private(key, _pem(private, serialization.PrivateFormat.PKCS8))
        certificate.write_bytes(signed.public_bytes(serialization.Encoding.PEM))


def write_node_key(private: Path, public: Path) -> None:
    """Make the key pair by which a SuperNode is recognised (OpenSSH, NIST P-384)."""
    key = ec.generate_private_key(ec.SECP384R1())
    write_private(private, _pem(key, serialization.PrivateFormat.OpenSSH))
    encoding, form = serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
    public.write_bytes(key.public_key().public_bytes(encoding, form) + b"\n")


def write_secret(file: Path) -> None:
    """Make a secret that two processes share."""
    write_private(file, secrets.token_bytes(_SECRET_BYTES))


def write_private(file: Path, content: bytes) -> None:
    """Write a file that only its owner can read.

    Raises
    ------
    FileExistsError
        Rather than to replace a key.
    """
    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as stream:
        stream.write(content)


def _unsigned(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey
) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _CLOCKS_APART)
        .not_valid_after(now + datetime.timedelta(days=DAYS))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    )


def _name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _pem(key: ec.EllipticCurvePrivateKey, form: serialization.PrivateFormat) -> bytes:
    return key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption())
