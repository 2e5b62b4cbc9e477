"""Pulling from a registry that does what it should, one that does not, and one that attacks. A1 to A10 are lines of the
list of attacks."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pumice.errors import UserError
from pumice.store import download, partial, pulling, transfer
from pumice.store.download import Patience
from pumice.store.layout import OwnStore, Store
from pumice.store.link import Reach, Unreachable, is_inner, looked_up
from pumice.store.names import Name
from pumice.store.registry import Missing
from pumice.store.transfer import Progress, Shelves
from wires import Fake, Handler, digest, respond, send, serving

HERE = Reach(plain=True, inner=True)
QUICK = Patience(tries=3, wait_s=0.01)
WEIGHTS = random.Random(7).randbytes(1_000_000)
TEMPLATE, CONFIG = b"{{ .Prompt }}", b'{"model_format":"gguf"}'


@pytest.fixture
def fake() -> Iterator[Fake]:
    with serving(Fake()) as running:
        running.model(WEIGHTS, TEMPLATE, CONFIG)
        yield running


@pytest.fixture
def store(tmp_path: Path) -> OwnStore:
    return OwnStore(tmp_path / "store")


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten parts of 100 kB, as a blob of 4 GB has sixteen."""
    monkeypatch.setattr(partial, "SMALLEST_PART", 100_000)
    monkeypatch.setattr(partial, "LARGEST_PART", 100_000)
    monkeypatch.setattr(download, "KEPT_EVERY", 1)


def name(fake: Fake, tag: str = "latest") -> Name:
    return Name.parse(f"{fake.host}/me/tiny:{tag}")


def pull(fake: Fake, store: OwnStore, *others: Store, reach: Reach = HERE) -> list[Progress]:
    return list(transfer.pull(name(fake), Shelves(store, others), reach, QUICK))


def left(store: OwnStore) -> list[str]:
    """What is in the store, locks apart."""
    return sorted(
        str(each.relative_to(store.root)) for each in store.root.rglob("*") if each.is_file() and each.name != ".lock"
    )


def is_whole(store: OwnStore, fake: Fake) -> bool:
    found = store.find(name(fake))
    assert found is not None
    assert [store.blobs.path(each).read_bytes() for each in found.manifest.blobs] == [WEIGHTS, TEMPLATE, CONFIG]
    assert not [each for each in left(store) if "partial" in each]
    return found.manifest.raw == fake.manifests["latest"]


def test_progress_is_told_in_ollamas_order(fake: Fake, store: OwnStore) -> None:
    steps = pull(fake, store)
    statuses = list(dict.fromkeys(step.status for step in steps))
    layers = [f"pulling {digest(each)[7:19]}" for each in (WEIGHTS, TEMPLATE, CONFIG)]
    assert statuses == [
        "pulling manifest", *layers, "verifying sha256 digest", "writing manifest", "removing unused layers", "success",
    ]  # fmt: skip
    about = [step for step in steps if step.digest == digest(WEIGHTS)]
    assert (about[0].total, about[0].completed, about[-1].completed) == (len(WEIGHTS), None, len(WEIGHTS))
    assert [step.completed or 0 for step in about] == sorted(step.completed or 0 for step in about)
    assert is_whole(store, fake)
    _, _, headers = fake.asked[0]
    assert headers["Accept"] == "application/vnd.docker.distribution.manifest.v2+json"
    assert headers["Accept-Encoding"] == "identity"
    assert headers["User-Agent"].startswith("pumice/")
    assert "Authorization" not in headers


def test_a_second_pull_asks_for_the_manifest_only(fake: Fake, store: OwnStore) -> None:
    pull(fake, store)
    fake.asked.clear()
    assert pull(fake, store)[-1].status == "success"
    assert fake.paths() == ["/v2/me/tiny/manifests/latest"]


