"""The training core: exact resume, nothing half written, one answer for one seed, refusals in words."""

import csv
import io
import json
import os
import signal
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import ndimage

from harmonict import train
from harmonict.core import Geometry, HarmonictError, ScanProtocol, Series
from harmonict.data import pair_series
from harmonict.nn.losses import total_loss
from harmonict.train import Run, load_checkpoint, save_checkpoint, tile_features


def make_pairs(patients="abcd", *, blur=1.0):
    sources, targets = [], []
    for n, patient in enumerate(patients):
        hu = np.random.default_rng(n).normal(0, 60, (2, 64, 64)).astype(np.float32)
        grid, common = Geometry((0.0, 0.0, 0.0), (3.0, 0.7, 0.7)), {"name": patient, "patient": patient}
        sources.append(Series(hu, grid, ScanProtocol(kernel="sharp"), **common))
        targets.append(
            Series(ndimage.gaussian_filter(hu, (0, blur, blur)), grid, ScanProtocol(kernel="soft"), **common)
        )
    return pair_series(sources, targets).split(np.random.default_rng(0))


class Killed(Exception):
    pass


def training(folder, *, die_at=None, steps=12, seed=0, loops=1, pairs=None, **options):
    """A small training with everything that a state can be: network with dropout, optimizer, schedule, plain values."""
    pairs = pairs or make_pairs()
    run = Run(folder, seed=seed, identity={"method": "toy"}, save_every_s=0, say=lambda line: None, **options)
    for loop in range(loops):
        with run.seeded():
            network = torch.nn.Sequential(
                torch.nn.Conv2d(1, 4, 3, padding=1), torch.nn.Dropout(0.2), torch.nn.Conv2d(4, 1, 3, padding=1)
            )
        adam = torch.optim.Adam(network.parameters(), lr=1e-2)
        rate = torch.optim.lr_scheduler.StepLR(adam, 5, 0.5)
        notes = {"seen": [], "sum": 0.0}
        for batch in run.batches(
            pairs, size=2, patch=16, steps=steps, epoch_steps=4, network=network, adam=adam, rate=rate, notes=notes
        ):
            if die_at == (loop, run.step_number):
                raise Killed
            x = batch.source / 100
            noise = 0.1 * torch.randn(x.shape, generator=batch.generator)
            with run.inside():
                y = network(x + noise)
            run.step({"L2": (1.0, (y.float() - batch.target / 100).square().mean())}, adam)
            rate.step()
            notes["seen"].append(batch.items[0][0])
            notes["sum"] += float(noise.sum())
            run.check(pairs.held_out, lambda batch, network=network: network(batch.source / 100) * 100)
    return run, network, adam, rate, notes


def state_of(result):
    _, network, adam, rate, notes = result
    return {"network": network.state_dict(), "adam": adam.state_dict(), "rate": rate.state_dict(), "notes": notes}


