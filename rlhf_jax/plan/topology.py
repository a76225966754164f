"""TPUs that are not here, for their compiler to compile for."""

import importlib.util
import os
from collections.abc import Sequence

import jax
from jax.experimental import topologies

from rlhf_jax.types import UserError

AXES = {"v5e": 2, "v5p": 3, "v6e": 2}  # of the torus that the chips of a slice form
HOST = (2, 2, 1)  # chips of a host along each axis
# What libtpu would else ask the machine for, in vain; and that it opens no chip, so another process
# may have it loaded.
SURROUNDINGS = {
  "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
  "TPU_SKIP_MDS_QUERY": "1",
  "TPU_ACCELERATOR_TYPE": "v5litepod-4",
  "TPU_WORKER_HOSTNAMES": "localhost",
  "TPU_WORKER_ID": "0",
}


def tpus(chip: str, count: int) -> Sequence[jax.Device]:
  """The devices of a slice of TPUs.

  Raises:
    UserError: the chip is no TPU that is known, there is no such slice, or libtpu is not installed.
  """
  if chip not in AXES:
    raise UserError(f"argument --compiler=tpu: --chip={chip} is none of {', '.join(AXES)}.")
  if count.bit_count() != 1:
    raise UserError(f"argument --devices={count}: a slice of TPUs has 1, 2, 4, 8, ... devices.")
  if importlib.util.find_spec("libtpu") is None:
    raise UserError(
      "argument --compiler=tpu: libtpu is not installed: pip install 'rlhf_jax[tpu]'; it needs no "
      "TPU."
    )
  os.environ.update(SURROUNDINGS)
  # What is compiled for chips that are elsewhere cannot be read back.
  jax.config.update("jax_enable_compilation_cache", False)
  shape = sides(count, AXES[chip])
  name = f"{chip}:{'x'.join(map(str, shape))}"
  host = HOST if count > 2 else (*shape, *(1,) * (3 - len(shape)))
  try:
    return topologies.get_topology_desc(
      platform="tpu", topology_name=name, chips_per_host_bounds=host
    ).devices
  except (RuntimeError, ValueError) as error:  # a JaxRuntimeError is a RuntimeError
    raise UserError(f"argument --compiler=tpu: libtpu has no slice {name}: {error}") from error


def sides(count: int, axes: int) -> tuple[int, ...]:
  """A power of two as a product of so many others, as equal as can be: 32 is 2 x 4 x 4, or 4 x 8.

  Of 4 in three axes, the last has 1, as a host has.
  """
  bits = count.bit_length() - 1
  if bits < axes:
    return tuple(2 if axis < bits else 1 for axis in range(axes))
  return tuple(2 ** ((bits + axis) // axes) for axis in range(axes))
