"""What is signed, what reading says of it, and that nothing which changes a pixel passes."""

import json
import socket
import sys
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import c2pa
import numpy as np
import pytest
from files import sign, write

from sora_jax.errors import InputError, NoTimeStamp
from sora_jax.safety import boxes, provenance
from sora_jax.safety.keys import load_signer
from sora_jax.safety.manifest import read_manifest
from sora_jax.safety.provenance import Claim, Source, rehearse, verify_signed
from sora_jax.safety.verify import verify

sys.path += [str(Path(__file__).parent), str(Path(__file__).parents[2] / "experiments")]
import provenance_matrix as matrix  # noqa: E402
import tampering  # noqa: E402
from time_stamps import needs_openssl, time_stamp_server  # noqa: E402

CLAIM = Claim(
    origin="model",
    title="clip",
    model="bundled",
    weights_sha256="0f" * 32,
    config={"size": [32, 32], "guidance": 2.5, "image": None, "steps": 3},
    prompt_sha256="1f" * 32,
    seed=2**32 - 1,
    mesh="data=2",
    checks={"policy_sha256": "2f" * 32, "scan": {"worst": 0.01, "stride": 1}, "mark": 12345},
)


@pytest.fixture(scope="module", autouse=True)
def configuration(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CONFIG_HOME", str(tmp_path_factory.mktemp("config")))
        yield


@pytest.fixture(scope="module")
def signer():
    return load_signer()


@pytest.fixture
def source(tmp_path):
    frames = np.random.default_rng(5).integers(0, 256, (5, 32, 32, 3), dtype=np.uint8)
    return {
        format: write(tmp_path / f"clip.{format}", frames[:1] if format == "png" else frames, 8)
        for format in matrix.FORMATS
    }


@pytest.mark.parametrize("format", matrix.FORMATS)
def test_what_was_claimed_is_read_back(source, signer, tmp_path, format):
    path = tmp_path / f"signed.{format}"
    sign(source[format], path, CLAIM, signer)
    manifest = verify_signed(path, signer)
    assert manifest == read_manifest(path, signer.anchor)
    assert (manifest.state, manifest.problems) == ("trusted", ())
    assert (manifest.title, manifest.generator) == ("clip", f"sora_jax {CLAIM.version}")
    assert (manifest.actions, manifest.source_types) == (
        ("c2pa.created", "c2pa.watermarked.unbound"),
        ("trainedAlgorithmicMedia",),
    )
    for name in ("model", "weights_sha256", "config", "prompt_sha256", "seed", "mesh", "version", "checks"):
        assert manifest.generation[name] == getattr(CLAIM, name), name
    assert "prompt" not in manifest.generation and manifest.ingredients == () and manifest.time == ""
    assert "identity not verified" in manifest.signer
    assert tampering.look(path) == tampering.look(source[format])
    assert read_manifest(path).state == "valid"
    assert read_manifest(source[format]).state == "none"


def test_the_prompt_is_there_only_if_given(source, signer, tmp_path):
    sign(source["gif"], tmp_path / "a.gif", replace(CLAIM, prompt="a réd ball\n\x1b[31m"), signer)
    assert read_manifest(tmp_path / "a.gif").generation["prompt"] == "a réd ball\n\x1b[31m"


def made_of(*paths):
    return replace(CLAIM, ingredients=tuple(Source.read(path, path.stem) for path in paths))


def test_c2pa_itself_finds_nothing_wrong(source, signer, tmp_path):
    for format in matrix.FORMATS:
        path = tmp_path / f"signed.{format}"
        sign(source[format], path, made_of(source["png"], source["gif"]), signer)
        trust = {"trust": {"user_anchors": signer.anchor}}
        results = c2pa.Reader(str(path), context=c2pa.Context.from_dict(trust)).get_validation_results()
        assert results["activeManifest"]["failure"] == []


def test_an_edit_carries_the_manifests_of_what_it_was_made_from(source, signer, tmp_path):
    first, last = tmp_path / "first.png", tmp_path / "last.png"
    sign(source["png"], first, replace(CLAIM, title="first"), signer)
    last.write_bytes(tampering.flip(first.read_bytes(), first.stat().st_size - 20))
    path = tmp_path / "video.mp4"
    sign(source["mp4"], path, made_of(first, source["gif"], last), signer)
    manifest = verify_signed(path, signer)
    assert manifest.actions == ("c2pa.opened", "c2pa.edited", "c2pa.watermarked.unbound")
    assert manifest.source_types == ("trainedAlgorithmicMedia",)
    assert [(one.title, one.relationship, one.state) for one in manifest.ingredients] == [
        ("first.png", "parentOf", "valid"),
        ("clip.gif", "inputTo", "none"),
        ("last.png", "inputTo", "tampered"),
    ]
    assert [one["title"] for one in manifest.generation["ingredients"]] == ["first.png", "clip.gif", "last.png"]
    carried = json.loads(c2pa.Reader(str(path)).json())["manifests"].values()
    assert sorted(one["title"] for one in carried) == ["clip", "first"]
    assert str(tmp_path).encode() not in path.read_bytes()  # names of folders are nobody's business


def test_an_input_that_c2pa_cannot_read_is_named_all_the_same(source, signer, tmp_path):
    (tmp_path / "odd.mp4").write_bytes(b"not a video")
    (tmp_path / "odd.xyz").write_bytes(b"nor this")
    odd = (tmp_path / "odd.mp4", tmp_path / "odd.xyz")
    sign(source["gif"], tmp_path / "x.gif", made_of(*odd), signer)
    ingredients = verify_signed(tmp_path / "x.gif", signer).ingredients
    assert [(one.title, one.state) for one in ingredients] == [("odd.mp4", "unreadable"), ("odd.xyz", "none")]


def test_failures_of_signing_are_one_line(source, signer, tmp_path):
    def unplugged(data):
        raise OSError("token\nremoved")

    silent = "the time-stamp server http://127.0.0.1:9 gives no time stamp"
    for broken, message in [
        (replace(signer, sign=unplugged), "the signing key fails: OSError: token removed"),
        (replace(signer, timestamp_url="http://127.0.0.1:9"), silent),
    ]:
        for use in (rehearse, lambda signer: sign(source["png"], tmp_path / "x.png", CLAIM, signer)):
            with pytest.raises(InputError, match=message) as caught:
                use(broken)
            assert "\n" not in str(caught.value)
    rehearse(signer)
    with pytest.raises(InputError, match="cannot read .*none.png: No such file"):
        Source.read(tmp_path / "none.png", "image")
    with pytest.raises(InputError, match="cannot read /dev/zero: it is no file"):
        Source.read("/dev/zero", "image")


@needs_openssl
def test_a_time_stamp_says_when_a_file_was_signed(source, signer, tmp_path):
    with time_stamp_server(tmp_path) as url:
        stamped = replace(signer, timestamp_url=url)
        rehearse(stamped)
        begin = datetime.now(UTC).replace(microsecond=0)
        sign(source["mp4"], tmp_path / "video.mp4", CLAIM, stamped)
    manifest = verify_signed(tmp_path / "video.mp4", stamped)
    assert begin <= datetime.fromisoformat(manifest.time) <= datetime.now(UTC)
    assert not manifest.time_is_trusted
    assert (
        f"It was signed no later than {manifest.time}, says a time-stamp server that this installation does not know."
        in verify(tmp_path / "video.mp4").verdict
    )
    known = read_manifest(tmp_path / "video.mp4", signer.anchor + (tmp_path / "root.pem").read_text())
    assert known.state == "trusted" and known.time_is_trusted
    # A stamp that was changed is none.
    data = (tmp_path / "video.mp4").read_bytes()
    place = data.index(manifest.time.replace("-", "").replace(":", "").replace("T", "")[:14].encode() + b"Z")
    (tmp_path / "earlier.mp4").write_bytes(data[:place] + b"1999" + data[place + 4 :])
    changed = read_manifest(tmp_path / "earlier.mp4", signer.anchor)
    assert changed.state == "trusted" and not changed.time and not changed.time_is_trusted


class Clock:
    """Time that passes only while somebody sleeps."""

    def __init__(self):
        self.pauses = []

    def monotonic(self):
        return sum(self.pauses)

    def sleep(self, seconds):
        self.pauses.append(seconds)


@needs_openssl
@pytest.mark.parametrize("silent_at, pauses", [((), []), ((1, 2), [1, 2]), (range(99), [1, 2, 4])])
def test_a_server_that_gives_no_stamp_is_asked_again_for_a_while(
    source, signer, tmp_path, monkeypatch, silent_at, pauses
):
    clock = Clock()
    monkeypatch.setattr(provenance, "time", clock)
    with time_stamp_server(tmp_path, silent_at) as url:
        stamped = replace(signer, timestamp_url=url)
        if len(silent_at) > 2:
            with pytest.raises(NoTimeStamp, match="the time-stamp server http://127.0.0.1:.* gives no time stamp"):
                provenance.sign_patiently(source["png"].read_bytes(), ".png", CLAIM, stamped)
        else:
            path = tmp_path / "signed.png"
            path.write_bytes(provenance.sign_patiently(source["png"].read_bytes(), ".png", CLAIM, stamped))
            assert verify_signed(path, stamped).time
    assert clock.pauses == pauses and (tmp_path / "asked").read_text() == str(len(pauses) + 1)


def test_a_password_of_the_time_stamp_server_is_not_told(source, signer):
    """Not even the start of one that is too long for a message."""
    stamped = replace(signer, timestamp_url=f"http://me:{'s' * 300}@127.0.0.1:1")
    with pytest.raises(NoTimeStamp, match="127.0.0.1:1 gives no time stamp") as caught:
        provenance.sign(source["png"].read_bytes(), ".png", CLAIM, stamped)
    assert "sss" not in str(caught.value)


def test_a_file_without_the_stamp_that_it_was_to_have_does_not_pass(source, signer, tmp_path):
    sign(source["png"], tmp_path / "x.png", CLAIM, signer)
    with pytest.raises(NoTimeStamp, match="the time stamp of the server tsa.example.com does not fit the signature"):
        verify_signed(tmp_path / "x.png", replace(signer, timestamp_url="https://me:word@tsa.example.com"))


def test_a_key_that_fails_is_not_asked_again(source, signer, monkeypatch):
    monkeypatch.setattr(provenance, "time", Clock())
    calls = []
    broken = replace(signer, sign=lambda _: calls.append(1) or 1 / 0, timestamp_url="http://127.0.0.1:9")
    with pytest.raises(InputError, match="the signing key fails: ZeroDivisionError"):
        provenance.sign_patiently(source["png"].read_bytes(), ".png", CLAIM, broken)
    assert len(calls) == 1


def test_a_file_by_another_signer_is_not_taken_for_ours(source, signer, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "elsewhere"))
    sign(source["gif"], tmp_path / "x.gif", CLAIM, load_signer())
    with pytest.raises(InputError, match="does not verify: the signer is not known here"):
        verify_signed(tmp_path / "x.gif", signer)
    with pytest.raises(InputError, match="does not verify: none"):
        verify_signed(source["gif"], signer)


