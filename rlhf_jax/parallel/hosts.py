"""Several processes that run one program, each with devices of its own: a multi-host run.

Every process goes through the same Python and dispatches the same compiled programs. The first one
alone writes reports, metrics and records; all share the working directory. With one process
nothing here does anything.
"""

import contextlib
import os
import re
import sys
from collections.abc import Iterator, Mapping
from typing import Any, NoReturn

import jax
import numpy as np
from jax.experimental import multihost_utils

from rlhf_jax.types import UserError

AUTO, NONE = "auto", "none"
# How gloo, NCCL and jax's coordination service say that somebody is gone.
LOST = re.compile(r"gloo|nccl|unavailable|deadline_exceeded|coordination|heartbeat", re.IGNORECASE)


def start(coordinator: str, count: int, index: int) -> None:
  """Joins the processes of one run; call it before anything asks jax for its devices.

  Args:
    coordinator: HOST:PORT of the first process; "none" runs alone; "auto" lets jax find out under
      SLURM, Open MPI, Kubernetes and on TPU pods, and runs alone elsewhere.
    count: processes of the run; read where `coordinator` is an address.
    index: which of them this is, from 0; read where `coordinator` is an address.

  Raises:
    UserError: the numbers do not fit together, or the others cannot be reached.
  """
  if coordinator == NONE or coordinator == AUTO and not scheduled(os.environ):
    return
  settings = {}
  if coordinator != AUTO:
    if not 0 <= index < count:
      raise UserError(
        f"arguments --processes={count} and --process={index}: each process has a number from 0 to "
        f"{max(count - 1, 0)}."
      )
    if not coordinator.rpartition(":")[2].isdigit():
      raise UserError(f"argument --coordinator={coordinator}: it is no HOST:PORT.")
    settings = {
      "coordinator_address": coordinator,
      "num_processes": count,
      "process_id": index,
      "cluster_detection_method": "deactivate",
    }
  try:
    jax.distributed.initialize(**settings)
  except (ValueError, RuntimeError) as error:
    raise UserError(
      f"the processes of this run did not find each other (coordinator {coordinator}): {error} "
      "Give each of them --coordinator=HOST:PORT --processes=N --process=I, or --coordinator=none "
      "to run alone."
    ) from error


def scheduled(environ: Mapping[str, str]) -> bool:
  """Whether a launcher that jax knows has started several processes, going by the environment."""
  several = lambda name: environ.get(name, "1") not in ("", "1")
  return (
    "SLURM_PROCID" in environ
    and several("SLURM_STEP_NUM_TASKS")
    or several("OMPI_COMM_WORLD_SIZE")
    or {"KUBERNETES_SERVICE_HOST", "JOB_COMPLETION_INDEX"} <= environ.keys()
    or "," in environ.get("TPU_WORKER_HOSTNAMES", "")
    or "MEGASCALE_COORDINATOR_ADDRESS" in environ
    or "JAX_COORDINATOR_ADDRESS" in environ
  )


def is_first() -> bool:
  """Whether this is the process that writes."""
  return jax.process_index() == 0


def wait(name: str) -> None:
  """All processes meet here; `name` says where, and must be the same everywhere."""
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices(name)


def agreed(value: int) -> int:
  """The first process's value, on all of them."""
  if jax.process_count() == 1:
    return int(value)
  return int(multihost_utils.broadcast_one_to_all(np.int32(value)))


@contextlib.contextmanager
def first_speaks() -> Iterator[None]:
  """What the body prints is seen once, not once a process."""
  if is_first():
    yield
    return
  with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
    yield


def is_lost(error: Exception) -> bool:
  """Whether `error` says that another process of the run is gone."""
  return (
    jax.distributed.is_initialized()
    and isinstance(error, jax.errors.JaxRuntimeError)
    and LOST.search(str(error)) is not None
  )


def leave(status: int, message: str) -> NoReturn:
  """Ends this process with a message.

  One of several does not wait for the others, which learn from its end that something is wrong.
  """
  sys.stderr.write(f"{message}\n")
  sys.stderr.flush()
  if jax.distributed.is_initialized():
    os._exit(status)
  sys.exit(status)


@contextlib.contextmanager
def first_goes_first(name: str) -> Iterator[None]:
  """The body runs in the first process, then in the others, which find what it left on disk."""
  if not is_first():
    wait(name)
  yield
  if is_first():
    wait(name)


def whole(tree: Any) -> Any:
  """NumPy copies of arrays, whole on every process wherever their pieces live."""
  fetch = lambda x: multihost_utils.process_allgather(x, tiled=True) if _is_spread(x) else x
  return jax.device_get(jax.tree.map(fetch, tree))


def _is_spread(x: Any) -> bool:
  """Whether pieces of `x` are out of this process's reach."""
  return isinstance(x, jax.Array) and not (x.is_fully_addressable or x.is_fully_replicated)