def test_a_pull_mends_a_damaged_text(fake: Fake, store: OwnStore) -> None:
    """Its error says to get the model again."""
    pull(fake, store)
    found = store.find(name(fake))
    assert found is not None
    store.blobs.path(found.manifest.role("template")[0]).write_bytes(b"x" * len(TEMPLATE))
    with pytest.raises(UserError, match="other bytes"):
        found.text("template")
    pull(fake, store)
    assert is_whole(store, fake)


@pytest.mark.parametrize("text", ["pebble", "Pebble:Latest", "pebble:1.5", "library/PEBBLE:1.6"])
def test_what_is_in_the_package_is_asked_of_nobody(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "pull", lambda *of: pytest.fail("a registry was asked"))
    assert [step.status for step in pulling.pull(text, HERE)] == ["success"]


def test_parts_come_by_ranges_that_make_up_the_blob(fake: Fake, store: OwnStore, small_parts: None) -> None:
    pull(fake, store)
    spans = [headers["Range"] for _, path, headers in fake.asked if path.endswith(digest(WEIGHTS))]
    assert sorted(spans) == sorted(f"bytes={at}-{at + 99_999}" for at in range(0, 1_000_000, 100_000))
    assert is_whole(store, fake)


def test_without_a_registry_what_is_whole_is_a_success_and_what_is_not_is_unreachable(
    fake: Fake, store: OwnStore
) -> None:
    pull(fake, store)
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        gone = Fake(url=f"http://127.0.0.1:{nobody.getsockname()[1]}")
    store.write(name(gone), store.find(name(fake)).manifest)  # type: ignore[union-attr]
    assert [step.status for step in pull(gone, store)][-1] == "success"
    store.blobs.path(store.find(name(fake)).manifest.layers[0]).write_bytes(b"cut")  # type: ignore[union-attr]
    with pytest.raises(Unreachable, match="does not answer"):
        pull(gone, store)


def test_what_another_store_has_does_not_come_again(fake: Fake, store: OwnStore, tmp_path: Path) -> None:
    theirs = OwnStore(tmp_path / "ollama")
    pull(fake, theirs)
    damaged = theirs.blobs.path(theirs.find(name(fake)).manifest.layers[1])  # type: ignore[union-attr]
    damaged.write_bytes(b"x" * len(TEMPLATE))
    fake.asked.clear()
    pull(fake, store, Store(theirs.root, "Ollama"))
    assert fake.paths() == ["/v2/me/tiny/manifests/latest", f"/v2/me/tiny/blobs/{digest(TEMPLATE)}"]
    assert is_whole(store, fake)


def test_a_model_that_is_not_there(fake: Fake, store: OwnStore) -> None:
    del fake.manifests["latest"]
    with pytest.raises(Missing, match=r"^pull model manifest: file does not exist"):
        pull(fake, store)


def test_http_is_refused_without_insecure(fake: Fake, store: OwnStore) -> None:
    wanted = Name.parse(f"http://{fake.host}/me/tiny")
    with pytest.raises(UserError, match="insecure protocol http"):
        list(transfer.pull(wanted, Shelves(store), Reach(inner=True)))
    assert not fake.asked


# What goes wrong by itself.


def test_a_server_without_ranges(fake: Fake, store: OwnStore, small_parts: None) -> None:
    fake.fault = lambda handler, of: (respond(handler, of, ranges=False), True)[1]
    pull(fake, store)
    assert is_whole(store, fake)


