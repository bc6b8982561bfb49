"""A time-stamp authority (RFC 3161) on this machine: openssl behind an HTTP server."""

import contextlib
import http.server
import itertools
import shutil
import subprocess
import threading
from collections.abc import Container, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from sora_jax.safety import certificates

needs_openssl = pytest.mark.skipif(not shutil.which("openssl"), reason="a time-stamp server needs openssl")
_SETTINGS = """
[tsa]
default_tsa = stamps
[stamps]
serial = {folder}/serial
signer_cert = {folder}/tsa.pem
signer_key = {folder}/key.pem
certs = {folder}/root.pem
signer_digest = sha256
default_policy = 1.2.3.4.1
digests = sha256, sha384, sha512
ess_cert_id_alg = sha256
"""


@contextlib.contextmanager
def time_stamp_server(folder: Path, silent_at: Container[int] = ()) -> Iterator[str]:
    """Its address, while it runs; `root.pem` in the folder is its root certificate.

    Queries are counted from 1 on, in the file `asked`: to those in `silent_at` it gives no stamp.
    """
    number = itertools.count(1)
    root_key, key = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    root, leaf = (certificates.name(part, "tests") for part in ("time root", "time stamps"))
    start = datetime.now(UTC) - timedelta(days=1)
    times = (start, start + timedelta(days=10))
    authority = certificates.issue(
        root, root_key.public_key(), root, root_key, *times, authority=True, usage="key_cert_sign", uses=()
    )
    stamps = (
        x509.CertificateBuilder(root, leaf, key.public_key(), x509.random_serial_number(), *times)
        .add_extension(x509.BasicConstraints(False, None), critical=True)
        .add_extension(x509.KeyUsage(True, *[False] * 8), critical=True)
        .add_extension(x509.ExtendedKeyUsage([x509.ExtendedKeyUsageOID.TIME_STAMPING]), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(root_key.public_key()), critical=False)
        .sign(root_key, hashes.SHA256())
    )
    (folder / "root.pem").write_text(certificates.pem([authority]))
    (folder / "tsa.pem").write_text(certificates.pem([stamps]))
    (folder / "key.pem").write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    (folder / "serial").write_text("01")
    (folder / "settings.cnf").write_text(_SETTINGS.format(folder=folder))

    class Stamps(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            query = folder / "query.tsq"
            query.write_bytes(self.rfile.read(int(self.headers["Content-Length"])))
            asked = next(number)
            (folder / "asked").write_text(str(asked))
            if asked in silent_at:
                return self.send_error(503)
            command = ["openssl", "ts", "-reply", "-config", folder / "settings.cnf", "-queryfile", query]
            answer = subprocess.run(command, capture_output=True, check=True).stdout
            self.send_response(200)
            self.send_header("Content-Type", "application/timestamp-reply")
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *_) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Stamps) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