def test_reading_contacts_nobody(source, signer, tmp_path):
    """A file may name an address where its manifest lies; whoever reads the file must not be seen there."""
    server = socket.create_server(("127.0.0.1", 0))
    server.settimeout(0.1)
    builder = c2pa.Builder({"claim_generator_info": [{"name": "other", "version": "1"}], "title": "x"})
    builder.set_intent(c2pa.C2paBuilderIntent.CREATE, c2pa.C2paDigitalSourceType.DIGITAL_CAPTURE)
    builder.set_remote_url(f"http://127.0.0.1:{server.getsockname()[1]}/x.c2pa")
    builder.set_no_embed()
    path = tmp_path / "remote.png"
    native = c2pa.Signer.from_callback(signer.sign, c2pa.C2paSigningAlg.ES256, signer.chain)
    with open(source["png"], "rb") as original, open(path, "w+b") as target:
        builder.sign(native, "image/png", original, target)
    assert f"{server.getsockname()[1]}/x.c2pa".encode() in path.read_bytes()
    assert read_manifest(path).state in ("none", "unreadable")
    with pytest.raises(TimeoutError):
        server.accept()
    server.close()


@pytest.mark.parametrize("content", [b"", b"a letter", b"\x1aE\xdf\xa3" + bytes(99), b"\0\0\0\x08ftyp", b"GIF89a"])
@pytest.mark.parametrize("name", ["x.mp4", "x.png", "x.gif", "x.webm", "x.txt", "x"])
def test_what_is_no_signed_file_is_told_apart(tmp_path, content, name):
    (tmp_path / name).write_bytes(content)
    manifest = read_manifest(tmp_path / name)
    assert manifest.state in ("none", "unreadable")
    assert all("\n" not in problem for problem in manifest.problems)