def breaking(fake: Fake, every: int) -> None:
    """Each answer with a blob ends after so many bytes, though it declares all."""

    def fault(handler: Handler, of: Fake) -> bool:
        data = of.blobs.get(handler.path.rpartition("/")[2], b"")
        if len(data) < 1000:
            return False
        first = int(handler.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")[0])
        span = {"Content-Range": f"bytes {first}-{len(data) - 1}/{len(data)}"} if "Range" in handler.headers else {}
        rest = data[first:]
        send(handler, 206 if span else 200, rest[:every], span | {"Content-Length": str(len(rest))})
        handler.close_connection = True
        return True

    fake.fault = fault


def test_an_answer_that_breaks_off_goes_on_behind_what_came(fake: Fake, store: OwnStore) -> None:
    breaking(fake, 150_000)
    pull(fake, store)
    assert is_whole(store, fake)
    starts = [headers.get("Range") for _, path, headers in fake.asked if path.endswith(digest(WEIGHTS))]
    assert starts == [None, *(f"bytes={at}-999999" for at in range(150_000, 1_000_000, 150_000))]


def test_tries_end_when_they_bring_nothing_and_what_came_is_kept(fake: Fake, store: OwnStore) -> None:
    def fault(handler: Handler, of: Fake) -> bool:
        if "Range" not in handler.headers or len(of.paths()) > 8:
            return False
        send(handler, 503, b"")
        return True

    breaking(fake, 300_000)
    first = fake.fault
    fake.fault = lambda handler, of: fault(handler, of) or first(handler, of)
    with pytest.raises(Unreachable, match="503"):
        pull(fake, store)
    assert len(fake.asked) == 1 + 1 + QUICK.tries
    fake.asked.clear()
    fake.fault = lambda handler, of: False
    pull(fake, store)
    assert fake.asked[1][2]["Range"] == "bytes=300000-999999"
    assert is_whole(store, fake)


def test_a_part_that_stalls_is_asked_for_again(fake: Fake, store: OwnStore) -> None:
    release = threading.Event()

    def fault(handler: Handler, of: Fake) -> bool:
        if not handler.path.endswith(digest(WEIGHTS)) or "Range" in handler.headers:
            return False
        send(handler, 200, WEIGHTS[:70_000], {"Content-Length": str(len(WEIGHTS))})
        release.wait(20)
        return True

    fake.fault = fault
    began = time.monotonic()
    pull(fake, store, reach=Reach(plain=True, inner=True, silent_s=0.3))
    release.set()
    assert time.monotonic() - began < 15
    assert is_whole(store, fake)


def test_closing_ends_a_transfer_at_once_and_keeps_what_came(fake: Fake, store: OwnStore, small_parts: None) -> None:
    release = threading.Event()

    def stall(handler: Handler, of: Fake) -> bool:
        if handler.headers.get("Range") != "bytes=200000-299999":
            return False
        send(handler, 206, WEIGHTS[200_000:250_000], {
            "Content-Range": "bytes 200000-299999/1000000", "Content-Length": "100000",
        })  # fmt: skip
        release.wait(60)
        return True

    fake.fault = stall
    steps = transfer.pull(name(fake), Shelves(store), HERE, QUICK)
    for step in steps:
        if (step.completed or 0) >= 950_000:
            break
    began = time.monotonic()
    steps.close()  # type: ignore[attr-defined]
    assert time.monotonic() - began < 20  # silence would have been borne for 30 s
    release.set()
    fake.asked.clear()
    fake.fault = lambda handler, of: False
    pull(fake, store)
    spans = [headers.get("Range") for _, path, headers in fake.asked if path.endswith(digest(WEIGHTS))]
    assert spans == ["bytes=250000-299999"]
    assert is_whole(store, fake)


def test_a_page_of_the_hotel_does_not_cost_what_came(fake: Fake, store: OwnStore, small_parts: None) -> None:
    fake.fault = lambda handler, of: (
        handler.headers.get("Range", "").startswith("bytes=500000") and (send(handler, 200, b"<html>pay"), True)[1]
    )
    with pytest.raises(Unreachable):
        pull(fake, store)
    fake.fault = lambda handler, of: False
    fake.asked.clear()
    pull(fake, store)
    assert 1 <= sum(path.endswith(digest(WEIGHTS)) for path in fake.paths()) < 10
    assert is_whole(store, fake)


@pytest.mark.parametrize("at", [0, 1, 5, 12])
def test_a_disk_that_fills_up(
    at: int, fake: Fake, store: OwnStore, monkeypatch: pytest.MonkeyPatch, small_parts: None
) -> None:
    real, calls = os.pwrite, iter(range(10**6))

    def write(*arguments: Any) -> int:
        if next(calls) >= at:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(os, "pwrite", write)
        with pytest.raises(UserError, match=r"^the disk of the store is full") as error:
            pull(fake, store)
    assert str(store.root) not in str(error.value)
    assert not [each for each in left(store) if "partial" not in each]
    assert store.find(name(fake)) is None
    pull(fake, store)
    assert is_whole(store, fake)


def test_a_disk_without_room_is_told_of_before(fake: Fake, store: OwnStore, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(10, 9, 1))  # type: ignore[attr-defined]
        with pytest.raises(UserError, match="no room for 1 MB more"):
            pull(fake, store)
    assert fake.paths() == ["/v2/me/tiny/manifests/latest"]


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"N":0,"Offset":0,"Size":9,"Completed":9}', b"\xff" * 99])
def test_part_files_that_make_no_sense_begin_anew(content: bytes, fake: Fake, store: OwnStore) -> None:
    store.blobs.folder.mkdir(parents=True)
    place = store.blobs.folder / f"sha256-{digest(WEIGHTS)[7:]}-partial"
    place.write_bytes(b"?" * 50)
    place.with_name(f"{place.name}-0").write_bytes(content)
    pull(fake, store)
    assert is_whole(store, fake)


