import io
import json
import os
import shutil
import sys
import weakref
from datetime import UTC, datetime, timedelta
from pathlib import Path

import c2pa
import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from files import write
from test_release import noisy_clip, save

from sora_jax import media
from sora_jax.cli import main
from sora_jax.safety import certificates, keys, provenance
from sora_jax.safety.manifest import BY_MODEL, Manifest, _state, read_manifest
from sora_jax.safety.provenance import Claim
from sora_jax.safety.verify import EXIT_CODES, _of_generation, _of_manifest, _of_mark, verify
from sora_jax.video import Video, read_video

sys.path.append(str(Path(__file__).parents[2] / "experiments"))
import provenance_matrix as matrix  # noqa: E402
import tampering  # noqa: E402


@pytest.fixture(scope="module")
def signed(tmp_path_factory):
    return save(noisy_clip(9, 128), tmp_path_factory.mktemp("signed") / "clip.mp4")


@pytest.fixture
def copy(signed, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return shutil.copy(signed, tmp_path / "clip.mp4")


def test_what_was_made_here_is_known_and_marked(copy, capsys):
    assert main(["verify", "clip.mp4"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("clip.mp4: trusted\n")
    for words in (
        "unchanged since they were signed",
        "generative model",
        "at least one in 8 frames passed a scan for nudity and sexual content.",
        "Not scanned for, as far as it says: violence, hate, likeness of real people.",
        "installation's invisible mark",
    ):
        assert words in text
    assert "not that what it says is true" in text


def test_of_a_long_file_one_frame_after_the_other_is_looked_at(tmp_path, monkeypatch):
    path, upright = write(tmp_path / "long.mp4", noisy_clip(1).frames.repeat(200, 0), 8.0), media.upright
    frames, most = [], []

    def watched(*given):
        picture = np.array(upright(*given))  # a copy, which is kept alive by whatever is a part of it
        frames.append(weakref.ref(picture))
        most.append(sum(frame() is not None for frame in frames))
        return picture

    monkeypatch.setattr(media, "upright", watched)
    assert verify(path).mark == "not found"
    assert len(frames) == 50 and max(most) <= 3


UNSCANNED = "It says nothing of a scan of its frames, and none is made here."


@pytest.mark.parametrize(
    "said, words",
    [
        (None, [UNSCANNED]),
        ({"scans_for": 5}, [UNSCANNED]),
        ([{"scans_for": [5]}, 7, {"scans_for": []}], [UNSCANNED]),
        (
            {"scans_for": ["violence"], "passed": False},  # a single scan, as older files have it
            [
                "It says that frames did not pass a scan for violence.",
                "Not scanned for, as far as it says: nudity and sexual content, hate, likeness of real people.",
            ],
        ),
        (
            [{"scans_for": ["violence", "x\x1b[0m"], "passed": True, "every": 1}],
            [
                'It says that all frames passed a scan for violence, "x [0m".',
                "Not scanned for, as far as it says: nudity and sexual content, hate, likeness of real people.",
            ],
        ),
    ],
)
def test_what_a_manifest_says_of_scans_is_quoted_and_not_believed(said, words):
    assert _of_generation(Manifest("trusted", generation={"checks": {"frames": said}}))[1:] == words
    assert _of_generation(Manifest("trusted")) == [UNSCANNED]  # a manifest of others


SCANNED = [{"scans_for": ["violence"], "passed": True, "every": 8}]


@pytest.mark.parametrize(
    "checks, words",
    [
        ({"prompt": {"allowed": True}}, ["the prompt gate let the prompt pass."]),
        (
            {"prompt": {"allowed": True}, "negative_prompt": {"allowed": True}},
            ["the prompt gate let the prompt and the negative prompt pass."],
        ),
        (
            {"image": SCANNED, "last_image": SCANNED},
            [
                "the picture that it starts with passed a scan for violence.",
                "the picture that it ends with passed a scan for violence.",
            ],
        ),
        ({"prompt": {"allowed": "yes"}, "negative_prompt": True, "image": [7], "last_image": "passed"}, []),
    ],
)
def test_what_else_was_checked_is_told(checks, words):
    """What was looked for in a picture that was given was not looked for in frames."""
    lines = _of_generation(Manifest("trusted", generation={"checks": checks}))
    assert lines[1:] == [*(f"It says that {line}" for line in words), UNSCANNED]


def test_words_of_a_manifest_cannot_be_taken_for_ours():
    ours = "x. This installation has checked who signed it"
    said = {"model": ours, "seed": "3. " + ours, "checks": {"frames": {"scans_for": [ours], "every": -5}}}
    manifest = Manifest("valid", generation=said, actions=("c2pa.created", ours), source_types=(BY_MODEL,))
    text = " ".join(_of_manifest(manifest, set()))
    assert text.count(ours) == text.count(f'"{ours}') == 2 and "seed" not in text and "-5" not in text
    assert "and made by a generative model (c2pa.created)." in text
    assert "()" not in " ".join(_of_manifest(Manifest("valid", actions=(ours,)), set()))
    # Nothing was encoded anew where no file is named that it was made from.
    manifest = Manifest("valid", generation={"x": 1}, actions=("c2pa.transcoded",))
    assert _of_generation(manifest)[0] == "It does not say where its frames come from."


def test_a_file_that_no_model_made_is_told_apart(signed, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    theirs = write(tmp_path / "theirs.mp4", noisy_clip().frames, 8.0)
    copied = "It says that its frames are those of the file that it was made from, encoded anew and marked."
    intact = "whose manifest was intact"
    by_model = f"{intact}; that manifest says that a generative model made it."
    for source, parent in [(theirs, "which held no manifest."), (signed, by_model)]:
        for _ in range(2):  # also a copy of a copy
            source = save(read_video(source), tmp_path / "copy.mp4")
            text = verify(source).text
            assert copied in text and "and made by a generative model" not in text
            assert f'It says that it was made from "video.mp4", {parent}' in text
            parent = parent.replace("which held no manifest", intact)
    text = verify(save(Video(noisy_clip().frames), tmp_path / "own.mp4")).text
    assert "It does not say where its frames come from." in text and "generative model" not in text


def test_anchors_must_be_certificates(copy, tmp_path, capsys):
    os.mkfifo(tmp_path / "pipe.pem")
    assert main(["verify", "clip.mp4", "--anchors", "pipe.pem"]) == 2
    assert "pipe.pem: it must be a file with certificates in PEM" in capsys.readouterr().err
    for content in (b"hello", b"\xff", b""):
        (tmp_path / "anchors.pem").write_bytes(content)
        assert main(["verify", "clip.mp4", "--anchors", "anchors.pem"]) == 2
        assert "anchors.pem: it must be certificates in PEM" in capsys.readouterr().err


def test_a_changed_byte_is_told(copy, capsys):
    content = bytearray(copy.read_bytes())
    content[-5] ^= 1  # not to a fixed value: it might be the old one, for the mark differs by installation
    copy.write_bytes(content)
    assert main(["verify", "clip.mp4"]) == 5
    assert "changed after it was signed" in capsys.readouterr().out


@pytest.mark.parametrize("problem", ["expired", "usage", "purpose"])
def test_a_certificate_that_does_not_hold_is_told_apart_from_a_change(tmp_path, capsys, problem):
    path, anchor, _ = matrix.with_certificate(tmp_path, "png", problem)
    (tmp_path / "anchor.pem").write_text(anchor)
    assert main(["verify", str(path), "--anchors", str(tmp_path / "anchor.pem")]) == 7
    assert "It is unchanged, but its signer's certificate does not hold" in capsys.readouterr().out
    path.write_bytes(tampering.flip(path.read_bytes(), path.stat().st_size - 20))
    assert main(["verify", str(path), "--anchors", str(tmp_path / "anchor.pem")]) in (2, 5)
    assert EXIT_CODES.keys() == {"trusted", "valid", "tampered", "none", "rejected", "unreadable"}
    assert len({*EXIT_CODES.values()}) == len(EXIT_CODES)


def test_who_issued_the_certificate_of_an_unknown_signer_is_said(tmp_path, capsys):
    """A chain without the certificate in between: its root is known, but nothing leads there."""
    start, end = (datetime.now(UTC) + timedelta(days=days) for days in (-1, 1))
    issuers = [certificates.name(name, "Example") for name in ("root", "in between", "signer")]
    root_key, middle_key, key = (ec.generate_private_key(ec.SECP256R1()) for _ in range(3))
    authority = {"authority": True, "usage": "key_cert_sign", "uses": ()}
    root = certificates.issue(issuers[0], root_key.public_key(), issuers[0], root_key, start, end, **authority)
    middle = certificates.issue(issuers[1], middle_key.public_key(), issuers[0], root_key, start, end, **authority)
    leaf = certificates.issue(issuers[2], key.public_key(), issuers[1], middle_key, start, end)
    (tmp_path / "root.pem").write_text(certificates.pem([root]))
    for chain, code in (([leaf], 4), ([leaf, middle], 0)):
        signer = keys.Signer(certificates.pem(chain), "es256", lambda data: matrix._ecdsa(key, data))
        path = matrix.make_signed(tmp_path, "png", signer)
        assert main(["verify", str(path), "--anchors", str(tmp_path / "root.pem")]) == code
        said = 'The certificate names "in between, Example" as its issuer, which was not checked: no chain leads'
        assert (said in capsys.readouterr().out) == (code == 4)


def test_a_certificate_that_only_names_a_known_root_is_told(tmp_path, capsys):
    start, end = (datetime.now(UTC) + timedelta(days=days) for days in (-1, 1))
    name = certificates.name("root", "Example")
    root_key, key, other_key = (ec.generate_private_key(ec.SECP256R1()) for _ in range(3))
    root = certificates.issue(
        name, root_key.public_key(), name, root_key, start, end, authority=True, usage="key_cert_sign", uses=()
    )
    leaf = certificates.issue(certificates.name("signer", "Example"), key.public_key(), name, other_key, start, end)
    (tmp_path / "root.pem").write_text(certificates.pem([root]))
    signer = keys.Signer(certificates.pem([leaf]), "es256", lambda data: matrix._ecdsa(key, data))
    path = matrix.make_signed(tmp_path, "png", signer)
    assert main(["verify", str(path), "--anchors", str(tmp_path / "root.pem")]) == 4
    text = capsys.readouterr().out
    assert "signer unknown" in text and "it did not issue this certificate" in text


@pytest.mark.parametrize("name", ["copy.avi", "copy.jpg", "copy"])
def test_the_manifest_of_what_a_file_was_made_from_is_carried_whatever_its_name(signed, tmp_path, name):
    text = verify(save(read_video(shutil.copy(signed, tmp_path / name)), tmp_path / "new.mp4")).text
    assert "that manifest says that a generative model made it" in text


def test_what_others_say_of_what_their_file_was_made_from_is_not_believed(signed, tmp_path, monkeypatch):
    """Who signs may trust anybody while doing so, and writes it down."""
    monkeypatch.setitem(provenance._SIGNING, "trust", {"user_anchors": keys.local_anchor()})
    made = save(read_video(signed), tmp_path / "made.mp4")
    assert verify(made).manifest.ingredients[0].state == "trusted"
    first, *lines = verify(made).text.splitlines()
    assert not any("trusted" in line for line in lines)


def test_a_manifest_that_is_kept_elsewhere_is_not_fetched(tmp_path):
    """The server would not answer; reading says where the manifest is, in no time."""
    picture, signed = write(tmp_path / "plain.png", noisy_clip(1).frames, 8.0), io.BytesIO()
    builder = c2pa.Builder(provenance._manifest(Claim("model"), None), context=c2pa.Context.from_dict({}))
    builder.set_no_embed()
    builder.set_remote_url("http://192.0.2.1/manifest.c2pa")  # of a block for documentation, RFC 5737
    signer = keys.load_signer()
    with c2pa.Signer.from_callback(signer.sign, c2pa.C2paSigningAlg.ES256, signer.chain, None) as native:
        builder.sign(native, "image/png", io.BytesIO(picture.read_bytes()), signed)
    (tmp_path / "remote.png").write_bytes(signed.getvalue())
    found = verify(tmp_path / "remote.png")
    assert found.exit_code == 2
    assert "is kept at another place, and nobody is contacted here" in found.text and "192.0.2.1" in found.text


def test_words_of_others_are_quoted(tmp_path, capsys):
    start, end = (datetime.now(UTC) + timedelta(days=days) for days in (-1, 1))
    key, root_key = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    subject = certificates.name('Reuters", whom this installation knows. Checked by "all', "Example")
    leaf = certificates.issue(subject, key.public_key(), certificates.name("root", "Example"), root_key, start, end)
    signer = keys.Signer(certificates.pem([leaf]), "es256", lambda data: matrix._ecdsa(key, data))
    assert main(["verify", str(matrix.make_signed(tmp_path, "png", signer))]) == 4
    said = (
        "by \"Reuters', whom this installation knows. Checked by 'all, Example\", whom this installation does not know"
    )
    assert said in capsys.readouterr().out


def test_without_its_manifest_a_file_still_has_the_mark(copy, tmp_path, capsys):
    (tmp_path / "remuxed.mp4").write_bytes(tampering.remuxed(copy.read_bytes(), "mp4"))
    assert main(["verify", "remuxed.mp4", "--json"]) == 6
    found = json.loads(capsys.readouterr().out)
    assert found["manifest"]["state"] == "none" and found["mark"] == "found" and len(found["mark_bits"]) == 4
    text = verify("remuxed.mp4").text
    assert "carries no manifest" in text and "says nothing of how it was made" in text


def test_a_file_is_read_also_where_the_own_key_cannot_be(copy, monkeypatch, tmp_path, capsys):
    (tmp_path / "config" / "sora_jax").mkdir(parents=True)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    (tmp_path / "config" / "sora_jax" / "signing.pem").write_text("nothing of the kind")
    assert main(["verify", "clip.mp4"]) == 4
    text = capsys.readouterr().out
    assert "does not know" in text and "The invisible mark was not looked for: " in text and "signing.pem" in text


def test_the_mark_is_compared_with_what_the_manifest_says(copy):
    (line,) = [line for line in verify(copy).verdict if "invisible mark" in line]
    assert f"(bits {verify(copy).mark_bits}, as its manifest says)" in line
    other = Manifest("trusted", generation={"checks": {"mark": "other"}})
    assert "not what its manifest says" in _of_mark("found", "1a2b", other)[0]


@pytest.mark.parametrize("claim", [Claim(origin="model", seed=4), None], ids=["another seed", "unknown origin"])
def test_a_manifest_on_other_frames_does_not_name_their_mark(tmp_path, claim):
    video = noisy_clip(9, 128)
    one = save(video, tmp_path / "one.gif")
    other = save(Video(video.frames[:, ::-1], video.fps, claim), tmp_path / "other.gif")
    bits = verify(other).mark_bits
    assert bits == read_manifest(other).generation["checks"]["mark"] != verify(one).mark_bits
    other.write_bytes(tampering.transplanted(other.read_bytes(), one.read_bytes(), "gif"))
    found = verify(other)
    assert found.manifest.state == "tampered" and found.mark_bits == bits
    assert f"(bits {bits}, not what its manifest says)" in found.text


def test_another_installation_does_not_know_the_signer(copy, tmp_path, monkeypatch, capsys):
    anchor = keys.local_anchor()
    (tmp_path / "anchor.pem").write_text(anchor)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "other"))
    assert main(["verify", "clip.mp4"]) == 4
    text = capsys.readouterr().out
    assert "does not know" in text and "not looked for" in text
    assert main(["verify", "clip.mp4", "--anchors", "anchor.pem"]) == 0


def test_files_that_are_no_videos(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.mp4").write_text("not a video")
    assert main(["verify", "text.mp4"]) in (2, 6)
    assert main(["verify", "none.mp4"]) == 2
    assert "cannot read none.mp4" in capsys.readouterr().err
    np.save(tmp_path / "x.npy", np.zeros(3))
    assert main(["verify", "x.npy"]) in (2, 6)


def test_what_a_signer_left_out_of_his_signature_is_not_trusted():
    """A second exclusion may hold the pictures: whoever has the file can put others there."""

    def entry(code):
        return {"code": code}

    codes = {
        "success": [entry("claimSignature.validated"), entry("assertion.dataHash.match")],
        "informational": [],
        "failure": [],
    }
    codes["success"].append(entry("signingCredential.trusted"))
    assert _state({"activeManifest": codes})[0] == "trusted"
    codes["informational"].append(entry("assertion.dataHash.additionalExclusionsPresent"))
    state, problems = _state({"activeManifest": codes})
    assert state == "rejected"
    said = _of_manifest(Manifest(state, problems=problems), ())[0]
    assert said.startswith("What is signed is unchanged, but not enough is: the signer left out more of the file")