def test_paths_and_anchors_that_are_none(source, tmp_path):
    for path in (tmp_path / "none.mp4", tmp_path, "/dev/zero"):
        with pytest.raises(InputError, match="cannot read"):
            read_manifest(path)
    with pytest.raises(InputError, match="no certificates in PEM"):
        read_manifest(source["mp4"], "roots")


# The matrix: each of its rows fails by itself if a file with changed pixels passes.


@pytest.fixture(scope="module")
def rows(tmp_path_factory, configuration):
    return {(row.format, row.change): row for row in matrix.rows(tmp_path_factory.mktemp("matrix"))}


def states(row):
    return set(row.states)


@pytest.mark.parametrize("format", matrix.FORMATS)
def test_every_flip_outside_the_manifest_is_noticed(rows, format):
    regions = [change for here, change in rows if here == format and change.startswith("flipped")]
    assert len(regions) > 4
    for change in regions:
        if change != f"flipped: {tampering.MANIFESTS[format]}":
            assert states(rows[format, change]) <= {"tampered", "unreadable"}, change


@pytest.mark.parametrize("format", matrix.FORMATS)
def test_additions_cuts_and_transplants_are_noticed(rows, format):
    elsewhere = ("none", "flipped:", "certificate:", "remuxed", "encoded again")
    changes = [change for here, change in rows if here == format and not change.startswith(elsewhere)]
    assert len(changes) > 8
    for change in changes:
        assert states(rows[format, change]) <= {"tampered", "unreadable"}, change
    assert states(rows[format, "encoded again"]) == {"none"}
    assert states(rows[format, "remuxed"]) == {"none"} and set(rows[format, "remuxed"].pixels) == {"same"}
    if format != "mp4":
        assert set(rows[format, "cut into other blocks around the manifest"].pixels) == {"same"}
    assert states(rows[format, "assertion edited: another seed"]) == {"tampered"}
    assert states(rows[format, "none"]) == {"trusted"}
    assert states(rows[format, "none, and the signer is not known"]) == {"valid"}


