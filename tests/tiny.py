"""A model small enough to compile in a second, with weights that are not: shared by the tests.

Fresh parameters give all but uniform logits, on which most mistakes would not show; `params` draws
them so large that logits differ by several nats and attention is far from uniform.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax import ppo_config, rollout
from rlhf_jax.generation.sampling import SamplingConfig
from rlhf_jax.networks import heads, hf_layout
from rlhf_jax.networks.config import ModelConfig
from rlhf_jax.training import checkpoint
from rlhf_jax.training.optim import OptimConfig
from rlhf_jax.types import PromptBatch

PAD, EOS = 0, 1
MODEL = ModelConfig(
  vocab_size=40,
  d_model=16,
  n_layers=2,
  n_heads=4,
  n_kv_heads=2,
  head_dim=4,
  d_ff=32,
  rope_base=100.0,
  norm_eps=1e-5,
  tie_embeddings=False,
  compute=hf_layout.COMPUTE,
)
POLICY = heads.Policy(MODEL)
SCALAR = heads.ScalarNetwork(MODEL)

OPTIM = OptimConfig(
  learning_rate=1e-2,
  schedule="constant",
  warmup_steps=0,
  warmup_from=1.0,
  final_fraction=1.0,
  beta1=0.9,
  beta2=0.95,
  eps=1e-5,
  weight_decay=0.0,
  clip_norm=None,
)
SAMPLING = SamplingConfig(
  max_new_tokens=6, temperature=1.0, top_k=0, top_p=1.0, stop=None, compact_to=(), cache_sizes=1
)
PPO = ppo_config.PPOConfig(
  num_steps=10,
  epochs=2,
  minibatches=2,
  micro_batches=1,
  gamma=1.0,
  lam=0.95,
  cliprange=0.2,
  value_cliprange=0.2,
  vf_coef=0.1,
  whiten_rewards=False,
  missing_eos="keep",
  missing_eos_penalty=0.0,
  ema_decay=0.0,
  kl=ppo_config.KLConfig(coef=0.05, target=None, horizon=10_000.0),
  ptx=ppo_config.PTXConfig(coef=0.0, ratio=0.0, sequence_length=8),
  rollout=rollout.RolloutConfig(batch_size=8, micro_batches=1, prompt_length=5, sampling=SAMPLING),
  eval_every=5,
  frozen=(),
  rules=(),
  offload=(),
  policy_optim=OPTIM,
  value_optim=OPTIM,
)


def changed(config, **changes):
  """A copy of a frozen config; `kl__coef=0.1` reaches the inner config `kl`."""
  flat, nested = {}, {}
  for name, value in changes.items():
    outer, _, inner = name.partition("__")
    if inner:
      nested.setdefault(outer, {})[inner] = value
    else:
      flat[name] = value
  flat |= {name: changed(getattr(config, name), **inner) for name, inner in nested.items()}
  return dataclasses.replace(config, **flat)


def params(network, seed: int):
  """Parameters of a network: norms' scales 1 plus noise, all else noise, of deviation 0.3."""
  rng = np.random.default_rng(seed)

  def draw(path, leaf):
    center = 1.0 if path[-1].key == "scale" else 0.0
    return jnp.asarray(center + 0.3 * rng.normal(size=leaf.shape), jnp.float32)

  shapes = jax.eval_shape(lambda: heads.init(network, jax.random.key(0)))
  return jax.tree_util.tree_map_with_path(draw, shapes)


def random_tokens(shape, seed: int) -> np.ndarray:
  """Ids that are neither PAD nor EOS."""
  return np.random.default_rng(seed).integers(2, MODEL.vocab_size, shape).astype(np.int32)


def left_padded(rows, length: int) -> PromptBatch:
  """Prompts [B, length] from lists of ids."""
  tokens, mask = np.full((len(rows), length), PAD, np.int32), np.zeros((len(rows), length))
  for i, row in enumerate(rows):
    tokens[i, length - len(row) :], mask[i, length - len(row) :] = row, 1.0
  return PromptBatch(jnp.asarray(tokens), jnp.asarray(mask, jnp.float32))


def right_padded(rows, length: int) -> tuple[jax.Array, jax.Array]:
  """Tokens and mask [B, length] from lists of ids."""
  batch = left_padded([row[::-1] for row in rows], length)
  return batch.tokens[:, ::-1], batch.mask[:, ::-1]


def mixed_prompts(batch: int, length: int, seed: int) -> PromptBatch:
  """Left-padded random prompts of 1, 2, ..., length, 1, ... tokens."""
  tokens = random_tokens((batch, length), seed)
  return left_padded([list(row[: i % length + 1]) for i, row in enumerate(tokens)], length)


def digest(tree) -> list[bytes]:
  """The bytes of every leaf, to prove that nothing changed."""
  return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


def assert_trees_close(actual, expected, **tolerance):
  """`np.testing.assert_allclose` on every leaf, naming the path that differs."""
  jax.tree_util.tree_map_with_path(
    lambda path, a, b: np.testing.assert_allclose(
      a, b, err_msg=jax.tree_util.keystr(path), **tolerance
    ),
    actual,
    expected,
  )


def checkpointer(directory, keep=5, keep_every=None, background=True):
  config = checkpoint.CheckpointConfig(keep, keep_every, background)
  return checkpoint.Checkpointer(directory, config)


def mesh(axes: tuple[int, int, int]) -> jax.sharding.Mesh:
  """data x fsdp x tensor, on the first devices."""
  types, devices = (jax.sharding.AxisType.Auto,) * 3, jax.devices()[: int(np.prod(axes))]
  return jax.make_mesh(axes, ("data", "fsdp", "tensor"), types, devices=devices)


def attention_inputs(shape, dtype=jnp.float32):
  """Query, key, value, segments of packed rows that end in padding, and a gradient of the output.

  `shape`: B, T, N, G, H.
  """
  B, T, N, G, H = shape
  rng = np.random.default_rng(T)
  draw = lambda *size: jnp.asarray(rng.normal(size=size), dtype)
  segments = np.sort(rng.integers(1, 4, (B, T)), axis=1)
  segments[:, T - T // 5 :] = 0
  segments = jnp.asarray(segments, jnp.int32)
  real = (segments > 0)[:, :, None, None]
  gradient = jnp.where(real, draw(B, T, N, H), 0.0).astype(dtype)
  return draw(B, T, N, H), draw(B, G, T, H), draw(B, G, T, H), segments, gradient
