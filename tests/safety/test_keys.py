"""Keys that are made once and never shown, and certificates that are refused before anything is generated."""

import os
import signal
import stat
import subprocess
import sys
import warnings
from datetime import UTC, datetime, timedelta
from pathlib import Path

import files
import pytest
from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding, rsa, utils, x25519
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID

from sora_jax import models
from sora_jax.cli import main
from sora_jax.errors import InputError
from sora_jax.generate import Generator
from sora_jax.safety import certificates, keys
from sora_jax.safety.keys import load_signer, local_anchor, watermark_key
from sora_jax.safety.provenance import Claim, read_manifest, verify_signed

ROOT_KEY, OTHER_KEY, KEY = (ec.generate_private_key(ec.SECP256R1()) for _ in range(3))
ROOT, LEAF = (certificates.name(part, "Example") for part in ("root", "signer"))
NOW = datetime.now(UTC)
CLAIM = Claim("model", "x", "bundled", "00" * 32, {}, "11" * 32, 0)


@pytest.fixture(autouse=True)
def config(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    return tmp_path / "config" / "sora_jax" / "signing.pem"


def chain(public=None, **changes):
    wanted = {"issuer": ROOT, "issuer_key": ROOT_KEY, "start": NOW - timedelta(days=2), "end": NOW + timedelta(days=2)}
    root = certificates.issue(
        **wanted | {"subject": ROOT, "public": ROOT_KEY.public_key(), "authority": True, "usage": "key_cert_sign"}
    )
    return [certificates.issue(**{"subject": LEAF, "public": public or KEY.public_key()} | wanted | changes), root]


def pem(key, password=None):
    return key.private_bytes(
        Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(password) if password else NoEncryption()
    )


def write(folder, certs, key=KEY):
    (folder / "chain.pem").write_text(certificates.pem(certs))
    (folder / "key.pem").write_bytes(pem(key))
    return folder / "chain.pem", folder / "key.pem"


def png(folder):
    import numpy as np

    return files.write(folder / "plain.png", np.zeros((1, 8, 8, 3), np.uint8), 8)


def test_a_key_is_made_on_first_use_and_kept(config):
    assert local_anchor() == ""
    with pytest.warns(UserWarning, match="a signing key was made .* does not prove who made it"):
        first = load_signer()
    made = config.read_bytes()
    assert load_signer().chain == first.chain and config.read_bytes() == made
    assert stat.S_IMODE(config.stat().st_mode) == 0o600 and stat.S_IMODE(config.parent.stat().st_mode) == 0o700
    assert os.listdir(config.parent) == ["signing.pem"]
    assert local_anchor() == first.anchor != ""


def test_whoever_knows_the_key_is_told_nothing(config, tmp_path):
    load_signer()
    with warnings.catch_warnings(action="error"):
        load_signer()
        config.unlink()
        load_signer(*write(tmp_path, chain()))  # of the user's own


def test_the_key_of_an_installation_has_the_profile_of_c2pa(config):
    leaf, root = x509.load_pem_x509_certificates(load_signer().chain.encode())
    get = leaf.extensions.get_extension_for_class
    assert not get(x509.BasicConstraints).value.ca
    assert get(x509.KeyUsage).value.digital_signature and not get(x509.KeyUsage).value.key_cert_sign
    assert list(get(x509.ExtendedKeyUsage).value) == [ExtendedKeyUsageOID.EMAIL_PROTECTION]
    assert get(x509.AuthorityKeyIdentifier)
    leaf.verify_directly_issued_by(root)
    assert b"PRIVATE KEY" in config.read_bytes()
    assert load_pem_private_key(config.read_bytes(), None).public_key() == leaf.public_key() != root.public_key()


def test_the_key_is_nowhere_but_in_its_file(config, tmp_path):
    signer = load_signer()
    files.sign(png(tmp_path), tmp_path / "x.png", CLAIM, signer)
    private = load_pem_private_key(config.read_bytes(), None)
    number = private.private_numbers().private_value
    shown = [repr(signer).encode(), str(signer).encode(), signer.chain.encode(), (tmp_path / "x.png").read_bytes()]
    for text in [*shown, watermark_key()]:
        for secret in (number.to_bytes(32, "big"), f"{number:x}".encode(), str(number).encode(), pem(private)[28:90]):
            assert secret not in text


def test_the_secret_of_the_mark_is_that_of_the_installation(config, tmp_path, monkeypatch):
    secret = watermark_key()
    assert len(secret) == 32 and watermark_key() == secret
    load_signer(*write(tmp_path, chain()))
    assert watermark_key() == secret
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "another"))
    assert watermark_key() != secret


