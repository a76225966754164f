"""Schedules against hand tables, AdamW against NumPy, frozen parts, averages."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rlhf_jax.training import optim
from rlhf_jax.types import UserError

CONFIG = optim.OptimConfig(
  learning_rate=0.1,
  schedule="constant",
  warmup_steps=0,
  warmup_from=0.0,
  final_fraction=1.0,
  beta1=0.9,
  beta2=0.95,
  eps=1e-5,
  weight_decay=0.0,
  clip_norm=None,
)


def configured(**changes):
  return dataclasses.replace(CONFIG, **changes)


def rates(config, num_steps, steps):
  schedule = optim.schedule(config, num_steps)
  return np.array([float(schedule(step)) for step in steps])


def test_linear_schedule_equals_the_hand_table():
  # 0.1 falling to 0.02 over four steps: a fifth of the way from 1 to 0.2 each.
  config = configured(schedule="linear", final_fraction=0.2)
  np.testing.assert_allclose(
    rates(config, 4, range(6)), [0.1, 0.08, 0.06, 0.04, 0.02, 0.02], rtol=1e-6
  )


@pytest.mark.conformance("A52")
def test_ziegler_linear_schedule_is_all_but_zero_at_the_end():
  config = configured(schedule="linear", final_fraction=0.0)
  got = rates(config, 1000, [0, 500, 999, 1000])
  np.testing.assert_allclose(got, [0.1, 0.05, 0.0001, 0.0], rtol=1e-4, atol=1e-9)


def test_cosine_schedule_equals_the_hand_table():
  # InstructGPT: down to a tenth. At quarters (1 + cos(pi t)) / 2 is 1, .853553, .5, .146447, 0.
  config = configured(schedule="cosine", final_fraction=0.1)
  hand = 0.1 * (0.1 + 0.9 * np.array([1.0, 0.853553, 0.5, 0.146447, 0.0]))
  np.testing.assert_allclose(rates(config, 8, [0, 2, 4, 6, 8]), hand, rtol=1e-5)


@pytest.mark.conformance("A52")
def test_instructgpt_warmup_climbs_ten_steps_from_a_tenth_of_the_peak_and_stays():
  config = configured(warmup_steps=10, warmup_from=0.1)
  hand = [0.1 * (0.1 + 0.09 * step) for step in range(10)] + [0.1, 0.1]
  np.testing.assert_allclose(rates(config, 100, [*range(11), 99]), hand, rtol=1e-5)


def test_decay_begins_where_the_warmup_ends():
  config = configured(schedule="linear", warmup_steps=2, warmup_from=0.0, final_fraction=0.0)
  np.testing.assert_allclose(
    rates(config, 6, range(7)), [0.0, 0.05, 0.1, 0.075, 0.05, 0.025, 0.0], rtol=1e-6, atol=1e-9
  )


@pytest.mark.conformance("A52")
def test_a_constant_schedule_that_also_names_an_end_is_refused():
  with pytest.raises(UserError, match="final_fraction is 0.1; set it to 1.0"):
    configured(schedule="constant", final_fraction=0.1)


def test_a_warmup_as_long_as_the_run_is_refused():
  with pytest.raises(UserError, match="warmup_steps 10 leaves none of the run's 10"):
    optim.make(configured(warmup_steps=10), 10)


def numpy_adamw(theta, gradients, config, decayed):
  """Loshchilov & Hutter 2019, algorithm 2, eps outside the root, one step a line."""
  m, v, path = 0.0, 0.0, []
  for t, g in enumerate(gradients, start=1):
    m = config.beta1 * m + (1 - config.beta1) * g
    v = config.beta2 * v + (1 - config.beta2) * g * g
    m_hat, v_hat = m / (1 - config.beta1**t), v / (1 - config.beta2**t)
    step = m_hat / (np.sqrt(v_hat) + config.eps) + decayed * config.weight_decay * theta
    theta = theta - config.learning_rate * step
    path.append(theta)
  return np.array(path)


def follow(config, params, gradients):
  """The parameters after each step of the production optimiser."""
  optimizer = optim.make(config, len(gradients))
  state, path = optimizer.init(params), []
  for gradient in gradients:
    updates, state = optimizer.update(gradient, state, params)
    params = optax.apply_updates(params, updates)
    path.append(params)
  return path


def small_gradients(steps=5, shape=(3, 2)):
  """Around 1e-5, where an eps of 1e-5 decides half of the step."""
  return np.random.default_rng(0).normal(size=(steps, *shape)).astype(np.float32) * 1e-5


@pytest.mark.conformance("A53")
@pytest.mark.parametrize("eps", [1e-8, 1e-5])
def test_adamw_equals_a_numpy_loop(eps):
  config = configured(eps=eps, weight_decay=0.1)
  start, gradients = np.ones((3, 2), np.float32), small_gradients()
  path = follow(config, {"kernel": jnp.asarray(start)}, [{"kernel": g} for g in gradients])
  want = numpy_adamw(start.astype(np.float64), gradients.astype(np.float64), config, decayed=1.0)
  np.testing.assert_allclose([p["kernel"] for p in path], want, rtol=2e-6)


@pytest.mark.conformance("A53")
def test_the_first_step_has_pytorchs_eps_and_not_tensorflows():
  # One gradient g: PyTorch moves lr g / (g + eps), TensorFlow lr g / (g + eps / sqrt(1 - beta2)).
  g = eps = 1e-5
  config = configured(eps=eps)
  (after,) = follow(config, {"kernel": jnp.zeros(())}, [{"kernel": jnp.float32(g)}])
  tensorflow = 0.1 * g / (g + eps / np.sqrt(1 - config.beta2))
  np.testing.assert_allclose(after["kernel"], -0.1 * g / (g + eps), rtol=1e-4)
  assert abs(float(after["kernel"])) > 2 * tensorflow


def test_clipping_acts_on_the_gradient_before_adam_sees_it():
  # Adam's first step is lr g / (|g| + eps): at eps = 1 it shows the size of the clipped gradient.
  config = configured(eps=1.0, clip_norm=0.5)
  start = {"kernel": jnp.zeros(2)}
  (after,) = follow(config, start, [{"kernel": jnp.array([3.0, 4.0])}])
  np.testing.assert_allclose(after["kernel"], [-0.1 * 0.3 / 1.3, -0.1 * 0.4 / 1.4], rtol=1e-5)


def test_weight_decay_skips_norms_biases_and_embeddings():
  params = {
    "trunk": {
      "embed": {"embedding": jnp.ones((4, 2))},
      "layer_0": {"norm": {"scale": jnp.ones(2)}, "mlp": {"up": {"kernel": jnp.ones((2, 3))}}},
    },
    "score": {"kernel": jnp.ones((2, 1)), "bias": jnp.ones(1)},
  }
  config = configured(weight_decay=0.5)
  (after,) = follow(config, params, [jax.tree.map(jnp.zeros_like, params)])
  moved = {
    jax.tree_util.keystr(path, simple=True, separator="/")
    for path, leaf in jax.tree_util.tree_leaves_with_path(after)
    if not np.array_equal(leaf, np.ones_like(leaf))
  }
  assert moved == {"trunk/layer_0/mlp/up/kernel", "score/kernel"}
  np.testing.assert_allclose(after["score"]["kernel"], 1 - 0.1 * 0.5)


TREE = {
  "trunk": {"layer_0": {"kernel": 1.0}, "layer_1": {"kernel": 2.0, "bias": 3.0}},
  "lm_head": {"kernel": 4.0},
}


def test_merge_undoes_split_and_no_leaf_is_in_both():
  trainable, frozen = optim.split(TREE, (r"layer_0/", r"bias$"))
  assert frozen == {"trunk": {"layer_0": {"kernel": 1.0}, "layer_1": {"bias": 3.0}}}
  assert trainable == {"trunk": {"layer_1": {"kernel": 2.0}}, "lm_head": {"kernel": 4.0}}
  assert optim.merge(trainable, frozen) == TREE


def test_split_with_nothing_frozen_trains_all():
  assert optim.split(TREE, ()) == (TREE, {})
  assert optim.merge(*optim.split(TREE, ())) == TREE


def test_frozen_parameters_have_neither_gradient_nor_optimiser_state():
  params = jax.tree.map(jnp.float32, TREE)
  trainable, frozen = optim.split(params, (r"^trunk/",))
  total = lambda trainable: sum(jax.tree.leaves(optim.merge(trainable, frozen))) ** 2
  gradients = jax.grad(total)(trainable)
  assert jax.tree.structure(gradients) == jax.tree.structure({"lm_head": {"kernel": 0}})
  np.testing.assert_allclose(gradients["lm_head"]["kernel"], 20.0)  # 2 (1 + 2 + 3 + 4)
  state = optim.make(CONFIG, 3).init(trainable)
  assert len(jax.tree.leaves(state)) == 2 + 2  # m and v of one leaf, and two step counts


def test_a_regex_that_freezes_nothing_is_refused():
  with pytest.raises(UserError, match=r"'layer_7' matches none of the 4 parameters.*trunk/layer_0"):
    optim.split(TREE, (r"layer_0", r"layer_7"))


def test_freezing_everything_is_refused():
  with pytest.raises(UserError, match="nothing to train"):
    optim.split(TREE, (r"kernel", r"bias"))


def test_ema_equals_the_weighted_sum_of_its_history():
  # After n updates: decay^n start + (1 - decay) sum decay^(n - 1 - i) params_i.
  history = np.random.default_rng(2).normal(size=(4, 3)).astype(np.float32)
  ema = {"kernel": jnp.ones(3)}
  for params in history:
    ema = optim.ema_update(ema, {"kernel": jnp.asarray(params)}, 0.992)
  weights = 0.992 ** np.arange(3, -1, -1)
  want = 0.992**4 + 0.008 * (weights[:, None] * history).sum(0)
  np.testing.assert_allclose(ema["kernel"], want, rtol=1e-5)


def test_ema_of_bfloat16_parameters_moves_in_float32():
  ema = optim.ema_update({"kernel": jnp.float32(1.0)}, {"kernel": jnp.bfloat16(2.0)}, 0.992)
  assert ema["kernel"].dtype == jnp.float32
  np.testing.assert_allclose(ema["kernel"], 1.008, rtol=1e-6)