def test_ollamas_own_partial_files_are_gone_on_with(fake: Fake, store: OwnStore) -> None:
    store.blobs.folder.mkdir(parents=True)
    place = store.blobs.folder / f"sha256-{digest(WEIGHTS)[7:]}-partial"
    place.write_bytes(WEIGHTS[:400_000] + b"\0" * 200_000 + WEIGHTS[600_000:700_000])
    for number, (offset, size, done) in enumerate([(0, 600_000, 400_000), (600_000, 400_000, 100_000)]):
        about = {"N": number, "Offset": offset, "Size": size, "Completed": done}
        place.with_name(f"{place.name}-{number}").write_text(json.dumps(about))
    pull(fake, store)
    spans = [headers.get("Range") for _, path, headers in fake.asked if path.endswith(digest(WEIGHTS))]
    assert sorted(map(str, spans)) == ["bytes=400000-599999", "bytes=700000-999999"]
    assert is_whole(store, fake)


PULLER = """
import faulthandler, sys
faulthandler.dump_traceback_later(100, exit=True)
from pathlib import Path
from pumice.store import download, partial, pulling, transfer
from pumice.store.layout import OwnStore
from pumice.store.link import Reach
from pumice.store.names import Name
partial.SMALLEST_PART = partial.LARGEST_PART = 100_000
download.KEPT_EVERY, download.STREAMS = 1, 2
for step in transfer.pull(Name.parse(sys.argv[1]), transfer.Shelves(OwnStore(Path(sys.argv[2]))), Reach(True, True)):
    print(step.status, step.completed, flush=True)
"""


def puller(fake: Fake, store: OwnStore) -> subprocess.Popen[str]:
    arguments = [sys.executable, "-c", PULLER, f"{fake.host}/me/tiny", str(store.root)]
    return subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_a10_kill_9_at_ten_random_moments(fake: Fake, store: OwnStore) -> None:
    moments = random.Random(11)
    fake.pause_s = 0.05
    for _ in range(10):
        process = puller(fake, store)
        assert process.stdout is not None
        for line in process.stdout:  # its first bytes
            if line.startswith("pulling") and not line.endswith(("None\n", " 0\n")):
                break
        time.sleep(moments.uniform(0, 0.15))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        for path in store.blobs.folder.glob("sha256-*"):
            if "partial" not in path.name:
                assert digest(path.read_bytes()) == path.name.replace("-", ":")
    fake.pause_s = 0
    process = puller(fake, store)
    out, err = process.communicate(timeout=120)
    assert out.endswith("success None\n"), err
    assert is_whole(store, fake)
    asked = [headers["Range"] for _, path, headers in fake.asked if path.endswith(digest(WEIGHTS))]
    assert any(int(span.partition("=")[2].partition("-")[0]) % 100_000 for span in asked), "no part was gone on with"


