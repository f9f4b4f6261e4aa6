"""Weight files from outside: found, fetched, believed only after their SHA-256, never run."""

import hashlib
import pickle

import pytest
import torch
from safetensors.torch import save_file

from feature_files import Server, hub_file
from harmonict.core import HarmonictError
from harmonict.nn import pretrained
from harmonict.nn.pretrained import cache_folder, published, read_tensors, shipped, shipped_card

STATE = {"features.0.weight": torch.arange(6.0)}
WAYS_ON = ("put the file at", "--set feature_weights=PATH", "--set feature_weights=trial")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HARMONICT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def serve(monkeypatch):
    def start(content, **how):
        server = Server(content, **how)
        monkeypatch.setattr("urllib.request.urlopen", server)
        return server

    return start


def refused(call, *arguments):
    with pytest.raises(HarmonictError) as refusal:
        call(*arguments)
    assert "\n" not in str(refusal.value)
    return str(refusal.value)


def test_the_cache_is_where_the_user_or_the_system_wants_it(monkeypatch, tmp_path):
    monkeypatch.delenv("HARMONICT_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "harmonict"
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert str(cache_folder()) == "/x/harmonict"
    monkeypatch.setenv("HARMONICT_CACHE", "/mine")
    assert str(cache_folder()) == "/mine"


def test_a_published_file_is_fetched_once_and_then_read_offline(tmp_path, cache, serve):
    file = hub_file(tmp_path, "net", STATE)
    server = serve(file.read_bytes())
    url = f"https://example.org/models/{file.name}"
    for _ in range(2):
        assert torch.equal(published(url)["features.0.weight"], STATE["features.0.weight"])
    assert server.asked == [url]
    assert [path.name for path in cache.iterdir()] == [file.name]


def test_without_network_one_line_names_the_three_ways_on(cache, serve):
    serve(None)
    words = refused(published, "https://example.org/net-01234567.pth")
    assert all(way in words for way in (*WAYS_ON, str(cache / "net-01234567.pth"), "not known"))
    assert list(cache.iterdir()) == []


@pytest.mark.parametrize("how", ["truncated", "another file"])
def test_a_download_that_is_not_the_promised_one_is_not_kept(how, tmp_path, cache, serve):
    file = hub_file(tmp_path, "net", STATE)
    serve(file.read_bytes(), breaks_after=200) if how == "truncated" else serve(b"<html>no such file</html>")
    words = refused(published, f"https://example.org/{file.name}")
    assert "was not kept" in words and all(way in words for way in WAYS_ON)
    assert list(cache.iterdir()) == []


def test_a_connection_that_breaks_leaves_nothing(tmp_path, cache, serve, monkeypatch):
    file = hub_file(tmp_path, "net", STATE)

    def breaks(url, name):
        yield file.read_bytes()[:100]
        raise ConnectionResetError("connection reset")

    monkeypatch.setattr(pretrained, "_received", breaks)
    assert "connection reset" in refused(published, f"https://example.org/{file.name}")
    assert list(cache.iterdir()) == []


def test_a_file_whose_digest_is_not_the_one_in_its_name_is_refused_before_it_is_read(tmp_path, monkeypatch):
    file = hub_file(tmp_path, "net", STATE, digest="00000000")
    monkeypatch.setattr(torch, "load", lambda *a, **k: pytest.fail("read before its SHA-256 was checked"))
    assert "00000000" in refused(read_tensors, file)


def test_a_pth_without_a_digest_in_its_name_is_refused(tmp_path, monkeypatch):
    torch.save(STATE, tmp_path / "net.pth")
    monkeypatch.setattr(torch, "load", lambda *a, **k: pytest.fail("read without a digest"))
    assert "SHA-256 in its name" in refused(read_tensors, tmp_path / "net.pth")


class Hostile:
    def __reduce__(self):
        return eval, ("__import__('pathlib').Path('ran').touch()",)


def test_a_pickle_that_is_a_program_is_never_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    plain = pickle.dumps(Hostile())
    path = tmp_path / f"plain-{hashlib.sha256(plain).hexdigest()[:8]}.pth"
    path.write_bytes(plain)
    for file in (path, hub_file(tmp_path, "zip", {"a": Hostile()})):
        assert "nothing in it was run" in refused(read_tensors, file)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("content", [{}, {"a": 3}, [torch.zeros(2)], {"state_dict": {"a": torch.zeros(2)}}, "text"])
def test_a_file_of_anything_but_named_tensors_is_refused(content, tmp_path):
    assert "named tensors" in refused(read_tensors, hub_file(tmp_path, "net", content))


def test_safetensors_are_taken_under_any_name_and_checked_where_the_name_promises(tmp_path):
    save_file(STATE, tmp_path / "mine.safetensors")
    assert torch.equal(read_tensors(tmp_path / "mine.safetensors")["features.0.weight"], STATE["features.0.weight"])
    save_file(STATE, tmp_path / "mine-00000000.safetensors")
    assert "00000000" in refused(read_tensors, tmp_path / "mine-00000000.safetensors")
    (tmp_path / "half.safetensors").write_bytes((tmp_path / "mine.safetensors").read_bytes()[:-4])
    assert "not a whole" in refused(read_tensors, tmp_path / "half.safetensors")
    assert "cannot read" in refused(read_tensors, tmp_path / "missing.safetensors")


def test_a_shipped_network_that_is_not_the_one_of_its_card_is_refused(tmp_path, monkeypatch):
    good = pretrained.SHIPPED
    for suffix in ("safetensors", "json"):
        (tmp_path / f"vgg19-trial.{suffix}").write_bytes((good / f"vgg19-trial.{suffix}").read_bytes())
    monkeypatch.setattr(pretrained, "SHIPPED", tmp_path)
    assert shipped("vgg19-trial")
    content = bytearray((tmp_path / "vgg19-trial.safetensors").read_bytes())
    content[-1] ^= 1
    (tmp_path / "vgg19-trial.safetensors").write_bytes(content)
    assert "does not match its SHA-256" in refused(shipped, "vgg19-trial")
    (tmp_path / "vgg19-trial.safetensors").unlink()
    assert "install harmonict again" in refused(shipped, "vgg19-trial")


@pytest.mark.parametrize("name", ["vgg19-trial", "resnet18-trial"])
def test_a_shipped_network_was_judged_on_patients_that_it_was_not_trained_on(name):
    card = shipped_card(name)
    assert card["trained_on"] and card["judged_on"]
    bodies = {patient.rstrip("ab") for patient in card["trained_on"]}  # models a and b share a body
    assert not bodies & {patient.rstrip("ab") for patient in card["judged_on"]}
    assert not any("test" in patient for patient in card["trained_on"] + card["judged_on"])
    for question in ("kernel", "dose", "tissue"):
        score = card["held_out_accuracy"][question]
        assert score["by_level"][-1] > max(score["chance"], score["commonest"]) + 0.1
    assert (pretrained.SHIPPED / f"{name}.safetensors").stat().st_size < 4_000_000
