"""Alternative training: when a phase ends, who leads, what is rolled back; a killed run goes on to the last bit."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from harmonict.alternating import SIDES, Contest, Rules, begin_step, end_step, new_phase, scores
from harmonict.train import Run
from test_train import Killed, assert_same, log_rows, make_pairs


class Quiet:
    """What `end_step` asks of a Run."""

    def __init__(self):
        self.logged = []

    def mean_of_ranks(self, values):
        return values

    def log(self, name, value):
        self.logged.append((name, value))


def game(generators=1, discriminators=1):
    torch.manual_seed(0)
    contest = Contest(
        [torch.nn.Linear(2, 2) for _ in range(generators)], [torch.nn.Linear(2, 1) for _ in range(discriminators)]
    )
    adam = {side: torch.optim.Adam(contest.side(side).parameters(), lr=0.1) for side in SIDES}
    return contest, adam, new_phase()


def play(rules, contest, adam, phase, real, fake, run=None):
    """One step that changes the side whose turn it is, judged as told."""
    side = begin_step(contest, adam, phase)
    adam[side].zero_grad()
    sum(layer(torch.ones(1, 2)).sum() for layer in contest.side(side)).backward()
    adam[side].step()
    end_step(run or Quiet(), rules, contest, adam, phase, torch.tensor(real), torch.tensor(fake))
    return side


def test_a_g_is_as_good_as_it_fools_the_strictest_d_and_a_d_as_it_finds_the_best_g():
    real, fake = torch.tensor([0.9, 0.7]), torch.tensor([[0.8, 0.3], [0.6, 0.5]])
    assert scores("G", real, fake).tolist() == pytest.approx([0.3, 0.5])
    assert scores("D", real, fake).tolist() == pytest.approx([0.2, 0.5])


def test_d_begins_and_its_phase_ends_where_it_tells_fake_from_real():
    contest, adam, phase = game()
    rules = Rules(t_max=50, window=2)
    sides = [play(rules, contest, adam, phase, [0.995], [[fake]]) for fake in (0.2, 0.2, 0.005, 0.005)]
    assert sides == ["D"] * 4 and (phase["side"], phase["number"], phase["step"]) == ("G", 1, 0)
    assert play(rules, contest, adam, phase, [0.995], [[0.005]]) == "G"


def test_gs_phase_ends_where_it_fools_every_d():
    contest, adam, phase = game(generators=2, discriminators=2)
    phase["side"] = "G"
    rules = Rules(t_max=50, window=1)
    play(rules, contest, adam, phase, [0.5, 0.5], [[0.999, 0.2], [0.9, 0.9]])
    assert phase["side"] == "G"
    play(rules, contest, adam, phase, [0.5, 0.5], [[0.999, 0.2], [0.995, 0.999]])
    assert phase["side"] == "D" and contest.generator is contest.generators[1]


def test_a_phase_ends_at_t_max_and_the_best_copy_leads():
    contest, adam, phase = game(discriminators=3)
    rules = Rules(t_max=4, window=2)
    for _ in range(4):
        assert play(rules, contest, adam, phase, [0.6, 0.8, 0.7], [[0.3, 0.3, 0.3]]) == "D"
    assert (phase["side"], phase["rollbacks"]) == ("G", 0)
    assert contest.discriminator is contest.discriminators[1]


def test_who_lost_ground_goes_back_to_the_last_bit_and_tries_again_so_often_and_no_oftener():
    contest, adam, phase = game()
    rules = Rules(t_max=3, window=1, slack=0.05, retries=2)
    play(rules, contest, adam, phase, [1.0], [[0.0]])  # D has won, and G's first phase gives its Adam a history
    for _ in range(3):
        play(rules, contest, adam, phase, [1.0], [[0.5]])
    play(rules, contest, adam, phase, [1.0], [[0.0]])
    before = {"G": contest.generators.state_dict(), "adam": adam["G"].state_dict()}
    before = {k: torch.load(_saved(v), weights_only=True) for k, v in before.items()}
    for attempt in range(3):
        assert phase["side"] == "G" and phase["attempt"] == attempt
        for fake in (0.5, 0.45, 0.4):
            play(rules, contest, adam, phase, [1.0], [[fake]])
        assert_same(dict(contest.generators.state_dict()), dict(before["G"]))
        assert_same(adam["G"].state_dict(), before["adam"])
        assert phase["rollbacks"] == attempt + 1
    assert phase["side"] == "D"


def _saved(value):
    import io

    stream = io.BytesIO()
    torch.save(value, stream)
    stream.seek(0)
    return stream


def test_within_the_slack_nobody_goes_back():
    contest, adam, phase = game()
    for real in (0.50, 0.48, 0.46):
        play(Rules(t_max=3, window=1), contest, adam, phase, [real], [[0.0]])
    assert phase["rollbacks"] == 0 and phase["side"] == "G"


def test_the_other_side_is_frozen():
    contest, adam, phase = game()
    for side in SIDES:
        phase["side"] = side
        begin_step(contest, adam, phase)
        assert {s: all(p.requires_grad for p in contest.side(s).parameters()) for s in SIDES} == {
            s: s == side for s in SIDES
        }


@pytest.mark.parametrize(
    "wrong", [{"t_max": 0}, {"fake_below": 0.9, "real_above": 0.5}, {"retries": -1}, {"window": 0}, {"slack": -0.1}]
)
def test_rules_that_make_no_sense_are_refused(wrong):
    with pytest.raises(ValueError):
        Rules(**{"t_max": 5, **wrong})


# -- in a run --------------------------------------------------------------------------------------------------------


def training(folder, *, die_at=None, steps=20):
    """A toy GAN whose G falls back by chance, so that there are rollbacks among the phases."""
    pairs = make_pairs()
    run = Run(folder, identity={"method": "toy"}, save_every_s=0, say=lambda line: None)
    with run.seeded():
        contest = Contest(
            [torch.nn.Conv2d(1, 1, 3, padding=1) for _ in range(2)], [torch.nn.Conv2d(1, 1, 3) for _ in range(2)]
        )
    adam = {side: torch.optim.Adam(contest.side(side).parameters(), lr=0.05) for side in SIDES}
    phase, rules = new_phase(), Rules(t_max=3, window=1, slack=0.0)
    for batch in run.batches(
        pairs, size=2, patch=16, steps=steps, contest=contest, adam_g=adam["G"], adam_d=adam["D"], phase=phase
    ):
        if run.step_number == die_at:
            raise Killed
        side = begin_step(contest, adam, phase)
        made = [g(batch.source / 100) for g in contest.generators]
        real = torch.stack([d(batch.target / 100).mean() for d in contest.discriminators])
        fake = torch.stack([torch.stack([d(image).mean() for d in contest.discriminators]) for image in made])
        loss = fake.square().sum() + real.sum() if side == "D" else -fake.sum()
        run.step({"loss": (1.0, loss)}, adam[side])
        end_step(run, rules, contest, adam, phase, real.sigmoid(), fake.sigmoid())
    return contest, adam, phase


def test_a_killed_run_goes_on_to_the_last_bit(tmp_path):
    states = []
    whole = training(tmp_path / "whole")
    for die_at in (1, 2, 3, 5, 8, 13):
        folder = tmp_path / str(die_at)
        with pytest.raises(Killed):
            training(folder, die_at=die_at)
        states.append(training(folder))
        assert log_rows(folder) == log_rows(tmp_path / "whole")
    assert whole[2]["rollbacks"] > 0 and whole[2]["number"] > 2
    for contest, adam, phase in states:
        assert_same(contest.state_dict(), whole[0].state_dict())
        for side in SIDES:
            assert_same(adam[side].state_dict(), whole[1][side].state_dict())
        assert_same(phase, whole[2])


def test_two_processes_turn_at_the_same_step(tmp_path):
    script = tmp_path / "two.py"
    script.write_text(
        f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
import torch
from harmonict.alternating import Rules, begin_step, end_step, new_phase
from harmonict.train import Run
from test_alternating import game
run = Run(None, accelerator="cpu", devices=2, say=lambda line: None)
contest, adam, phase = game()
own = torch.tensor([0.999 if run.rank else 0.979])  # the mean is under 0.99: neither may think that D is done
begin_step(contest, adam, phase)
run._loops.append({{"step": 0}})
end_step(run, Rules(t_max=9, window=1), contest, adam, phase, own, torch.tensor([[0.0]]))
open({str(tmp_path)!r} + f"/rank{{run.rank}}", "w").write(f"{{phase['side']}} {{phase['scores'][0][0]:.4f}}")
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
    assert [(tmp_path / f"rank{n}").read_text() for n in (0, 1)] == ["D 0.9890"] * 2
