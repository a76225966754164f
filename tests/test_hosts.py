"""How several processes are recognised, and how a process ends; `make matrix` runs them."""

import signal

import jax
import numpy as np
import pytest

from rlhf_jax.parallel import hosts
from rlhf_jax.training import checkpoint, loop, preemption
from rlhf_jax.types import UserError

SLURM = {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "4"}


@pytest.mark.parametrize(
  ("environ", "expected"),
  [
    ({}, False),
    (SLURM, True),
    (SLURM | {"SLURM_STEP_NUM_TASKS": "1"}, False),  # one task, or an interactive allocation
    ({"SLURM_NTASKS": "4"}, False),  # a batch script, outside srun
    ({"OMPI_COMM_WORLD_SIZE": "2"}, True),
    ({"OMPI_COMM_WORLD_SIZE": "1"}, False),
    ({"TPU_WORKER_HOSTNAMES": "localhost"}, False),
    ({"TPU_WORKER_HOSTNAMES": "10.0.0.1,10.0.0.2"}, True),
    ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, False),
    ({"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "0"}, True),
    ({"JAX_COORDINATOR_ADDRESS": "host:1234"}, True),
  ],
)
def test_a_launcher_of_several_processes_is_known_by_its_environment(environ, expected):
  assert bool(hosts.scheduled(environ)) == expected


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    (("host:1234", 2, 2), "--processes=2 and --process=2: each process has a number from 0 to 1"),
    (("host:1234", 2, -1), "--process=-1: each process has a number from 0 to 1"),
    (("host", 2, 0), "--coordinator=host: it is no HOST:PORT"),
  ],
)
def test_numbers_that_do_not_fit_are_an_error_before_anyone_is_called(arguments, message):
  with pytest.raises(UserError, match=message):
    hosts.start(*arguments)


def test_a_process_alone_waits_for_nobody_and_has_everything():
  hosts.start("none", 1, 0)
  hosts.wait("anywhere")
  assert hosts.is_first() and not jax.distributed.is_initialized()
  with hosts.first_goes_first("something"), hosts.first_speaks():
    pass
  found = hosts.whole({"x": jax.numpy.arange(3), "n": np.float32(2.0)})
  np.testing.assert_array_equal(found["x"], [0, 1, 2])
  assert isinstance(found["x"], np.ndarray) and found["n"] == 2.0
  assert not hosts.is_lost(jax.errors.JaxRuntimeError("Gloo all-reduce failed"))


@pytest.mark.parametrize(
  ("error", "expected"),
  [
    (
      jax.errors.JaxRuntimeError("UNKNOWN: Gloo all-reduce failed: Connection closed by peer"),
      True,
    ),
    (jax.errors.JaxRuntimeError("UNAVAILABLE: the coordination service has stopped"), True),
    (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 8 bytes"), False),
    (ValueError("Gloo"), False),
  ],
)
def test_only_what_says_that_a_process_is_gone_is_taken_for_it(error, expected, monkeypatch):
  monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
  assert hosts.is_lost(error) == expected


@pytest.fixture
def noticed():
  before = signal.getsignal(signal.SIGTERM)
  preemption.install()
  yield
  signal.signal(signal.SIGTERM, before)
  preemption._Notice.came = False


class Counter:
  def __init__(self, step):
    self.step = step


def test_a_loop_that_can_save_does_so_after_the_step_at_hand(noticed):
  saved, recorded = [], []

  def step(state, batch):
    if batch == 3:
      signal.raise_signal(signal.SIGTERM)
    return Counter(state.step + 1), {"loss": float(batch)}

  with pytest.raises(preemption.Preempted, match="after step 3 of 9, which is saved"):
    loop.run(
      step,
      Counter(0),
      range(1, 100),
      9,
      writers=[lambda step, metrics: recorded.append(step)],
      save=lambda step, state: saved.append((step, state.step)),
    )
  assert saved == [(3, 3)] and recorded == [1, 2, 3]


def test_a_notice_while_files_are_written_is_no_failed_write(noticed, monkeypatch, tmp_path):
  write = checkpoint.files.write_about
  noticed_and_written = lambda *args: (signal.raise_signal(signal.SIGTERM), write(*args))
  monkeypatch.setattr(checkpoint.files, "write_about", noticed_and_written)
  with pytest.raises(preemption.Preempted):
    checkpoint.save_params(tmp_path / "policy", {"x": np.zeros(2, np.float32)}, {})


def test_between_stages_the_notice_ends_the_process_at_once(noticed):
  with pytest.raises(preemption.Preempted, match="between training stages"):
    signal.raise_signal(signal.SIGTERM)