def test_a_key_that_others_can_read_is_refused(config):
    load_signer()
    config.chmod(0o640)
    for use in (load_signer, watermark_key):
        with pytest.raises(InputError, match="open to other users; close it with: chmod 600"):
            use()


def test_what_others_signed_with_a_key_that_they_can_read_is_not_known_here(config):
    load_signer()
    config.chmod(0o644)
    with pytest.raises(InputError, match="open to other users"):
        local_anchor()


def test_a_key_that_others_can_replace_is_refused(config):
    load_signer()
    told = "other users can replace the signing key in {}; close it with: chmod 700"
    for mode in (0o777, 0o770):
        config.parent.chmod(mode)
        for use in (load_signer, watermark_key, local_anchor):
            with pytest.raises(InputError, match=told.format(".*")):
                use()
    config.parent.chmod(0o700)
    elsewhere = config.parent.parent / "open"  # also where it is a link
    elsewhere.mkdir()
    config.rename(elsewhere / "signing.pem")
    config.symlink_to(elsewhere / "signing.pem")
    elsewhere.chmod(0o777)
    with pytest.raises(InputError, match=told.format(elsewhere)):
        load_signer()


def test_another_key_in_the_place_of_the_installations_is_told(config, tmp_path):
    load_signer()
    key = rsa.generate_private_key(65537, 2048)
    config.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    with pytest.raises(InputError, match="is not the one that was made here; move it away"):
        watermark_key()


def test_a_certificate_for_a_key_of_an_unknown_kind_is_told(config, tmp_path, monkeypatch):
    load_signer()

    def unknown(self):
        raise UnsupportedAlgorithm("curve 1.2.156.10197.1.301 is not supported")

    monkeypatch.setattr(certificates, "check_chain", lambda chain, where: None)
    monkeypatch.setattr(certificates, "read_chain", lambda text, where: [type("Leaf", (), {"public_key": unknown})()])
    with pytest.raises(InputError, match="key that cannot be read: .*1.2.156"):
        load_signer()


def test_a_folder_in_place_of_the_key_is_told(config):
    config.mkdir(parents=True)
    with pytest.raises(InputError, match="is no file"):
        load_signer()


def test_an_issuer_that_may_issue_nothing_is_found_here(tmp_path):
    middle = certificates.name("no authority", "Example")
    times = (NOW - timedelta(days=2), NOW + timedelta(days=2))
    issuer = certificates.issue(middle, OTHER_KEY.public_key(), ROOT, ROOT_KEY, *times)
    leaf = certificates.issue(LEAF, KEY.public_key(), middle, OTHER_KEY, *times)
    with pytest.raises(InputError, match="is broken: certificate 2 is not an authority's, and may issue none"):
        load_signer(*write(tmp_path, [leaf, issuer, chain()[1]]))


@pytest.mark.parametrize("content", [b"", b"-----BEGIN PRIVATE KEY-----\nMIGHAgEAMBMGByqGSM49\n", bytes(100)])
def test_a_damaged_key_is_not_replaced(config, content):
    load_signer()
    config.write_bytes(content)
    for use in (load_signer, watermark_key):
        with pytest.raises(InputError, match="no private key in PEM"):
            use()
    assert config.read_bytes() == content


def test_a_folder_that_cannot_be_made_is_named(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "file"))
    with pytest.raises(InputError, match="cannot make the signing key .*XDG_CONFIG_HOME"):
        load_signer()


