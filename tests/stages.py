"""The hot path of every stage on a mesh, as plain arrays: for comparing meshes and processes.

Run as a script it is one of several processes on one box:

  python tests/stages.py COORDINATOR COUNT INDEX DATA FSDP TENSOR OUTPUT
"""

import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import tiny
from jax.sharding import Mesh

from rlhf_jax import ppo, reward, rollout, sft
from rlhf_jax.data import batches, packing
from rlhf_jax.generation import decode
from rlhf_jax.generation.sampling import Stops
from rlhf_jax.networks import heads
from rlhf_jax.parallel import hosts, rules
from rlhf_jax.parallel import mesh as mesh_lib
from rlhf_jax.parallel.mesh import MeshConfig
from rlhf_jax.training import optim
from rlhf_jax.types import TokenBatch

B, P, T = 16, 5, 24
AXES = ("data", "fsdp", "tensor")
MODEL = tiny.changed(tiny.MODEL, n_layers=1, n_heads=8, n_kv_heads=8)  # 8 ways along any axis
POLICY, SCALAR = heads.Policy(MODEL), heads.ScalarNetwork(MODEL)
# Adam divides by the root of v, so where a gradient is all but 0 its rounding would be blown up.
OPTIM = tiny.changed(tiny.OPTIM, eps=1e-2)
OPTIMIZER = optim.make(OPTIM, 10)
CONFIG = tiny.changed(
  tiny.PPO,
  rollout__batch_size=B,
  epochs=1,
  whiten_rewards=True,
  ema_decay=0.9,
  policy_optim=OPTIM,
  value_optim=OPTIM,
)


def one_device() -> Mesh:
  """A mesh of the first device alone."""
  return Mesh(np.array(jax.devices()[:1]).reshape(1, 1, 1), AXES)


@functools.cache
def networks():
  """Four different networks, so that none can stand in for another unnoticed."""
  judges = rollout.Judges(tiny.params(POLICY, 1), tiny.params(SCALAR, 2))
  return {"policy": tiny.params(POLICY, 0), "critic": tiny.params(SCALAR, 3), "judges": judges}


def fresh(name):
  """A copy to train: states are donated."""
  return jax.tree.map(jnp.copy, networks()[name])


def supervised(mesh, policy=POLICY, micro_batches=1, table=rules.TRANSFORMER):
  """`(compiled step, state, batch)` of SFT."""
  tokens, ones = tiny.random_tokens((B, 8), 1), np.ones((B, 8))
  places = np.tile(np.arange(8, dtype=np.int32), (B, 1))
  mask = (np.arange(8)[None, :] > np.arange(B)[:, None] % 5).astype(np.float32)
  batch = TokenBatch(tokens, ones.astype(np.int32), places, mask)
  state = rules.place(sft.init(tiny.params(policy, 0), OPTIMIZER), mesh, table)
  step = functools.partial(
    sft.step, frozen={}, policy=policy, optimizer=OPTIMIZER, micro_batches=micro_batches
  )
  return rules.compile_step(step, state, mesh, table), state, mesh_lib.put_batch(mesh, batch)


def ranked(mesh, micro_batches=1):
  """The same of the reward model: rows of up to two prompts with two or three answers."""
  rng = np.random.default_rng(2)
  ids = lambda length: tiny.random_tokens((length,), int(rng.integers(1_000)))
  group = lambda answers: packing.Group(
    ids(rng.integers(1, 4)),
    tuple(ids(rng.integers(1, 4)) for _ in range(answers)),
    tuple(rng.permutation(answers).tolist()),
  )
  rows = [
    packing.ranking_row(
      [group(2 + (i + m) % 2) for m in range(1 + i % 2)],
      max_tokens=T,
      max_prompts=2,
      max_responses=3,
      pad_id=tiny.PAD,
    )
    for i in range(B)
  ]
  state = rules.place(reward.init(fresh("critic"), OPTIMIZER), mesh)
  step = functools.partial(
    reward.step, frozen={}, network=SCALAR, optimizer=OPTIMIZER, micro_batches=micro_batches
  )
  batch = mesh_lib.put_batch(mesh, batches.stack(rows))
  return rules.compile_step(step, state, mesh), state, batch


def sample(policy, critic, judges, prompts, key):
  """Generation and scoring, one after the other."""
  completion = decode.generate(
    POLICY, policy, prompts, key, config=tiny.SAMPLING, stops=Stops((1, 2, 3)), pad_id=tiny.PAD
  )
  parts = (judges, critic, prompts, completion)
  return rollout.score(rollout.Scoring(POLICY, SCALAR, 1.0, tiny.EOS), *parts)


def rollouts(mesh):
  """A batch of rollouts."""
  placed = rules.place(networks(), mesh)
  prompts = mesh_lib.put_batch(mesh, jax.device_get(tiny.mixed_prompts(B, P, 0)))
  key = mesh_lib.put_replicated(mesh, jax.random.key(5))
  parts = (placed["policy"], placed["critic"], placed["judges"], prompts, key)
  return mesh_lib.jit(sample, mesh)(*parts)


def improved(mesh, micro_batches=1):
  """The compiled update of PPO and its state."""
  config = tiny.changed(CONFIG, micro_batches=micro_batches)
  learner = ppo.make_learner(POLICY, SCALAR, config, stem_blocks=0)
  start = ppo.init(learner, fresh("policy"), fresh("critic"), jax.random.key(5))
  state = rules.place(start, mesh)
  update = lambda state, seen: ppo.update(state, ({}, {}), seen, None, learner)
  return rules.compile_step(update, state, mesh), state


def results(mesh) -> dict[str, np.ndarray]:
  """Everything that the stages compute on a mesh, by path, whole on every process."""
  found = {}
  for name, (step, state, batch) in (("sft", supervised(mesh)), ("reward", ranked(mesh))):
    found[name] = step(state, batch)
  found["rollouts"] = seen = rollouts(mesh)
  step, state = improved(mesh)
  found["ppo"] = step(state, seen)
  return flat(found)


def flat(tree) -> dict[str, np.ndarray]:
  """Arrays by path; PRNG keys as their bits."""
  is_key = lambda x: jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
  bits = jax.tree.map(lambda x: jax.random.key_data(x) if is_key(x) else x, tree)
  leaves = jax.tree_util.tree_leaves_with_path(hosts.whole(bits))
  return {rules.path_name(path): leaf for path, leaf in leaves}


def main(coordinator, count, index, data, fsdp, tensor, output):
  hosts.start(coordinator, int(count), int(index))
  found = results(mesh_lib.make(MeshConfig(int(data), int(fsdp), int(tensor))))
  if hosts.is_first():
    np.savez(output, **found)
  hosts.wait("all is said")


if __name__ == "__main__":
  main(*sys.argv[1:])
