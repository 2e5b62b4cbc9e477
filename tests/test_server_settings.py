"""What a server reads from its environment. Addresses: wire.md 1.10, and net.SplitHostPort's documented rules."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest

from pumice.durations import FOREVER_NS
from pumice.errors import UserError
from pumice.server.settings import Address, Settings, base_url, keys

SECOND = 10**9


@pytest.mark.parametrize(
    ("said", "host", "port", "url"),
    [
        ("", "127.0.0.1", 11434, "http://127.0.0.1:11434"),
        ("1.2.3.4", "1.2.3.4", 11434, "http://1.2.3.4:11434"),
        ("1.2.3.4:80", "1.2.3.4", 80, "http://1.2.3.4:80"),
        ("example.com", "example.com", 11434, "http://example.com:11434"),
        ("my_host-2:9", "my_host-2", 9, "http://my_host-2:9"),
        (":8080", "", 8080, "http://127.0.0.1:8080"),
        ("localhost:0", "localhost", 0, "http://localhost:0"),
        ("0.0.0.0", "0.0.0.0", 11434, "http://127.0.0.1:11434"),
        ("0.0.0.0:5", "0.0.0.0", 5, "http://127.0.0.1:5"),
        ("[::]:5", "::", 5, "http://[::1]:5"),
        ("::", "::", 11434, "http://[::1]:11434"),
        ("::1", "::1", 11434, "http://[::1]:11434"),
        ("[::1]", "::1", 11434, "http://[::1]:11434"),
        ("[::1]:1337", "::1", 1337, "http://[::1]:1337"),
        ("2001:db8::1:8080", "2001:db8::1:8080", 11434, "http://[2001:db8::1:8080]:11434"),
        ("http://h", "h", 80, "http://h:80"),
        ("https://h", "h", 443, "https://h:443"),
        ("http://h:8", "h", 8, "http://h:8"),
        ("https://h/under/here/", "h", 443, "https://h:443/under/here"),
        ("h/under", "h", 11434, "http://h:11434/under"),
        ("http://", "127.0.0.1", 80, "http://127.0.0.1:80"),
        ("h:66000", "h", 11434, "http://h:11434"),
        ("h:-1", "h", 11434, "http://h:11434"),
        ("h:", "h", 11434, "http://h:11434"),
        ("http://h:x", "h", 80, "http://h:80"),
        (" '1.2.3.4:5' ", "1.2.3.4", 5, "http://1.2.3.4:5"),
        ('"1.2.3.4"', "1.2.3.4", 11434, "http://1.2.3.4:11434"),
    ],
)  # fmt: skip
def test_address(said: str, host: str, port: int, url: str) -> None:
    found = Address.of(said)
    assert (found.host, found.port, base_url({"OLLAMA_HOST": said})) == (host, port, url)


@pytest.mark.parametrize("said", ["ftp://h", "a b", "h\\x", "user:secret@h:1", "[::1", "1::2::3", "-h", "hé"])
def test_no_address(said: str) -> None:
    with pytest.raises(UserError, match="OLLAMA_HOST"):
        Address.of(said)


@pytest.mark.parametrize("said", ["127.0.0.1", "localhost", "LOCALHOST", "127.8.9.1", "::1", "::ffff:127.0.0.1"])
def test_h_loopback_needs_no_key(said: str) -> None:
    assert Settings.of({"OLLAMA_HOST": said}).keys == ()


@pytest.mark.parametrize("said", ["0.0.0.0", ":11434", "::", "192.168.1.2", "example.com", "localhost.evil.example"])
def test_h_other_bind_without_a_key_is_refused(said: str) -> None:
    """attacks.md H: the default bind is loopback; another one, without a key, only with an explicit word."""
    with pytest.raises(UserError, match="no API key") as caught:
        Settings.of({"OLLAMA_HOST": said})
    assert "PUMICE_API_KEY" in caught.value.hint
    assert "PUMICE_OPEN_BIND=1" in caught.value.hint
    host = Address.of(said).host
    assert Settings.of({"OLLAMA_HOST": said, "PUMICE_API_KEY": "k"}).host == host
    assert Settings.of({"OLLAMA_HOST": said, "PUMICE_OPEN_BIND": "1"}).host == host
    with pytest.raises(UserError):
        Settings.of({"OLLAMA_HOST": said, "PUMICE_API_KEY": " , ", "PUMICE_OPEN_BIND": "no"})
    with pytest.raises(UserError):
        dataclasses.replace(Settings(), host=host)


def test_nothing_said() -> None:
    assert Settings.of({}) == Settings()
    empty = ("OLLAMA_HOST", "OLLAMA_KEEP_ALIVE", "OLLAMA_NUM_PARALLEL", "PUMICE_OFFLINE", "OLLAMA_DEBUG")
    assert Settings.of(dict.fromkeys(empty, "")) == Settings()
    here = Settings()
    assert (here.host, here.port, here.max_queue, here.max_models) == ("127.0.0.1", 11434, 512, 3)
    assert (here.keep_alive_ns, here.parallel, here.context) == (300 * SECOND, None, None)
    assert not any(
        (here.offline, here.remote_images, here.folders, here.open_bind, here.debug, here.keys, here.origins)
    )


def test_all_said() -> None:
    found = Settings.of(
        {
            "OLLAMA_HOST": "'[::1]:8'",
            "OLLAMA_ORIGINS": ' "https://a.example, http://*.b.example:*,,*" ',
            "OLLAMA_KEEP_ALIVE": "90",
            "OLLAMA_NUM_PARALLEL": "4",
            "OLLAMA_CONTEXT_LENGTH": "'8192'",
            "OLLAMA_MAX_QUEUE": "0",
            "OLLAMA_MAX_LOADED_MODELS": "2",
            "OLLAMA_DEBUG": "2",
            "OLLAMA_NOPRUNE": "1",
            "PUMICE_API_KEY": "one,two,one",
            "PUMICE_OFFLINE": "true",
            "PUMICE_REMOTE_IMAGES": "ON",
            "PUMICE_FOLDERS": "1",
        }
    )
    assert (found.host, found.port) == ("::1", 8)
    assert found.origins == ("https://a.example", "http://*.b.example:*", "*")
    assert (found.keep_alive_ns, found.parallel, found.context) == (90 * SECOND, 4, 8192)
    assert (found.max_queue, found.max_models, found.keys) == (0, 2, ("one", "two"))
    assert found.debug
    assert not found.prunes
    assert found.offline
    assert found.remote_images
    assert found.folders
    assert Settings.of({}, Address.of("127.0.0.2:9")) == Settings(host="127.0.0.2", port=9)


def test_zero_is_automatic() -> None:
    names = ("OLLAMA_NUM_PARALLEL", "OLLAMA_CONTEXT_LENGTH", "OLLAMA_MAX_LOADED_MODELS")
    assert Settings.of(dict.fromkeys(names, "0")) == Settings()


@pytest.mark.parametrize(
    ("said", "nanoseconds"), [("5m", 300 * SECOND), ("-1", FOREVER_NS), ("0", 0), ("1h30m", 5400 * SECOND)]
)
def test_keep_alive(said: str, nanoseconds: int) -> None:
    assert Settings.of({"OLLAMA_KEEP_ALIVE": said}).keep_alive_ns == nanoseconds


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("OLLAMA_KEEP_ALIVE", "soon"),
        ("OLLAMA_NUM_PARALLEL", "-1"),
        ("OLLAMA_NUM_PARALLEL", "4.5"),
        ("OLLAMA_MAX_QUEUE", "9" * 5000),
        ("OLLAMA_CONTEXT_LENGTH", "8k"),
        ("OLLAMA_MAX_LOADED_MODELS", "٣"),
        ("PUMICE_OFFLINE", "maybe"),
        ("PUMICE_REMOTE_IMAGES", "2"),
        ("PUMICE_API_KEY_FILE", "/no/such/file"),
    ],
)
def test_what_cannot_be_read_names_its_variable(name: str, said: str) -> None:
    with pytest.raises(UserError, match=name) as caught:
        Settings.of({name: said})
    assert len(caught.value.message) < 250


@pytest.mark.parametrize("said", ["false", "0", "F", "False"])
def test_no_debug(said: str) -> None:
    assert not Settings.of({"OLLAMA_DEBUG": said}).debug


@pytest.mark.parametrize("said", ["no", "off", "0", "False"])
def test_a_no_is_no(said: str) -> None:
    """Go's rule (any unknown word is yes) would open what somebody meant to close."""
    assert not Settings.of({"PUMICE_REMOTE_IMAGES": said}).remote_images


def test_keys_of_a_file(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("one\n\n two \nthree")
    assert keys({"PUMICE_API_KEY_FILE": str(file)}) == ("one", "two", "three")
    assert keys({"PUMICE_API_KEY_FILE": str(file), "PUMICE_API_KEY": "zero,two"}) == ("zero", "two", "one", "three")
    file.write_text(" \n")
    with pytest.raises(UserError, match="holds no key"):
        keys({"PUMICE_API_KEY_FILE": str(file)})
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="cannot be read"):
        keys({"PUMICE_API_KEY_FILE": str(file)})


@pytest.mark.parametrize("key", ["schlüssel", "two words", "line\nbreak"])
def test_a_key_that_no_header_can_carry(key: str) -> None:
    with pytest.raises(UserError, match="API key") as caught:
        keys({"PUMICE_API_KEY": key})
    assert key not in str(caught.value)


@pytest.mark.parametrize("module", ["guard", "logs", "metrics", "offline", "patience", "remote", "settings"])
def test_the_server_is_light(module: str) -> None:
    """No model is loaded by what answers before one is asked."""
    heavy = ("torch", "numpy", "PIL", "tokenizers", "huggingface_hub")
    code = f"import sys, pumice.server.{module}; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