def test_a10_two_processes_at_once_share_one_transfer(fake: Fake, store: OwnStore) -> None:
    fake.pause_s = 0.2
    both = [puller(fake, store) for _ in range(2)]
    for process in both:
        out, err = process.communicate(timeout=120)
        assert out.endswith("success None\n"), err
    asked = [headers["Range"] for _, path, headers in fake.asked if path.endswith(digest(WEIGHTS))]
    assert len(asked) == len(set(asked)) == 10
    assert is_whole(store, fake)


# Attacks.

BAD_DIGESTS = [
    "sha256:" + "a" * 63, "sha256:" + "a" * 65, "sha256:", "", "sha256:" + "A" * 64, "sha256:../../../x", "/etc/passwd",
    "sha512:" + "a" * 128, "sha256:" + "a" * 63 + "\0", "sha256:%2e%2e%2f" + "a" * 55, "sha256-" + "a" * 64,
    "sha256:" + "a" * 64 + "\n",
]  # fmt: skip


@pytest.mark.parametrize("bad", BAD_DIGESTS)
def test_a1_a_bad_digest_is_refused_before_a_file_is_opened(bad: str, fake: Fake, store: OwnStore) -> None:
    raw = json.loads(fake.manifests["latest"])
    raw["layers"][0]["digest"] = bad
    fake.manifests["latest"] = json.dumps(raw).encode()
    with pytest.raises(UserError):
        pull(fake, store)
    assert fake.paths() == ["/v2/me/tiny/manifests/latest"]
    assert not left(store)


def test_a2_a_layer_that_fails_and_a_bad_digest_leave_nothing(fake: Fake, store: OwnStore) -> None:
    raw = json.loads(fake.manifests["latest"])
    fake.blobs[digest(WEIGHTS)] = b"!" + WEIGHTS[1:]
    raw["layers"][1]["digest"] = "sha256:../../etc/x"
    fake.manifests["latest"] = json.dumps(raw).encode()
    with pytest.raises(UserError):
        pull(fake, store)
    assert not left(store)


def test_a3_other_bytes_are_deleted_and_never_have_the_name(fake: Fake, store: OwnStore) -> None:
    fake.blobs[digest(WEIGHTS)] = b"!" + WEIGHTS[1:]
    with pytest.raises(UserError, match=rf"^digest mismatch, file must be downloaded again: want {digest(WEIGHTS)}"):
        pull(fake, store)
    assert not [each for each in left(store) if digest(WEIGHTS)[7:] in each]
    assert store.find(name(fake)) is None


@pytest.mark.parametrize("by", [-1, 1, 10**9])
def test_a3_a_declared_length_of_another_size_is_deleted(by: int, fake: Fake, store: OwnStore) -> None:
    def fault(handler: Handler, of: Fake) -> bool:
        if not handler.path.endswith(digest(WEIGHTS)):
            return False
        send(handler, 200, WEIGHTS + b"?", {"Content-Length": str(len(WEIGHTS) + by)})
        handler.close_connection = True
        return True

    fake.fault = fault
    with pytest.raises(UserError, match="bytes come where the manifest declares 1000000"):
        pull(fake, store)
    assert not left(store)


def endless(handler: Handler, start: bytes = b"") -> bool:
    """A body without a declared end."""
    handler.send_response(200)
    handler.send_header("Connection", "close")
    handler.end_headers()
    handler.wfile.write(start)
    for _ in range(4000):
        handler.wfile.write(b" " * 2**16)
    handler.close_connection = True
    return True


def test_a3_an_endless_blob_ends_at_its_size(fake: Fake, store: OwnStore) -> None:
    fake.fault = lambda handler, of: handler.path.endswith(digest(WEIGHTS)) and endless(handler)
    with pytest.raises(UserError, match="more bytes came"):
        pull(fake, store)
    assert not left(store)