@pytest.mark.parametrize("format", matrix.FORMATS)
def test_pictures_hidden_in_the_padding_are_noticed(rows, format):
    row = rows[format, "forged: other pictures in the room of the signature's padding"]
    assert states(row) == {"tampered"} and set(row.pixels) == {"changed"}


@pytest.mark.parametrize("format", matrix.FORMATS)
def test_certificates_that_are_not_right(rows, format):
    found = {change: row for (here, change), row in rows.items() if here == format and "certificate" in change}
    said = {change.removeprefix("certificate: "): row for change, row in found.items()}
    assert {change: states(row) for change, row in said.items()} == {
        "expired, no time stamp": {"rejected"},
        "key usage is not digitalSignature": {"rejected"},
        "for web servers": {"rejected"},
        "not issued by the root it names": {"valid"},
    }
    assert "expired" in said["expired, no time stamp"].problem


# Files by others, whose claim has no digest of the boxes that the C2PA hash leaves out.


@pytest.fixture
def foreign(source, signer, tmp_path):
    builder = c2pa.Builder({"claim_generator_info": [{"name": "other", "version": "1"}], "title": "theirs"})
    builder.set_intent(c2pa.C2paBuilderIntent.CREATE, c2pa.C2paDigitalSourceType.DIGITAL_CAPTURE)
    native = c2pa.Signer.from_callback(signer.sign, c2pa.C2paSigningAlg.ES256, signer.chain)
    with open(source["mp4"], "rb") as original, open(tmp_path / "foreign.mp4", "w+b") as target:
        builder.sign(native, "video/mp4", original, target)
    return tmp_path / "foreign.mp4"


def test_files_by_others_are_read(foreign, signer):
    manifest = read_manifest(foreign, signer.anchor)
    assert (manifest.state, manifest.title, manifest.generator) == ("trusted", "theirs", "other 1")
    assert (manifest.source_types, manifest.generation) == (("digitalCapture",), {})
    assert len(manifest.problems) == 1 and "left out more of the file" in manifest.problems[0]  # free and skip boxes


def test_a_forged_file_by_others_is_noticed_where_c2pa_notices_nothing(foreign, tmp_path, signer):
    forged = tmp_path / "forged.mp4"
    forged.write_bytes(tampering.forged(foreign.read_bytes(), "mp4", tmp_path))
    assert c2pa.Reader(str(forged)).get_validation_state() == "Valid"
    assert tampering.pixels(forged, tampering.look(foreign)) == "changed"
    manifest = read_manifest(forged, signer.anchor)
    assert manifest.state == "tampered"
    assert manifest.problems[-1] == "its file type box holds more than the names of file types"


@pytest.mark.parametrize(
    "header, problem",
    [
        (b"isom\0\0\2\0isomavc1", None),
        (b"qt  \0\0\0\0", None),
        (b"jp2 \0\0\0\0isom", "another kind"),
        (b"isom\0\0\0\0iso", "more than the names"),
        (b"isom\0\0\0\0G\xff\0\1", "more than the names"),
        (b"isom\0\0\0\0" + b"isom" * 62, "more than the names"),
    ],
)
def test_what_a_file_type_box_may_hold(tmp_path, header, problem):
    path = tmp_path / "x.mp4"
    path.write_bytes(tampering.box(b"ftyp", header) + tampering.box(b"mdat", bytes(8)))
    with open(path, "rb") as file:
        assert problem in found if (found := boxes.header_problem(file)) else problem is None
    path.write_bytes(path.read_bytes() + tampering.box(b"ftyp", header))
    with open(path, "rb") as file:
        assert "more than one" in boxes.header_problem(file)
