"""Killed anywhere, the same command goes on and ends as if nothing had happened."""

import os
import random
import signal
import time

import pytest
import runs

KILLS = int(os.environ.get("RLHF_JAX_TEST_KILLS", "2"))
PATIENCE = 300.0  # seconds


def lines_written(workdir):
  """How far a run has come: training steps on record."""
  return sum(p.read_bytes().count(b"\n") for p in workdir.rglob("metrics.jsonl"))


def kill_after(process, workdir, lines, pause):
  """SIGKILL `pause` seconds after so many steps are on record; False where it ended before."""
  began = time.monotonic()
  while process.poll() is None and lines_written(workdir) < lines:
    assert time.monotonic() - began < PATIENCE
    time.sleep(0.02)
  time.sleep(pause)
  killed = process.poll() is None
  process.send_signal(signal.SIGKILL)
  process.communicate()
  return killed


def finish(process):
  _, errors = process.communicate(timeout=PATIENCE)
  assert process.returncode == 0, errors


@pytest.mark.slow
@pytest.mark.conformance("B24", "B25")
def test_a_run_killed_at_random_moments_ends_bit_for_bit_as_an_undisturbed_one(tmp_path):
  draw = random.Random(11)
  undisturbed, disturbed = tmp_path / "undisturbed", tmp_path / "disturbed"
  command = lambda workdir: runs.arguments(tmp_path / "data", workdir, ppo__ema_decay=0.9)
  finish(runs.start("chatgpt", *command(undisturbed)))
  steps = lines_written(undisturbed)
  # One moment in each of as many stretches of the run, so that kills meet different stages.
  stretches = [(i * steps // KILLS, (i + 1) * steps // KILLS) for i in range(KILLS)]
  moments = [(draw.randrange(*stretch), draw.uniform(0.0, 1.0)) for stretch in stretches]
  for lines, pause in moments:
    assert kill_after(runs.start("chatgpt", *command(disturbed)), disturbed, lines, pause)
  finish(runs.start("chatgpt", *command(disturbed)))
  expected, found = runs.results(undisturbed), runs.results(disturbed)
  assert found.keys() == expected.keys() and len(expected) >= 15
  assert not [name for name in expected if found[name] != expected[name]]
