"""The script that made the shipped feature networks learns what it says, from patients that it may learn from."""

import argparse
import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from scipy.ndimage import gaussian_filter

from harmonict.nn.resnet import ResNet18

SCRIPT = Path(__file__).parent.parent / "examples" / "pretrain_feature_networks.py"
CHOSEN = argparse.Namespace(
    patch=32, batch=16, steps=80, rate=3e-3, seed=0, network="resnet18", width=4, trials=[Path("toy")]
)


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("pretraining", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["pretraining"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def toy_scans(script):
    """Three patients of noise, two kernels: smooth and sharp."""
    rng = np.random.default_rng(0)
    scans = []
    for patient in ("one", "two", "three"):
        truth = np.full((2, 64, 64), 40, np.int16)
        truth[:, :32] = -850
        for kernel, blur in (("soft", 3.0), ("sharp", 0.5)):
            noise = gaussian_filter(rng.standard_normal(truth.shape), (0, blur, blur))
            hu = (truth + 200 * noise / noise.std()).astype(np.int16)
            scans.append(script.Scan(hu, truth, patient, patient == "three", {"kernel": kernel, "dose": "1 mGy"}))
    return scans


def test_patches_ask_only_what_their_patient_can_answer(script):
    scans = toy_scans(script)
    names = {"kernel": ["sharp", "soft", "other"], "dose": ["1 mGy"], "thickness": []}
    hu, shares, asked = script.Patches(scans, names, 24, seed=0).draw(40)
    assert hu.shape == (40, 1, 24, 24) and torch.allclose(shares.sum(dim=1), torch.ones(40))
    answer, possible = asked["kernel"]
    assert set(answer.tolist()) == {0, 1} and possible.tolist() == [[True, True, False]] * 40
    assert (asked["dose"][0] == -1).all()  # one dose is no question
    again = script.Patches(scans, names, 24, seed=0).draw(40)
    assert torch.equal(hu, again[0])


def test_a_toy_network_learns_kernel_and_tissue_and_is_written_as_judged(script, tmp_path):
    scans = toy_scans(script)
    torch.manual_seed(0)
    network = ResNet18(4)
    results = script.train(network, scans, CHOSEN)
    accuracy = results["held_out_accuracy"]
    assert max(accuracy["kernel"]["by_level"]) > 0.9 and accuracy["kernel"]["chance"] == 0.5
    assert max(accuracy["tissue"]["by_level"]) > 0.75  # half and half is a matter of chance
    script.write(network, results, scans, argparse.Namespace(**vars(CHOSEN), out=tmp_path))
    card = json.loads((tmp_path / "resnet18-trial.json").read_text())
    assert card["trained_on"] == ["one", "two"] and card["judged_on"] == ["three"]
    for key, value in load_file(tmp_path / "resnet18-trial.safetensors").items():
        assert torch.equal(value.float(), network.state_dict()[key])