def assert_same(a, b, path=""):
    assert type(a) is type(b), path
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), path
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), path
        for key in a:
            assert_same(a[key], b[key], f"{path}/{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), path
        for n, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{path}/{n}")
    else:
        assert a == b, path


def log_rows(folder):
    with (folder / "log.csv").open() as stream:
        return list(csv.reader(stream))


# -- resume ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["float32", "bf16"])
@pytest.mark.parametrize("die_at", [(0, 1), (0, 7), (1, 0), (1, 9)])
def test_a_resumed_training_equals_one_that_was_never_stopped_to_the_last_bit(tmp_path, die_at, precision):
    whole = training(tmp_path / "whole", loops=2, precision=precision)
    with pytest.raises(Killed):
        training(tmp_path / "resumed", loops=2, die_at=die_at, precision=precision)
    resumed = training(tmp_path / "resumed", loops=2, precision=precision)
    assert_same(state_of(whole), state_of(resumed))
    assert log_rows(tmp_path / "whole") == log_rows(tmp_path / "resumed")
    assert len(log_rows(tmp_path / "whole")) == 1 + 2 * (12 + 3 * 2)


def test_a_finished_training_is_not_done_again(tmp_path):
    first = training(tmp_path / "run")
    again = training(tmp_path / "run", die_at=(0, 0))
    assert_same(state_of(first), state_of(again))
    assert again[0].card(make_pairs())["training"][0]["steps"] == 12


def test_seeds_differ():
    a, b, c = (training(None, seed=seed)[1].state_dict() for seed in (0, 0, 1))
    assert_same(a, b)
    assert not torch.equal(a["0.weight"], c["0.weight"])


def test_killed_in_the_middle_of_a_checkpoint_the_last_whole_one_counts(tmp_path):
    """kill -9 at three places of the fifth checkpoint: before, while and after its files are written."""
    whole = training(tmp_path / "whole")
    for what in ("save_file", "os.fsync", "os.replace"):
        folder = tmp_path / what
        killer = f"""
import os, signal, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from harmonict import train
import test_train
calls = 0
def deadly(*a, **k):
    global calls
    calls += str(a).count("loop-0") + ("fsync" in {what!r})
    if calls >= {10 if what == "os.fsync" else 5 if what == "save_file" else 9}:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*a, **k)
owner, name = (train.os, {what!r}[3:]) if "." in {what!r} else (train, {what!r})
real = getattr(owner, name)
setattr(owner, name, deadly)
test_train.training({str(folder)!r})
"""
        done = subprocess.run([sys.executable, "-c", killer], capture_output=True, text=True)
        assert done.returncode == -signal.SIGKILL, done.stderr
        kept = sorted(p.name for p in (folder / "loop-0").glob("step-*"))
        assert kept == ["step-00000003", "step-00000004"] and (folder / "loop-0" / ".part").exists()
        assert_same(state_of(whole), state_of(training(folder)))


def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(tmp_path):
    for step in (1, 2, 3):
        save_checkpoint(tmp_path, {"step": step, "x": torch.full((3,), float(step))}, step=step)
    assert len(list(tmp_path.glob("step-*"))) == 2 and load_checkpoint(tmp_path)["step"] == 3
    tensors = tmp_path / "step-00000003" / "tensors.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:-1] + b"\x7f")
    assert load_checkpoint(tmp_path)["x"].tolist() == [2.0] * 3
    (tmp_path / "step-00000002" / "state.json").write_text('{"state": ')
    assert load_checkpoint(tmp_path) is None


def test_a_checkpoint_holds_nested_state_of_every_kind_without_pickle(tmp_path):
    state = {
        "optimizer": {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"betas": (0.9, 0.999), "lr": 1e-4}]},
        "bf16": torch.randn(3, 2).bfloat16(),
        "transposed": torch.arange(6.0).reshape(2, 3).T,
        "empty": {},
        "none": None,
        "infinite": float("-inf"),
        "small": 0.1 + 0.2,
    }
    path = save_checkpoint(tmp_path, state, step=1)
    assert_same(load_checkpoint(tmp_path), state)
    assert sorted(p.name for p in path.iterdir()) == ["state.json", "tensors.safetensors"]
    with pytest.raises(TypeError, match="x: a set"):
        save_checkpoint(tmp_path, {"x": {1}}, step=2)


def test_a_folder_of_another_training_is_refused(tmp_path):
    training(tmp_path / "run", steps=2)
    with pytest.raises(HarmonictError, match=r"another training.*seed"):
        training(tmp_path / "run", seed=1)
    with pytest.raises(HarmonictError, match="of 2 steps, not of 3"):
        training(tmp_path / "run", steps=3)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    with pytest.raises(HarmonictError, match="holds no training"):
        Run(tmp_path / "mine")
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["letter.txt"]
    Run(tmp_path / "begun", identity={"patch": 400})
    Run(tmp_path / "begun", identity={"patch": 40})  # the first never came as far as a checkpoint
    run = Run(tmp_path / "run", identity={"method": "toy"})
    other = torch.nn.Conv2d(1, 1, 1)
    with pytest.raises(HarmonictError, match="another training"):
        next(run.batches(make_pairs(), size=1, patch=16, steps=2, network=other, adam={}, rate={}, notes={}))


# -- what stops it ---------------------------------------------------------------------------------------------------


def test_a_gradient_that_is_too_long_is_shortened_and_keeps_its_direction():
    weights, run = torch.nn.Parameter(torch.zeros(2)), Run(say=lambda line: None)
    sgd = torch.optim.SGD([weights], lr=1.0)
    slope = torch.tensor([3.0, 4.0])
    for _ in run.batches(make_pairs(), size=1, patch=16, steps=2):
        run.step({"L1": (1.0, (slope * weights).sum())}, sgd, gradient_norm=1.0 if run.step_number == 0 else 10.0)
        if run.step_number == 0:
            assert torch.allclose(weights.detach(), -slope / 5)
    assert torch.allclose(weights.detach(), -slope / 5 - slope)


