"""A federation's own certificate authority, a certificate a node, and the cluster's token.

    FOLDER/ca.key, ca.crt, token           stay with whoever runs the federation; ca.key goes nowhere else
    FOLDER/nodes/NAME/{node.key, node.crt, ca.crt, token}      all that a node needs; its key is its own

Ray speaks TLS both ways between all nodes and looks a node's address up in its certificate, so each names the
addresses of its node (and loopback, where Ray's processes meet). Keys are EC P-256, since gRPC takes no Ed25519.
"""

from __future__ import annotations

import datetime
import ipaddress
import secrets
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from raypipe.errors import ConfigError
from raypipe.security.files import read_secret, write_secret

CA_DAYS, NODE_DAYS = 3650, 365
RENEW_DAYS = 30  # a certificate that ends sooner is made anew
AHEAD = datetime.timedelta(hours=1)  # it holds from an hour ago, for nodes whose clock is behind
LOOPBACK = ("127.0.0.1", "127.0.0.2", "localhost")
CA_SUBJECT = "raypipe CA"

Key: TypeAlias = ec.EllipticCurvePrivateKey


@dataclass(frozen=True, slots=True)
class Authority:
    """Who signs."""

    key: Key
    cert: x509.Certificate


@dataclass(frozen=True, slots=True)
class Standing:
    """What a certificate says, and for how many days more."""

    name: str
    addresses: tuple[str, ...]
    days_left: float


def open_authority(folder: Path, now: datetime.datetime) -> Authority:
    """The folder's CA, made first if there is none. Raises ConfigError: it has ended, or its key is open to others."""
    if not (folder / "ca.key").exists():
        _make_authority(folder, now)
    key = _load_key(folder / "ca.key")
    cert = load_cert(folder / "ca.crt")
    if cert.not_valid_after_utc <= now:
        raise ConfigError(f"{folder / 'ca.crt'} ended on {_day(cert)}: move {folder} away and make all anew")
    if key.public_key() != cert.public_key():
        raise ConfigError(f"{folder / 'ca.crt'} is not of {folder / 'ca.key'}: one of them was replaced")
    return Authority(key, cert)


def token_of(folder: Path, *, anew: bool = False) -> bytes:
    """The cluster's token, 64 hex digits; made first if there is none, or `anew`."""
    path = folder / "token"
    if anew or not path.exists():
        write_secret(path, secrets.token_hex(32).encode())
    return read_secret(path, "token").strip()


def make_node(authority: Authority, folder: Path, name: str, addresses: Iterable[str], now: datetime.datetime) -> None:
    """A new key and certificate for a node; the key first, so that a cut leaves no certificate without its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    hosts = [_general(host) for host in dict.fromkeys((*addresses, *LOOPBACK))]
    uses = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH])
    end = min(now + datetime.timedelta(days=NODE_DAYS), authority.cert.not_valid_after_utc)
    built = (
        x509.CertificateBuilder()
        .subject_name(_name(name))
        .issuer_name(authority.cert.subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - AHEAD)
        .not_valid_after(end)
        .add_extension(x509.SubjectAlternativeName(hosts), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(uses, critical=False)
    )
    write_secret(folder / "node.key", _pem(key))
    write_secret(folder / "node.crt", built.sign(authority.key, hashes.SHA256()).public_bytes(Encoding.PEM), 0o644)
    write_secret(folder / "ca.crt", authority.cert.public_bytes(Encoding.PEM), 0o644)


def standing(folder: Path, now: datetime.datetime) -> Standing:
    """Of a node's folder. Raises ConfigError: no certificate, none of this key, a key open to others."""
    cert, key = load_cert(folder / "node.crt"), _load_key(folder / "node.key")
    if key.public_key() != cert.public_key():
        raise ConfigError(f"{folder / 'node.crt'} is not of {folder / 'node.key'}: make both anew")
    names = cert.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    said = [str(one.value) for one in names]
    (name,) = cert.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    left = (cert.not_valid_after_utc - now).total_seconds() / 86400
    return Standing(str(name.value), tuple(said), left)


def still_good(folder: Path, addresses: Sequence[str], authority: Authority, now: datetime.datetime) -> bool:
    """Whether a node's certificate is of this CA, names these addresses and holds for a while."""
    try:
        found = standing(folder, now)
        load_cert(folder / "node.crt").verify_directly_issued_by(authority.cert)
    except (ConfigError, ValueError, TypeError, InvalidSignature, x509.ExtensionNotFound):
        return False
    return found.days_left > RENEW_DAYS and set(addresses) <= set(found.addresses)


def load_cert(path: Path) -> x509.Certificate:
    """Raises ConfigError."""
    try:
        return x509.load_pem_x509_certificate(path.read_bytes())
    except OSError as error:
        raise ConfigError(f"certificate {path} cannot be read: {error.strerror}") from None
    except ValueError:
        raise ConfigError(f"certificate {path} is not one in PEM") from None


def check_cert(path: Path, now: datetime.datetime) -> None:
    """Raises ConfigError when it has ended or does not hold yet, saying what to do."""
    cert = load_cert(path)
    if cert.not_valid_after_utc <= now:
        raise ConfigError(f"certificate {path} ended on {_day(cert)}: raypipe certs make, then raypipe certs send")
    if cert.not_valid_before_utc > now:
        raise ConfigError(f"certificate {path} holds from {cert.not_valid_before_utc:%Y-%m-%d %H:%M} UTC: the clock?")


def _make_authority(folder: Path, now: datetime.datetime) -> None:
    key, name = ec.generate_private_key(ec.SECP256R1()), _name(CA_SUBJECT)
    usage = x509.KeyUsage(
        digital_signature=True,
        key_cert_sign=True,
        crl_sign=True,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )
    built = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - AHEAD)
        .not_valid_after(now + datetime.timedelta(days=CA_DAYS))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    folder.chmod(0o700)
    write_secret(folder / "ca.crt", built.sign(key, hashes.SHA256()).public_bytes(Encoding.PEM), 0o644)
    write_secret(folder / "ca.key", _pem(key))


def _load_key(path: Path) -> Key:
    data = read_secret(path, "key file")
    try:
        key = load_pem_private_key(data, password=None)
    except (ValueError, TypeError):
        raise ConfigError(f"key file {path} is not an unencrypted private key in PEM") from None
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise ConfigError(f"key file {path} holds a key of another kind; raypipe certs makes EC P-256 keys")
    return key


def _pem(key: Key) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def fingerprint(cert: x509.Certificate) -> str:
    """16 hex digits of sha256 of its public key: for people to compare."""
    digest = hashes.Hash(hashes.SHA256())
    digest.update(cert.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo))
    return digest.finalize().hex()[:16]


def _name(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


def _general(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _day(cert: x509.Certificate) -> str:
    return f"{cert.not_valid_after_utc:%Y-%m-%d}"