def test_a3_a_range_that_was_not_asked_for_is_deleted(fake: Fake, store: OwnStore, small_parts: None) -> None:
    def fault(handler: Handler, of: Fake) -> bool:
        if "Range" not in handler.headers:
            return False
        send(handler, 206, b"x" * 100_000, {"Content-Range": "bytes 0-99999/2000000"})
        return True

    fake.fault = fault
    with pytest.raises(UserError, match="other bytes come than were asked for"):
        pull(fake, store)
    assert not [each for each in left(store) if digest(WEIGHTS)[7:] in each]


@pytest.mark.parametrize("ending", ["", "-partial", "-partial-0", "-partial-0.new"])
def test_a4_a_link_at_a_name_of_the_store_is_not_followed(
    ending: str, fake: Fake, store: OwnStore, tmp_path: Path
) -> None:
    victim = tmp_path / "victim"
    victim.write_bytes(b"y" * len(WEIGHTS))
    store.blobs.folder.mkdir(parents=True)
    (store.blobs.folder / f"sha256-{digest(WEIGHTS)[7:]}{ending}").symlink_to(victim)
    pull(fake, store)
    assert victim.read_bytes() == b"y" * len(WEIGHTS)
    assert is_whole(store, fake)
    assert not store.blobs.path(store.find(name(fake)).manifest.layers[0]).is_symlink()  # type: ignore[union-attr]


def test_a5_a_compressed_manifest_is_refused(fake: Fake, store: OwnStore) -> None:
    bomb = zlib.compress(b" " * 50_000_000, wbits=31)
    fake.fault = lambda handler, of: (send(handler, 200, bomb, {"Content-Encoding": "gzip"}), True)[1]
    with pytest.raises(UserError, match="compressed"):
        pull(fake, store)


def test_a5_a_million_layers_are_refused(fake: Fake, store: OwnStore) -> None:
    layer = {"mediaType": "a", "digest": digest(WEIGHTS), "size": len(WEIGHTS)}
    fake.model(WEIGHTS, CONFIG, layers=[layer] * 10**6)
    began = time.process_time()
    with pytest.raises(UserError, match="longer than"):
        pull(fake, store)
    assert time.process_time() - began < 10
    fake.model(WEIGHTS, CONFIG, layers=[{**layer, "size": 1}] * 20_000)
    with pytest.raises(UserError, match="layers"):
        pull(fake, store)
    assert not left(store)


def test_a5_an_endless_manifest_is_refused(fake: Fake, store: OwnStore) -> None:
    fake.fault = lambda handler, of: endless(handler, b"{")
    with pytest.raises(UserError, match="longer than"):
        pull(fake, store)


@pytest.mark.parametrize("size", [-1, 2**70, "5", None, 1.5, True])
def test_a5_a_size_that_is_none_is_refused(size: object, fake: Fake, store: OwnStore) -> None:
    layer = {"mediaType": "a", "digest": digest(WEIGHTS), "size": size}
    fake.model(WEIGHTS, CONFIG, layers=[layer])
    with pytest.raises(UserError, match="size"):
        pull(fake, store)
    assert not left(store)


def asking_login(realm: Callable[[Fake], str]) -> Callable[[Handler, Fake], bool]:
    """401 without a token, which /token gives to everybody."""

    def fault(handler: Handler, of: Fake) -> bool:
        if handler.path.startswith("/token"):
            send(handler, 200, b'{"token":"secret"}')
        elif handler.headers.get("Authorization") != "Bearer secret":
            challenge = f'Bearer realm="{realm(of)}",service="reg",scope="repository:me/tiny:pull"'
            send(handler, 401, b"{}", {"WWW-Authenticate": challenge})
        else:
            return False
        return True

    return fault


def test_a_login_for_everybody(fake: Fake, store: OwnStore) -> None:
    fake.fault = asking_login(lambda of: f"{of.url}/token")
    pull(fake, store)
    assert "/token?service=reg&scope=repository%3Ame%2Ftiny%3Apull" in fake.paths()
    assert is_whole(store, fake)


