"""SIGTERM, which schedulers send before they take a machine away.

A training loop finishes its step, saves and raises `Preempted`; elsewhere it is raised at once, and
the phase that was cut off is done again. `launch.run` turns it into an exit status that asks to be
started again. Of several processes, all stop after the same step: jax's preemption service agrees
on one when any of them gets the signal.
"""

import contextlib
import signal
from collections.abc import Iterator

import jax
from jax.experimental import multihost_utils


class Preempted(BaseException):
  """The process was told to end; the message says where its work stands.

  No Exception, like KeyboardInterrupt: whoever handles errors of his own must not take it for one.
  """


class _Notice:
  """Whether SIGTERM has come, and whether a training loop will look."""

  came = False
  watched = False


def install() -> None:
  """Makes SIGTERM a notice instead of an end. Several processes leave the signal to jax."""
  if not jax.distributed.is_initialized():
    _Notice.came = False
    signal.signal(signal.SIGTERM, _receive)


@contextlib.contextmanager
def watching() -> Iterator[None]:
  """The body asks `is_due` after each of its steps; SIGTERM does not interrupt it."""
  _Notice.watched = True
  try:
    yield
  finally:
    _Notice.watched = False


def is_due(step: int) -> bool:
  """Whether to save and stop after this step."""
  if jax.distributed.is_initialized():
    return multihost_utils.reached_preemption_sync_point(step)
  return _Notice.came


def _receive(signum: int, frame: object) -> None:
  _Notice.came = True
  if not _Notice.watched:
    raise Preempted("between training stages")