@pytest.mark.parametrize("broken", ["loss", "gradient"])
def test_nan_stops_the_training_in_words_and_keeps_the_last_good_state(tmp_path, broken):
    weight = torch.nn.Parameter(torch.ones(1))
    network = torch.nn.ParameterList([weight])
    sgd = torch.optim.SGD(network.parameters(), lr=0.1)
    run = Run(tmp_path / "run", save_every_s=0)
    with pytest.raises(HarmonictError, match=r"stopped at step 4: .*(L1|gradient).*step-00000003"):
        for _ in run.batches(make_pairs(), size=1, patch=16, steps=9, network=network, sgd=sgd):
            loss = weight.abs().sum()
            if run.step_number == 3:
                # the square root of 0 is 0, its slope is infinite
                loss = loss * float("nan") if broken == "loss" else (weight.sum() - weight.detach().sum()).sqrt()
            run.step({"L1": (1.0, loss)}, sgd)
    assert weight.item() == pytest.approx(0.7)
    saved = load_checkpoint(tmp_path / "run" / "loop-0")
    assert saved["loop"]["step"] == 3 and saved["state"]["network"]["0"].item() == weight.item()


def test_it_stops_when_the_held_out_patients_gain_no_more_and_keeps_the_best_weights(tmp_path):
    network = torch.nn.ParameterList([torch.nn.Parameter(torch.zeros(1))])
    pairs, lines = make_pairs(), []
    run = Run(tmp_path / "run", patience=3, say=lines.append)
    for _ in run.batches(pairs, size=1, patch=32, steps=50, epoch_steps=2, network=network):
        network[0].data += 1.0
        run.check(pairs.held_out, lambda b: b.target + 10 * (network[0].item() - 8) ** 2)
    assert network[0].item() == 8.0
    assert run.step_number == 8 + 3 * 2
    card = run.card(pairs)
    assert card["training"][0]["kept_step"] == 8 and card["training"][0]["validation_ccc"] == pytest.approx(1)
    assert "stopping" in lines[-1] and "best so far" in lines[3]
    assert card["data"]["training"]["patients"] == 3 and card["data"]["validation"]["patients"] == 1
    assert card["protocol_pairs"] == [{"source": "sharp", "target": "soft", "slice_pairs": 6}]
    json.dumps(card)


def test_a_rate_that_falls_to_0_is_followed_to_its_end_and_its_last_state_kept():
    network = torch.nn.ParameterList([torch.nn.Parameter(torch.zeros(1))])
    pairs, run = make_pairs(), Run(patience=1, say=lambda line: None)
    for _ in run.batches(pairs, size=1, patch=32, steps=6, epoch_steps=2, network=network):
        network[0].data += 1.0
        run.check(pairs.held_out, lambda b: b.target + 10 * network[0].item(), keep="last")
    assert run.step_number == 6 and network[0].item() == 6.0
    assert run.card(pairs)["training"][0]["kept_step"] == 6


def test_the_validation_ccc_falls_with_blur_noise_and_bias_and_is_1_for_the_truth():
    batches = [make_pairs().batch((0, n), size=1, patch=64, augment=False) for n in range(6)]
    truth = [b.target for b in batches]
    noise = [t + 15 * torch.randn(t.shape, generator=torch.Generator().manual_seed(1)) for t in truth]
    scores = {
        "truth": train.validation(batches, truth, None)[0],
        "source": train.validation(batches, [b.source for b in batches], None)[0],
        "noisy": train.validation(batches, noise, None)[0],
        "biased": train.validation(batches, [t + 5 for t in truth], None)[0],
    }
    assert scores["truth"] == 1 and all(score < 0.9 for name, score in scores.items() if name != "truth")
    assert train.validation(batches, [t + 5 for t in truth], None)[1] == pytest.approx(5, abs=1e-4)


def test_tile_features_of_a_wave_say_its_mean_amplitude_and_band():
    wave = 7 + 10 * np.sin(2 * np.pi * np.arange(64) / 16)[None, :] * np.ones((64, 1))
    mean, sd, *bands = tile_features(wave)
    assert mean == pytest.approx(7) and sd == pytest.approx(10 / np.sqrt(2))
    assert np.argmax(bands) == 2  # a period of 16 pixels lies between blurs of 2 and 4
    assert np.allclose(tile_features(3 * wave)[2:], np.array(bands) + np.log(3))


# -- losses, log, sheet ----------------------------------------------------------------------------------------------


