"""Killed anywhere, the same command goes on and ends as if nothing had happened."""

import os
import random
import re
import signal
import time

import pytest
import runs

from rlhf_jax import launch

KILLS = int(os.environ.get("RLHF_JAX_TEST_KILLS", "2"))
PATIENCE = 300.0  # seconds


def lines_written(workdir):
  """How far a run has come: training steps on record."""
  while True:
    try:
      return sum(p.read_bytes().count(b"\n") for p in workdir.rglob("metrics.jsonl"))
    except FileNotFoundError:  # a folder was renamed while it was looked through
      continue


def end_after(process, workdir, lines, pause, how=signal.SIGKILL):
  """Sends a signal `pause` seconds after so many steps are on record.

  Returns what the process said on stderr; None where it had ended before.
  """
  began = time.monotonic()
  while process.poll() is None and lines_written(workdir) < lines:
    assert time.monotonic() - began < PATIENCE
    time.sleep(0.02)
  time.sleep(pause)
  was_alive = process.poll() is None
  process.send_signal(how)
  _, errors = process.communicate(timeout=PATIENCE)
  return errors if was_alive else None


def finish(process):
  _, errors = process.communicate(timeout=PATIENCE)
  assert process.returncode == 0, errors


@pytest.fixture(scope="module")
def command(tmp_path_factory):
  """`command(workdir, **changes)`: the arguments of a run."""
  data = tmp_path_factory.mktemp("data")
  offload = ("judges", "optimizers")
  return lambda workdir, **changes: runs.arguments(
    data, workdir, ppo__ema_decay=0.9, ppo__offload=offload, **changes
  )


@pytest.fixture(scope="module")
def undisturbed(command, tmp_path_factory):
  """How the run ends, and after how many training steps."""
  workdir = tmp_path_factory.mktemp("undisturbed")
  finish(runs.start("chatgpt", *command(workdir)))
  return runs.results(workdir), lines_written(workdir)


def assert_ends_alike(workdir, expected):
  found = runs.results(workdir)
  assert found.keys() == expected.keys() and len(expected) >= 15
  assert not [name for name in expected if found[name] != expected[name]]


@pytest.mark.slow
@pytest.mark.conformance("B24", "B25")
def test_a_run_killed_at_random_moments_ends_bit_for_bit_as_an_undisturbed_one(
  command, undisturbed, tmp_path
):
  draw, steps = random.Random(11), undisturbed[1]
  # One moment in each of as many stretches of the run, so that kills meet different stages.
  stretches = [(i * steps // KILLS, (i + 1) * steps // KILLS) for i in range(KILLS)]
  moments = [(draw.randrange(a, max(b, a + 1)), draw.uniform(0.0, 1.0)) for a, b in stretches]
  for lines, pause in moments:
    assert end_after(runs.start("chatgpt", *command(tmp_path)), tmp_path, lines, pause) is not None
  finish(runs.start("chatgpt", *command(tmp_path)))
  assert_ends_alike(tmp_path, undisturbed[0])


@pytest.mark.slow
@pytest.mark.conformance("B24", "B25")
def test_a_run_told_to_end_saves_asks_to_be_started_again_and_goes_on(
  command, undisturbed, tmp_path
):
  process = runs.start("chatgpt", *command(tmp_path))
  said = end_after(process, tmp_path, 1, 0.0, signal.SIGTERM)
  assert process.returncode == launch.REQUEUE, said
  step = int(re.search(r"SIGTERM: stopped after step (\d+) of 8, which is saved", said)[1])
  assert (tmp_path / "sft/checkpoints" / str(step)).is_dir()
  assert len((tmp_path / "sft/metrics.jsonl").read_text().splitlines()) == step
  finish(runs.start("chatgpt", *command(tmp_path)))
  assert_ends_alike(tmp_path, undisturbed[0])


@pytest.mark.matrix
@pytest.mark.conformance("B24", "B25")
def test_two_processes_of_which_one_is_killed_go_on_and_end_as_one_process_does(command, tmp_path):
  # Several processes never decode in one group, so for equal bits one must not either.
  alike, alone = {"model__compute__panels": "always"}, tmp_path / "alone"
  workdir = tmp_path / "together"

  def start():
    port = runs.free_port()
    several = lambda i: (f"--coordinator=localhost:{port}", "--processes=2", f"--process={i}")
    return [
      runs.start("chatgpt", *command(workdir, **alike), *several(i), devices=1) for i in range(2)
    ]

  first, second = start()
  assert end_after(second, workdir, 3, 0.0) is not None
  _, said = first.communicate(timeout=PATIENCE)
  assert first.returncode == launch.REQUEUE and "another process of this run has died" in said
  for process in start():
    finish(process)
  finish(runs.start("chatgpt", *command(alone, **alike)))
  assert_ends_alike(workdir, runs.results(alone))
