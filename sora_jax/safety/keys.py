"""Who signs: the key that an installation makes for itself, or certificates and keys of the user's own.

The key of the installation proves that a file is as this installation wrote it. It proves nothing about who that is:
its certificate is issued by nobody but itself.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import stat
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa, utils
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from sora_jax.errors import InputError, one_line
from sora_jax.safety import certificates

_PSS = padding.PSS(padding.MGF1(hashes.SHA256()), hashes.SHA256.digest_size)
_YEARS = 10
_ORGANIZATION = "sora_jax, local key (identity not verified)"


@dataclass(frozen=True)
class Signer:
    """A certificate chain and what signs for it. The private key is only within `sign`.

    Attributes:
        chain: certificates in PEM, the signer's own first, each issued by the next.
        algorithm: es256, es384, es512, ps256 or ed25519.
        sign: the signature of bytes; for es* the two numbers r and s in equal lengths (IEEE P1363).
        timestamp_url: address of an RFC 3161 time-stamp server, or None.
    """

    chain: str = field(repr=False)
    algorithm: str
    sign: Callable[[bytes], bytes] = field(repr=False)
    timestamp_url: str | None = None

    @property
    def anchor(self) -> str:
        """The root that the chain leads to, PEM; "" if the chain does not hold it."""
        last = x509.load_pem_x509_certificates(self.chain.encode())[-1]
        return certificates.pem([last]) if last.issuer == last.subject else ""


def load_signer(
    cert: str | os.PathLike | None = None,
    key: str | os.PathLike | None = None,
    timestamp_url: str | None = None,
    callback: Callable[[bytes], bytes] | None = None,
) -> Signer:
    """The signer of files: of the user's own certificates, or else the installation's, made on first use (it warns).

    Everything that can be wrong with them is found here, before anything is generated: a callback signs a few bytes,
    and the certificate must confirm the signature.

    Args:
        cert: PEM file with the certificate chain, the signer's own certificate first.
        key: PEM file with the private key, not encrypted.
        timestamp_url: address of an RFC 3161 time-stamp server.
        callback: signs in place of `key`, for keys that cannot be read (PKCS#11, a cloud's key service): takes the
            bytes to sign, not their hash, and returns the signature, for ECDSA as r and s or as DER.

    Raises:
        InputError: for files that cannot be read, a key that does not fit the certificate, a broken or expired chain,
            a certificate that is not for signing such files, or an address that is none.
    """
    if timestamp_url is not None and not timestamp_url.startswith(("http://", "https://")):
        raise InputError(f"a time-stamp server has an address such as http://tsa.example.com, not {timestamp_url}")
    if cert is None:
        if key is not None or callback is not None:
            raise InputError("a signing key needs its certificate: give a PEM file with the certificate chain as well")
        path = _local()
        text, where = _read(path), str(path)
        private = _private_key(text, where)
    else:
        if (key is None) == (callback is None):
            raise InputError(f"the certificate {cert} needs its private key: a PEM file or a callback, one of the two")
        text, where = _read(Path(cert)), str(cert)
        private = None if key is None else _private_key(_read(Path(key)), str(key))
    chain = certificates.read_chain(text, where)
    certificates.check_chain(chain, where)
    try:
        public = chain[0].public_key()
    except (ValueError, UnsupportedAlgorithm) as error:
        raise InputError(
            f"{where}: the first certificate is for a key that cannot be read: {one_line(error)}"
        ) from None
    algorithm = certificates.algorithm(public, where)
    if private is not None and private.public_key() != public:
        raise InputError(f"the private key {key or where} does not belong to the first certificate in {where}")
    sign = partial(_sign, public, callback or partial(_sign_with, private))
    if callback is not None:
        _check_callback(sign, public, where)
    return Signer(certificates.pem(chain), algorithm, sign, timestamp_url)


def local_anchor() -> str:
    """The root certificate of the installation's own key in PEM, or "" if it has made none yet."""
    path = _folder() / "signing.pem"
    if not os.path.exists(path):
        return ""
    _check_closed(path)
    return certificates.pem(certificates.read_chain(_read(path), str(path))[-1:])


def watermark_key() -> bytes:
    """The installation's secret for the invisible mark, 32 bytes, whoever signs the files.

    Derived from the installation's signing key (HKDF, RFC 5869), from which that key cannot be computed.
    """
    path = _local()
    private = _private_key(_read(path), str(path))
    if not isinstance(private, ec.EllipticCurvePrivateKey):
        raise InputError(f"the key in {path} is not the one that was made here; move it away: a new one is made")
    number = private.private_numbers().private_value.to_bytes(-(-private.key_size // 8), "big")
    return HKDF(hashes.SHA256(), 32, salt=None, info=b"sora_jax invisible mark 1").derive(number)


def _folder() -> Path:
    """The user's configuration folder for this program (XDG Base Directory Specification)."""
    given = os.environ.get("XDG_CONFIG_HOME", "")
    try:
        return (Path(given) if os.path.isabs(given) else Path.home() / ".config") / "sora_jax"
    except RuntimeError as error:
        raise InputError("there is no home folder for the signing key; set XDG_CONFIG_HOME") from error


def _local() -> Path:
    """The installation's key and chain in one PEM file, which is made if it is not there."""
    path = _folder() / "signing.pem"
    try:
        if not os.path.lexists(path):
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            _create(path, _new_key_and_chain())
            warnings.warn(
                "note: a signing key was made for this installation. What it signs can be checked to be unchanged; it "
                "does not prove who made it",
                stacklevel=3,
            )
    except OSError as error:
        raise InputError(f"cannot make the signing key {path}: {error.strerror}; set XDG_CONFIG_HOME") from error
    _check_closed(path)
    return path


def _check_closed(path: Path) -> None:
    """Raises InputError if others could have read or replaced the key."""
    try:
        modes = {one: one.stat().st_mode for one in (path, path.parent)}
        real = path.resolve().parent.stat().st_mode  # where it is, if that is a link
    except OSError as error:
        raise InputError(f"cannot read the signing key {path}: {error.strerror}; set XDG_CONFIG_HOME") from error
    if not stat.S_ISREG(modes[path]):
        raise InputError(f"the signing key {path} is no file; move away what is there, or set XDG_CONFIG_HOME")
    if modes[path] & 0o077:
        raise InputError(f"the signing key {path} is open to other users; close it with: chmod 600 {path}")
    if (modes[path.parent] | real) & (stat.S_IWGRP | stat.S_IWOTH):
        folder = path.parent if real == modes[path.parent] else path.resolve().parent
        raise InputError(f"other users can replace the signing key in {folder}; close it with: chmod 700 {folder}")


def _create(path: Path, data: bytes) -> None:
    """Writes a file for the owner alone. Whoever comes first wins; nobody ever sees half of it."""
    hidden = path.with_name(f".{secrets.token_hex(8)}.pem")
    try:
        with open(os.open(hidden, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        with contextlib.suppress(FileExistsError):
            os.link(hidden, path)  # unlike a rename, it never replaces the key that another process has made
    finally:
        hidden.unlink(missing_ok=True)


def _new_key_and_chain() -> bytes:
    """A private key, its certificate and their root, PEM. The root's key is forgotten: it issues nothing else."""
    root_key, key = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    root, leaf = (certificates.name(f"sora_jax local {part}", _ORGANIZATION) for part in ("root", "signer"))
    start = datetime.now(UTC) - timedelta(hours=1)  # for clocks that are a little behind
    times = (start, start + timedelta(days=365 * _YEARS))
    chain = [
        certificates.issue(leaf, key.public_key(), root, root_key, *times),
        certificates.issue(
            root, root_key.public_key(), root, root_key, *times, authority=True, usage="key_cert_sign", uses=()
        ),
    ]
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    return private + certificates.pem(chain).encode()


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error


def _no_key(where: str) -> InputError:
    return InputError(f"{where} holds no private key in PEM that can be read; expected -----BEGIN PRIVATE KEY-----")


def _private_key(text: bytes, where: str) -> Any:
    # What the library says of a key it cannot read is left out: an error must never quote a key.
    try:
        return serialization.load_pem_private_key(text, password=None)
    except TypeError:
        raise InputError(f"the private key {where} is encrypted; give it decrypted, or sign with a callback") from None
    except (ValueError, UnsupportedAlgorithm):
        raise _no_key(where) from None


def _sign_with(private: Any, data: bytes) -> bytes:
    if isinstance(private, ec.EllipticCurvePrivateKey):
        return private.sign(data, ec.ECDSA(certificates.CURVES[private.curve.name][1]))
    if isinstance(private, rsa.RSAPrivateKey):
        return private.sign(data, _PSS, hashes.SHA256())
    return private.sign(data)


def _sign(public: Any, sign: Callable[[bytes], bytes], data: bytes) -> bytes:
    """A signature in the form of COSE (RFC 9053): that of ECDSA is r and s, not DER."""
    signature = sign(data)
    if not isinstance(public, ec.EllipticCurvePublicKey):
        return signature
    size = -(-public.key_size // 8)
    if len(signature) == 2 * size:
        return signature
    return b"".join(number.to_bytes(size, "big") for number in utils.decode_dss_signature(signature))


def _check_callback(sign: Callable[[bytes], bytes], public: Any, where: str) -> None:
    data = b"sora_jax: does the callback sign for this certificate?"
    try:
        signature = sign(data)
    except Exception as error:  # the callback is the user's code and can fail in any way
        raise InputError(f"the signing callback fails: {type(error).__name__}: {one_line(error)}") from error
    try:
        if isinstance(public, ec.EllipticCurvePublicKey):
            half = len(signature) // 2
            der = utils.encode_dss_signature(*(int.from_bytes(n, "big") for n in (signature[:half], signature[half:])))
            public.verify(der, data, ec.ECDSA(certificates.CURVES[public.curve.name][1]))
        elif isinstance(public, rsa.RSAPublicKey):
            public.verify(signature, data, _PSS, hashes.SHA256())
        else:
            public.verify(signature, data)
    except (InvalidSignature, TypeError, ValueError):
        raise InputError(f"the callback signs with another key than that of the first certificate in {where}") from None