def test_a_login_from_netrc_goes_to_its_host_only(
    fake: Fake, store: OwnStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".netrc").write_text("machine 127.0.0.1 login me password word\nmachine other login a password b\n")
    (tmp_path / ".netrc").chmod(0o600)
    fake.fault = asking_login(lambda of: f"{of.url}/token")
    pull(fake, store)
    said = [headers.get("Authorization") for _, path, headers in fake.asked if path.startswith("/token")]
    assert said == ["Basic bWU6d29yZA=="]
    assert fake.asked[0][2].get("Authorization") is None


def test_a6_a_login_on_another_host_is_refused(fake: Fake, store: OwnStore) -> None:
    with serving(Fake()) as other:
        fake.fault = asking_login(lambda of: f"{other.url}/token")
        with pytest.raises(UserError, match="sends its log-in to another host"):
            pull(fake, store)
        assert not other.asked


def test_a6_a_redirect_to_another_host_gets_no_authorization(fake: Fake, store: OwnStore) -> None:
    with serving(Fake(blobs=fake.blobs)) as other:
        login = asking_login(lambda of: f"{of.url}/token")

        def fault(handler: Handler, of: Fake) -> bool:
            if login(handler, of):
                return True
            if "/blobs/" not in handler.path:
                return False
            send(handler, 307, b"", {"Location": f"{other.url}{handler.path}"})
            return True

        fake.fault = fault
        pull(fake, store)
        assert is_whole(store, fake)
        assert len(other.asked) == 3
        assert not [headers for _, _, headers in other.asked if "Authorization" in headers]
    assert [headers for _, path, headers in fake.asked if "/blobs/" in path and "Authorization" in headers]


def test_a6_another_hosts_login_is_not_answered(fake: Fake, store: OwnStore) -> None:
    with serving(Fake()) as other:
        other.fault = asking_login(lambda of: f"{fake.url}/token")
        fake.fault = lambda handler, of: (
            "/blobs/" in handler.path and (send(handler, 307, b"", {"Location": other.url + handler.path}), True)[1]
        )
        with pytest.raises(UserError, match="401"):
            pull(fake, store)
        assert not [path for path in fake.paths() if path.startswith("/token")]


def test_redirects_of_one_host_are_followed_ten_times(fake: Fake, store: OwnStore) -> None:
    left_over = [10]

    def fault(handler: Handler, of: Fake) -> bool:
        if "/manifests/" not in handler.path or not left_over[0]:
            return False
        left_over[0] -= 1
        send(handler, 302, b"", {"Location": handler.path})
        return True

    fake.fault = fault
    pull(fake, store)
    left_over[0] = 11
    with pytest.raises(UserError, match="more than 10 redirects"):
        pull(fake, store)


@pytest.mark.parametrize(
    "location", ["file:///etc/passwd", "ftp://127.0.0.1/x", "gopher://127.0.0.1/x", "", "http://", "https://[::1"]
)
def test_a6_a_redirect_to_nowhere_is_refused(location: str, fake: Fake, store: OwnStore) -> None:
    fake.fault = lambda handler, of: (send(handler, 307, b"", {"Location": location}), True)[1]
    with pytest.raises(UserError):
        pull(fake, store)
    assert not left(store)


INNER_HOSTS = [
    "127.0.0.1", "localhost", "169.254.169.254", "10.1.2.3", "192.168.0.1", "172.16.0.1", "0.0.0.0", "100.64.0.1",
    "2130706433", "0177.0.0.1", "0x7f000001", "127.1", "3232235521",
]  # fmt: skip