def run(script):
    environment = {**os.environ, "PYTHONPATH": str(Path(keys.__file__).parents[2])}
    return subprocess.Popen([sys.executable, "-c", script], env=environment, stdout=subprocess.PIPE)


def test_whoever_comes_first_wins(config, tmp_path):
    script = (
        "import os, time; from sora_jax.safety.keys import load_signer; print('ready', flush=True)\n"
        f"while not os.path.exists({str(tmp_path / 'go')!r}): time.sleep(1e-4)\n"
        "print(load_signer().chain.replace('\\n', ''))"
    )
    processes = [run(script) for _ in range(6)]
    assert [process.stdout.readline() for process in processes] == [b"ready\n"] * 6
    (tmp_path / "go").touch()
    chains = {process.communicate(timeout=20)[0] for process in processes}
    assert chains == {load_signer().chain.replace("\n", "").encode() + b"\n"}
    assert os.listdir(config.parent) == ["signing.pem"]


@pytest.mark.parametrize("step", ["os.fsync", "os.link", "os.open"])
def test_killed_while_making_a_key(config, step):
    script = (
        "import os, time; from sora_jax.safety import keys\n"
        f"stop = lambda *a, **k: (print('here', flush=True), time.sleep(60)); {step} = stop; keys.load_signer()"
    )
    process = run(script)
    assert process.stdout.readline() == b"here\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert not config.exists()
    assert load_signer().anchor == local_anchor() and config.exists()


@pytest.mark.parametrize(
    "key, algorithm",
    [
        (KEY, "es256"),
        (ec.generate_private_key(ec.SECP384R1()), "es384"),
        (ec.generate_private_key(ec.SECP521R1()), "es512"),
        (rsa.generate_private_key(65537, 2048), "ps256"),
        (ed25519.Ed25519PrivateKey.generate(), "ed25519"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_keys_of_the_user_sign(tmp_path, key, algorithm):
    signer = load_signer(*write(tmp_path, chain(key.public_key()), key))
    assert signer.algorithm == algorithm
    files.sign(png(tmp_path), tmp_path / "x.png", CLAIM, signer)
    assert verify_signed(tmp_path / "x.png", signer).signer == "signer, Example"


def test_the_command_signs_with_the_key_of_the_user(
    tmp_path, monkeypatch, capsys, tiny_folder, tiny_config, tiny_params
):
    generator = Generator(tiny_config, tiny_params)
    monkeypatch.setattr(models, "load", lambda path, dtype, **lora: generator)
    monkeypatch.setattr(models, "_keep_compiled_programs", lambda: None)
    monkeypatch.chdir(tmp_path)
    certificate, key = (str(file) for file in write(tmp_path, chain()))
    command = ["generate", "a red ball", "--model", str(tiny_folder), "--signing-cert", certificate]
    assert main(command) == 2 and "needs its private key" in capsys.readouterr().err
    assert main([*command, "--signing-key", key]) == main([*command, "--signing-key", key, "--embed-prompt"]) == 0
    without, with_prompt = (
        read_manifest(name, Path(certificate).read_text()) for name in capsys.readouterr().out.split()
    )
    assert without.state == with_prompt.state == "trusted" and without.signer == "signer, Example"
    assert "prompt" not in without.generation and with_prompt.generation["prompt"] == "a red ball"


@pytest.mark.parametrize("plain", [True, False])
def test_a_callback_signs(tmp_path, plain):
    def call(data):
        signature = KEY.sign(data, ec.ECDSA(hashes.SHA256()))
        if not plain:
            return signature
        return b"".join(number.to_bytes(32, "big") for number in utils.decode_dss_signature(signature))

    certificate, _ = write(tmp_path, chain())
    signer = load_signer(certificate, callback=call)
    files.sign(png(tmp_path), tmp_path / "x.png", CLAIM, signer)
    assert verify_signed(tmp_path / "x.png", signer).state == "trusted"


def test_a_chain_without_its_root_signs(tmp_path):
    signer = load_signer(*write(tmp_path, chain()[:1]))
    assert signer.anchor == ""
    files.sign(png(tmp_path), tmp_path / "x.png", CLAIM, signer)
    assert verify_signed(tmp_path / "x.png", signer).state == "valid"


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"end": NOW - timedelta(days=1)}, "certificate 1 in .* expired on "),
        ({"start": NOW + timedelta(days=1)}, "certificate 1 in .* is valid only from "),
        ({"usage": "key_agreement"}, "key usage lacks digitalSignature"),
        ({"uses": (ExtendedKeyUsageOID.SERVER_AUTH,)}, "extended key usage must have emailProtection"),
        ({"uses": ()}, "extended key usage must have emailProtection"),
        ({"authority": True}, "is an authority's"),
        ({"issuer": LEAF, "issuer_key": KEY}, "certificate 1 is not issued by certificate 2"),
        ({"issuer_key": OTHER_KEY}, "certificate 1 is not issued by certificate 2"),
        ({"public": ec.generate_private_key(ec.SECP256K1()).public_key()}, "a key that C2PA does not know"),
        ({"public": OTHER_KEY.public_key()}, "key.pem does not belong to the first certificate in .*chain.pem"),
    ],
)
def test_certificates_that_cannot_sign(tmp_path, changes, message):
    with pytest.raises(InputError, match=message) as caught:
        load_signer(*write(tmp_path, chain(**changes)))
    assert "\n" not in str(caught.value)


