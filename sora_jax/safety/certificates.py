"""Certificates of signers: issuing some for an installation of its own, and checking those of others."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from datetime import UTC, datetime
from typing import Any

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from sora_jax.errors import InputError

# What a C2PA signer's certificate may be for (C2PA 2.2, 14.5.1): e-mail protection, document signing, claim signing.
_USES = {
    ExtendedKeyUsageOID.EMAIL_PROTECTION,
    x509.ObjectIdentifier("1.3.6.1.5.5.7.3.36"),
    x509.ObjectIdentifier("1.3.6.1.4.1.62558.2.1"),
}
# The algorithm of a signature follows from the key (C2PA 2.2, 13.2).
CURVES = {
    "secp256r1": ("es256", hashes.SHA256()),
    "secp384r1": ("es384", hashes.SHA384()),
    "secp521r1": ("es512", hashes.SHA512()),
}
_USAGES = (
    "digital_signature content_commitment key_encipherment data_encipherment key_agreement key_cert_sign crl_sign "
    "encipher_only decipher_only"
).split()


def name(common: str, organization: str) -> x509.Name:
    """A name for a certificate."""
    return x509.Name(
        [
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, organization),
            x509.NameAttribute(NameOID.COMMON_NAME, common),
        ]
    )


def issue(
    subject: x509.Name,
    public: ec.EllipticCurvePublicKey,
    issuer: x509.Name,
    issuer_key: ec.EllipticCurvePrivateKey,
    start: datetime,
    end: datetime,
    authority: bool = False,
    usage: str = "digital_signature",
    uses: Collection[x509.ObjectIdentifier] = (ExtendedKeyUsageOID.EMAIL_PROTECTION,),
) -> x509.Certificate:
    """A certificate signed with ECDSA and SHA-256, from `start` to `end`.

    Args:
        authority: whether it may issue others (but no authorities).
        usage: the one key usage: digital_signature, key_cert_sign, ...
        uses: the extended key usage; none for an authority.
    """
    builder = (
        x509.CertificateBuilder(issuer, subject, public, x509.random_serial_number(), start, end)
        .add_extension(x509.BasicConstraints(authority, 0 if authority else None), critical=True)
        .add_extension(x509.KeyUsage(**{one: one == usage for one in _USAGES}), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key.public_key()), critical=False)
    )
    if uses:
        builder = builder.add_extension(x509.ExtendedKeyUsage(uses), critical=False)
    return builder.sign(issuer_key, hashes.SHA256())


def pem(certificates: Sequence[x509.Certificate]) -> str:
    """Certificates as PEM text, in their order."""
    return b"".join(c.public_bytes(serialization.Encoding.PEM) for c in certificates).decode()


def read_chain(text: bytes, where: str) -> list[x509.Certificate]:
    """The certificates in PEM text; InputError, which names `where`, if there are none."""
    try:
        return x509.load_pem_x509_certificates(text)
    except ValueError:
        raise InputError(
            f"{where} is not a certificate chain in PEM; expected -----BEGIN CERTIFICATE-----, the signer's own first"
        ) from None


def check_chain(chain: Sequence[x509.Certificate], where: str) -> None:
    """Raises InputError unless C2PA readers would take the chain (C2PA 2.2, 14.5: certificate profile)."""
    now = datetime.now(UTC)
    for number, certificate in enumerate(chain, 1):
        if now > certificate.not_valid_after_utc:
            raise InputError(f"certificate {number} in {where} expired on {certificate.not_valid_after_utc:%Y-%m-%d}")
        if now < certificate.not_valid_before_utc:
            start = certificate.not_valid_before_utc
            raise InputError(f"certificate {number} in {where} is valid only from {start:%Y-%m-%d}")
    for number, (subject, issuer) in enumerate(zip(chain, chain[1:], strict=False), 1):
        try:
            subject.verify_directly_issued_by(issuer)
        except (ValueError, TypeError, InvalidSignature, UnsupportedAlgorithm):
            raise InputError(
                f"the chain in {where} is broken: certificate {number} is not issued by certificate {number + 1}"
            ) from None
        constraints = _extension(issuer, x509.BasicConstraints, where)
        if constraints is None or not constraints.ca:
            raise InputError(
                f"the chain in {where} is broken: certificate {number + 1} is not an authority's, and may issue none"
            )
    leaf = chain[0]
    if leaf.issuer == leaf.subject:
        raise InputError(f"the first certificate in {where} is issued by itself; C2PA wants one issued by another")
    constraints = _extension(leaf, x509.BasicConstraints, where)
    if constraints is not None and constraints.ca:
        raise InputError(f"the first certificate in {where} is an authority's; give the signer's own first")
    usage = _extension(leaf, x509.KeyUsage, where)
    if usage is None or not usage.digital_signature:
        raise InputError(f"the first certificate in {where} is not for signing: its key usage lacks digitalSignature")
    uses = set(_extension(leaf, x509.ExtendedKeyUsage, where) or ())
    if not uses & _USES:
        raise InputError(
            f"the first certificate in {where} is not for signing files: its extended key usage must have "
            "emailProtection, documentSigning or C2PA claim signing"
        )
    if _extension(leaf, x509.AuthorityKeyIdentifier, where) is None:
        raise InputError(f"the first certificate in {where} does not name its issuer's key (authority key identifier)")


def _extension(certificate: x509.Certificate, kind: Any, where: str) -> Any:
    try:
        return certificate.extensions.get_extension_for_class(kind).value
    except x509.ExtensionNotFound:
        return None
    except ValueError:
        raise InputError(f"the first certificate in {where} has extensions that cannot be read") from None


def algorithm(public: Any, where: str) -> str:
    """The C2PA algorithm with which a key signs: es256, es384, es512, ps256 or ed25519."""
    if isinstance(public, ec.EllipticCurvePublicKey) and public.curve.name in CURVES:
        return CURVES[public.curve.name][0]
    if isinstance(public, rsa.RSAPublicKey) and public.key_size >= 2048:
        return "ps256"
    if isinstance(public, ed25519.Ed25519PublicKey):
        return "ed25519"
    raise InputError(
        f"the first certificate in {where} has a key that C2PA does not know; it knows ECDSA on P-256, P-384 and "
        "P-521, RSA of 2048 bits and more, and Ed25519"
    )