@pytest.mark.parametrize("host", INNER_HOSTS)
@pytest.mark.parametrize("proxy", ["", "http://127.0.0.1:9"])
def test_a7_an_inner_host_is_refused_unless_allowed(
    host: str, proxy: str, store: OwnStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def connect(*arguments: object, **options: object) -> socket.socket:
        raise AssertionError("something was connected to")

    monkeypatch.setattr(socket, "create_connection", connect)
    if host != "localhost":  # a proxy looks names up, and means its own localhost
        monkeypatch.setenv("https_proxy", proxy)
    with pytest.raises(UserError, match=r"private network|in disguise|is no URL"):
        list(transfer.pull(Name.parse(f"{host}/me/tiny"), Shelves(store), Reach()))


@pytest.mark.parametrize(
    ("address", "inner"),
    [
        ("8.8.8.8", False), ("2606:4700::1111", False), ("::ffff:8.8.8.8", False), ("::1", True),
        ("::ffff:127.0.0.1", True), ("::ffff:10.0.0.1", True), ("fe80::1", True), ("fe80::1%eth0", True),
        ("fd00::1", True), ("64:ff9b::7f00:1", True), ("64:ff9b::808:808", False), ("2002:7f00:1::", True),
        ("224.0.0.1", True), ("ff02::1", True), ("255.255.255.255", True), ("::", True), ("::127.0.0.1", True),
        ("::808:808", True), ("2001::1", True), ("4000::1", True), ("64:ff9b:1::808:808", True), ("192.0.0.192", True),
        ("168.63.129.16", True), ("168.63.129.17", False), ("100.100.100.200", True),
    ],
)  # fmt: skip
def test_a7_addresses(address: str, inner: bool) -> None:
    assert is_inner(address) is inner


def pointing(monkeypatch: pytest.MonkeyPatch, answers: dict[str, list[str]]) -> list[str]:
    """Hosts whose addresses these are, one look-up after another; returns the hosts that are looked up."""
    real, asked = socket.getaddrinfo, list[str]()

    def look_up(host: Any, port: Any, *rest: Any, **options: Any) -> Any:
        text = host.decode() if isinstance(host, bytes) else host
        if text not in answers:
            return real(host, port, *rest, **options)
        asked.append(text)
        address = answers[text].pop(0) if len(answers[text]) > 1 else answers[text][0]
        return real(address, port, *rest, **options)

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    return asked


def test_a7_a_public_name_with_an_inner_address_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    pointing(monkeypatch, {"public.test": ["192.168.7.7"]})
    with pytest.raises(UserError, match="private network"):
        looked_up("public.test", 443, Reach())


def test_a7_what_was_checked_is_what_is_connected_to(
    fake: Fake, store: OwnStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A name that leads elsewhere at the second look-up is looked up once a request."""
    port = fake.host.partition(":")[2]
    asked = pointing(monkeypatch, {"rebinding.test": ["127.0.0.1", "127.0.0.9"]})
    connected = []
    real = socket.create_connection
    monkeypatch.setattr(
        socket, "create_connection", lambda to, *rest, **options: connected.append(to[0]) or real(to, *rest, **options)
    )
    with pytest.raises(UserError):  # the second request finds nobody at its address
        list(transfer.pull(Name.parse(f"rebinding.test:{port}/me/tiny"), Shelves(store), HERE, Patience(tries=1)))
    assert connected[:2] == ["127.0.0.1", "127.0.0.9"][: len(connected)]
    assert len(asked) == len(fake.asked) + len(connected) - 1
    assert fake.asked[0][2]["Host"] == f"rebinding.test:{port}"


def test_a_certificate_is_checked_for_the_name_and_not_the_address(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if shutil.which("openssl") is None:
        pytest.skip("openssl, which makes the certificate, is not here")
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=registry.test",
         "-addext", "subjectAltName=DNS:registry.test", "-keyout", key, "-out", certificate],
        check=True, capture_output=True,
    )  # fmt: skip
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    pointing(monkeypatch, {"registry.test": ["127.0.0.1"], "other.test": ["127.0.0.1"]})
    with serving(Fake(), context) as fake:
        fake.model(WEIGHTS, TEMPLATE, CONFIG)
        port, private = fake.url.rpartition(":")[2], Reach(inner=True)
        store = OwnStore(tmp_path / "store")
        list(transfer.pull(Name.parse(f"registry.test:{port}/me/tiny"), Shelves(store), private, QUICK))
        assert fake.asked
        asked = len(fake.asked)
        with pytest.raises(UserError, match="cannot prove that it is this host"):
            list(transfer.pull(Name.parse(f"other.test:{port}/me/tiny"), Shelves(store), private, QUICK))
        assert len(fake.asked) == asked