def test_a_certificate_issued_by_itself_cannot_sign(tmp_path):
    itself = chain(issuer=LEAF, issuer_key=KEY)[:1]
    with pytest.raises(InputError, match="is issued by itself"):
        load_signer(*write(tmp_path, itself))


def test_files_that_are_no_keys_or_certificates(tmp_path):
    certificate, key = write(tmp_path, chain())
    locked, exchange = tmp_path / "locked.pem", tmp_path / "exchange.pem"
    locked.write_bytes(pem(KEY, b"secret"))
    exchange.write_bytes(pem(x25519.X25519PrivateKey.generate()))
    for arguments, message in [
        ((certificate, None), "needs its private key"),
        ((None, key), "needs its certificate"),
        ((tmp_path / "none.pem", key), "cannot read .*none.pem: No such file"),
        ((certificate, tmp_path), "cannot read .*: Is a directory"),
        ((key, key), "key.pem is not a certificate chain in PEM"),
        ((certificate, certificate), "chain.pem holds no private key in PEM"),
        ((certificate, locked), "locked.pem is encrypted"),
        ((certificate, exchange), "does not belong to the first certificate"),
        ((certificate, key, "ftp://example.com"), "a time-stamp server has an address such as"),
    ]:
        with pytest.raises(InputError, match=message) as caught:
            load_signer(*arguments)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda data: 1 / 0, "the signing callback fails: ZeroDivisionError"),
        (lambda data: None, "the signing callback fails: TypeError"),
        (lambda data: b"short", "the signing callback fails: ValueError"),
        (lambda data: bytes(64), "signs with another key"),
        (lambda data: OTHER_KEY.sign(data, ec.ECDSA(hashes.SHA256())), "signs with another key"),
    ],
)
def test_callbacks_that_cannot_sign(tmp_path, call, message):
    certificate, _ = write(tmp_path, chain())
    with pytest.raises(InputError, match=message):
        load_signer(certificate, callback=call)


def test_callbacks_for_rsa_must_use_pss(tmp_path):
    key = rsa.generate_private_key(65537, 2048)
    certificate, _ = write(tmp_path, chain(key.public_key()), key)
    wrong = padding.PKCS1v15()
    with pytest.raises(InputError, match="signs with another key"):
        load_signer(certificate, callback=lambda data: key.sign(data, wrong, hashes.SHA256()))
    right = padding.PSS(padding.MGF1(hashes.SHA256()), 32)
    signer = load_signer(certificate, callback=lambda data: key.sign(data, right, hashes.SHA256()))
    assert signer.algorithm == "ps256"