def test_losses_are_logged_raw_and_weighed_once(tmp_path):
    weight = torch.nn.Parameter(torch.tensor([1.0]))
    network = torch.nn.ParameterList([weight])
    sgd = torch.optim.SGD([weight], lr=0.01)
    run = Run(tmp_path / "run")
    for _ in run.batches(make_pairs(), size=1, patch=16, steps=1, network=network, sgd=sgd):
        run.step({"adversarial": (2.0, 3 * weight.sum()), "pixel": (10.0, weight.square().sum())}, sgd)
    assert weight.item() == pytest.approx(1 - 0.01 * (2 * 3 + 10 * 2))
    assert log_rows(tmp_path / "run")[1:] == [["0", "1", "adversarial", "3.0"], ["0", "1", "pixel", "1.0"]]
    assert total_loss({"a": (2.0, torch.tensor(3.0)), "b": (0.5, torch.tensor(4.0))}).item() == 8


def test_the_contact_sheet_shows_input_output_and_target_side_by_side(tmp_path):
    pairs = make_pairs()
    run = Run(tmp_path / "run", say=lambda line: None)
    for _ in run.batches(pairs, size=1, patch=32, steps=1, network=torch.nn.ParameterList()):
        run.check(pairs.held_out, lambda b: torch.full_like(b.source, 400.0))
    (sheet,) = (tmp_path / "run" / "sheets").iterdir()
    image = np.asarray(Image.open(sheet))
    assert image.shape == (4 * 32, 3 * 32) and (image[:, 32:64] == 255).all()
    batch = pairs.held_out.batch((0, 2**31, 0), size=1, patch=32, augment=False)
    assert np.array_equal(image[:32, :32], ((batch.source[0, 0].numpy() + 1000) / 1400 * 255).astype(np.uint8))
    assert image[:32, 64:].std() < image[:32, :32].std()


def test_a_png_is_read_back_exactly():
    gray = np.random.default_rng(0).integers(0, 256, (5, 7)).astype(np.uint8)
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(train.png(gray)))), gray)


def test_the_tensorboard_file_holds_the_log(tmp_path):
    # CRC-32C of "123456789" is E3069283 (RFC 3720, appendix B.4, its check value); masked as TFRecord says
    crc = 0xE3069283
    assert train._masked_crc(b"123456789") == struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)
    training(tmp_path / "run", steps=3)
    (path,) = (tmp_path / "run").glob("events.out.tfevents.*")
    content, place, events = path.read_bytes(), 0, []
    while place < len(content):
        (length,) = struct.unpack_from("<Q", content, place)
        assert content[place + 8 : place + 12] == train._masked_crc(content[place : place + 8])
        events.append(content[place + 12 : place + 12 + length])
        place += length + 16
    assert events[0].endswith(b"brain.Event:2") and len(events) == len(log_rows(tmp_path / "run"))
    value = float(log_rows(tmp_path / "run")[1][3])
    assert b"loop-0/L2" in events[1] and events[1].endswith(struct.pack("<f", value))


# -- several processes -----------------------------------------------------------------------------------------------


def test_two_processes_average_their_gradients(tmp_path):
    script = tmp_path / "two.py"
    script.write_text(
        f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
import torch
from harmonict.train import Run
from test_train import make_pairs
run = Run({str(tmp_path / "run")!r}, accelerator="cpu", devices=2, precision="float32", say=lambda line: None)
pairs = make_pairs()
weight = torch.nn.Parameter(torch.zeros(1))
sgd = torch.optim.SGD([weight], lr=1.0)
own = []
for batch in run.batches(pairs, size=4, patch=16, steps=1, network=torch.nn.ParameterList([weight]), sgd=sgd):
    assert len(batch.source) == 2
    own.append(batch.source.mean().item())
    run.step({{"linear": (1.0, weight.sum() * batch.source.mean())}}, sgd)
    run.check(pairs.held_out, lambda b: b.source)
open({str(tmp_path)!r} + f"/rank{{run.rank}}", "w").write(f"{{own[0]!r}} {{weight.item()!r}}")
"""
    )
    done = subprocess.run(
        [sys.executable, str(script)],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    (mean0, weight0), (mean1, weight1) = (map(float, (tmp_path / f"rank{n}").read_text().split()) for n in (0, 1))
    assert mean0 != mean1 and weight0 == weight1 == pytest.approx(-(mean0 + mean1) / 2, rel=1e-5)
    rows = [row for row in log_rows(tmp_path / "run") if row[2] == "linear"]
    assert rows == [["0", "1", "linear", rows[0][3]]]
