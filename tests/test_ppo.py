"""PPO from scores to updated networks: identities, one update in detail, and learning."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from rlhf_jax import ppo, rollout, sft
from rlhf_jax.generation import decode
from rlhf_jax.generation.sampling import Stops
from rlhf_jax.networks import heads
from rlhf_jax.rollout import Judges
from rlhf_jax.training import loop
from rlhf_jax.types import TokenBatch, UserError

B, P, R = 16, 5, 6
MODEL = tiny.changed(tiny.MODEL, n_layers=1)
POLICY, SCALAR = heads.Policy(MODEL), heads.ScalarNetwork(MODEL)
STOPS = (1, 2, 3)
CONFIG = tiny.changed(tiny.PPO, rollout__batch_size=B, ema_decay=0.75)


def make_learner(config):
  return ppo.make_learner(POLICY, SCALAR, config, stem_blocks=0)


LEARNER = make_learner(CONFIG)


@pytest.fixture(scope="module")
def networks():
  """Policy, reference, reward model and critic; the policy is the reference, as at the start."""
  policy = tiny.params(POLICY, 0)
  judges = Judges(reference=tiny.params(POLICY, 0), reward=tiny.params(SCALAR, 2))
  return {"policy": policy, "critic": tiny.params(SCALAR, 3), "judges": judges}


@pytest.fixture(scope="module")
def prompts():
  return tiny.mixed_prompts(B, P, 0)


@functools.cache
def sampler(temperature):
  """The compiled `(policy, critic, judges, prompts, key) -> Rollout`."""
  sampling = tiny.changed(tiny.SAMPLING, temperature=temperature)
  arguments = {"config": sampling, "stops": Stops(STOPS), "pad_id": tiny.PAD}

  @jax.jit
  def sample(policy, critic, judges, prompts, key):
    completion = decode.generate(POLICY, policy, prompts, key, **arguments)
    parts = (judges, critic, prompts, completion)
    return rollout.score(rollout.Scoring(POLICY, SCALAR, temperature, tiny.EOS), *parts)

  return sample


@pytest.fixture(scope="module")
def seen(networks, prompts):
  """A rollout of a policy that has moved away from its reference."""
  moved = jax.tree.map(lambda x: 0.9 * x, networks["policy"])
  return sampler(1.0)(moved, networks["critic"], networks["judges"], prompts, jax.random.key(0))


@functools.cache
def compiled_update(learner):
  """The compiled update of a learner that trains all parameters; the state is donated."""
  update = lambda state, seen: ppo.update(state, ({}, {}), seen, None, learner)
  return jax.jit(update, donate_argnums=0)


def first_state(networks, learner=LEARNER):
  """The state before the first batch, on copies of the policy and the critic."""
  copies = jax.tree.map(jnp.copy, (networks["policy"], networks["critic"]))
  return ppo.init(learner, *copies, jax.random.key(7))


@pytest.fixture(scope="module")
def updated(networks, seen):
  """The first state, the one after an update on `seen`, and the update's metrics."""
  after, metrics = compiled_update(LEARNER)(first_state(networks), seen)
  return first_state(networks), after, metrics


# Before any update.


@pytest.mark.conformance("A28", "B2")
@pytest.mark.parametrize("temperature", [0.5, 1.0])
def test_before_any_update_the_kl_is_0_and_the_ratio_1(networks, prompts, temperature):
  learner = make_learner(tiny.changed(CONFIG, rollout__sampling__temperature=temperature))
  policy, critic = networks["policy"], networks["critic"]
  fresh = sampler(temperature)(policy, critic, networks["judges"], prompts, jax.random.key(1))

  @jax.jit
  def measure(seen):
    batch = ppo.experience(learner.config, seen, jnp.float32(0.05))
    metrics = ppo.loss(learner, policy, critic, batch)[1]
    return metrics | ppo.rollout_metrics(batch, jnp.float32(0.05))

  metrics = measure(fresh)
  assert abs(metrics["objective/kl"]) < 1e-4
  assert abs(metrics["policy/ratio"] - 1.0) < 1e-4
  assert metrics["policy/ratio_var"] < 1e-8 and metrics["policy/approxkl"] < 1e-8
  assert metrics["policy/clipfrac"] == 0.0 and metrics["val/clipfrac"] == 0.0
  assert 0.0 < metrics["episode/eos_rate"] < 1.0  # lengths differ


@pytest.mark.conformance("B3")
@pytest.mark.parametrize("minibatches", [1, 4])
def test_with_learning_rate_0_the_ratio_stays_1(networks, prompts, minibatches):
  learner = dataclasses.replace(
    make_learner(tiny.changed(CONFIG, minibatches=minibatches)),
    policy_optimizer=optax.sgd(0.0),
    value_optimizer=optax.sgd(0.0),
  )
  parts = (networks["policy"], networks["critic"], networks["judges"], prompts)
  state = first_state(networks, learner)
  state, metrics = compiled_update(learner)(state, sampler(1.0)(*parts, jax.random.key(2)))
  assert abs(metrics["policy/ratio"] - 1.0) < 1e-5
  assert metrics["policy/ratio_var"] < 1e-9
  assert tiny.digest(state.policy) == tiny.digest(networks["policy"])


# Experience.


def numpy_experience(config, seen, kl_coef):
  """Advantages before whitening, and returns, of every row, by explicit loops."""
  raw = {name: np.asarray(getattr(seen, name), np.float64) for name in ("logprobs", "values")}
  ref, scores = np.asarray(seen.ref_logprobs, np.float64), np.asarray(seen.scores, np.float64)
  advantages, returns = np.zeros((2, B, R))
  for b in range(B):
    length = int(np.sum(np.asarray(seen.mask[b])))
    score = scores[b]
    if not seen.finished[b] and config.missing_eos == "replace":
      score = -config.missing_eos_penalty
    following_value = following = 0.0
    for t in reversed(range(length)):
      reward = -kl_coef * (raw["logprobs"][b, t] - ref[b, t]) + (score if t == length - 1 else 0.0)
      delta = reward + config.gamma * following_value - raw["values"][b, t]
      following = advantages[b, t] = delta + config.gamma * config.lam * following
      following_value = raw["values"][b, t]
      returns[b, t] = advantages[b, t] + raw["values"][b, t]
  return advantages, returns


compiled_experience = jax.jit(ppo.experience, static_argnums=0)


@pytest.mark.conformance("A33", "A44", "A45", "A48", "B12", "B20")
@pytest.mark.parametrize("rule", ["keep", "replace"])
def test_experience_equals_loops_from_scores_to_whitened_advantages(seen, rule):
  config = tiny.changed(CONFIG, missing_eos=rule, missing_eos_penalty=1.0, gamma=0.9)
  batch = compiled_experience(config, seen, jnp.float32(0.3))
  advantages, returns = numpy_experience(config, seen, 0.3)
  live = np.asarray(seen.mask) > 0
  whitened = (advantages - advantages[live].mean()) / np.sqrt(advantages[live].var() + 1e-8)
  np.testing.assert_allclose(batch.advantages, np.where(live, whitened, 0), rtol=1e-4, atol=1e-5)
  np.testing.assert_allclose(batch.returns, returns, rtol=1e-4, atol=1e-5)
  got = np.asarray(batch.advantages)[live]
  np.testing.assert_allclose([got.mean(), got.var()], [0.0, 1.0], atol=1e-5)


@pytest.mark.conformance("A47")
def test_reward_whitening_is_an_option_that_keeps_the_mean_reward(seen):
  # With gamma = lam = 1 and no values, the first return is the sum of a row's rewards.
  blank = seen.replace(values=jnp.zeros_like(seen.values))
  config = tiny.changed(CONFIG, lam=1.0)
  plain, whitened = (
    np.asarray(compiled_experience(c, blank, jnp.float32(0.3)).returns)
    for c in (config, tiny.changed(config, whiten_rewards=True))
  )
  live = np.asarray(seen.mask) > 0
  rewards = [
    np.where(live, x - np.pad(x, ((0, 0), (0, 1)))[:, 1:], 0)[live] for x in (plain, whitened)
  ]
  np.testing.assert_allclose(rewards[1].mean(), rewards[0].mean(), rtol=1e-3)
  np.testing.assert_allclose(rewards[1].var(), 1.0, rtol=1e-3)
  assert abs(rewards[0].var() - 1.0) > 0.05


@pytest.mark.conformance("B10", "B11")
@pytest.mark.parametrize("junk", [100.0, np.nan])
def test_values_and_logprobs_of_padding_change_no_advantage(seen, junk):
  names = ("values", "logprobs", "ref_logprobs")
  soil = lambda x: jnp.where(seen.mask > 0, x, junk)
  soiled = seen.replace(**{name: soil(getattr(seen, name)) for name in names})
  clean = compiled_experience(CONFIG, seen, jnp.float32(0.3))
  got = compiled_experience(CONFIG, soiled, jnp.float32(0.3))
  np.testing.assert_array_equal(got.advantages, clean.advantages)
  np.testing.assert_array_equal(got.returns, clean.returns)


@pytest.mark.conformance("B1", "B21")
def test_scores_of_0_and_of_fractions_reach_the_returns(seen):
  zero = seen.replace(values=0 * seen.values, ref_logprobs=seen.logprobs)
  scores = jnp.where(jnp.arange(B) % 2 == 0, 0.0, 0.7)
  returns = compiled_experience(
    tiny.changed(CONFIG, lam=1.0, missing_eos="replace", missing_eos_penalty=1.0),
    zero.replace(scores=scores, finished=jnp.ones(B)),
    jnp.float32(0.3),
  ).returns
  np.testing.assert_allclose(returns, scores[:, None] * seen.mask, rtol=1e-6)


# The loss.


@pytest.fixture(scope="module")
def gradients(networks, seen):
  """Gradients (policy's, critic's) of the loss with text, and of each of its parts alone."""
  tokens = tiny.random_tokens((2, 8), 9)
  ones = np.ones((2, 8))
  places = np.tile(np.arange(8, dtype=np.int32), (2, 1))
  text = TokenBatch(tokens, ones.astype(np.int32), places, ones.astype(np.float32))
  learner = make_learner(tiny.changed(CONFIG, ptx__coef=27.8, ptx__ratio=1.0))
  batch = compiled_experience(CONFIG, seen, jnp.float32(0.05))

  @jax.jit
  def compute(policy, critic):
    metrics = lambda *both: ppo.loss(learner, *both, batch)[1]
    parts = lambda *both: jnp.stack(
      [metrics(*both)[f"loss/{name}"] for name in ("policy", "value")]
    )
    of_policy, of_critic = jax.jacrev(parts, argnums=(0, 1))(policy, critic)
    return {
      "total": ppo.gradients(learner, (policy, critic), ({}, {}), batch, text)[0],
      "text": jax.grad(lambda policy: sft.loss(POLICY, policy, text)[0])(policy),
      "policy": jax.tree.map(lambda x: x[0], (of_policy, of_critic)),
      "value": jax.tree.map(lambda x: x[1], (of_policy, of_critic)),
    }

  return compute(networks["policy"], networks["critic"])


@pytest.mark.conformance("B16")
def test_a_minibatch_in_parts_has_the_gradients_and_figures_of_the_whole(networks, seen):
  tokens = tiny.random_tokens((4, 8), 9)
  places = np.tile(np.arange(8, dtype=np.int32), (4, 1))
  mask = (np.arange(8)[None, :] > 2 * np.arange(4)[:, None]).astype(np.float32)
  text = TokenBatch(tokens, np.ones((4, 8), np.int32), places, mask)
  batch = compiled_experience(CONFIG, seen, jnp.float32(0.05))
  assert len(set(np.sum(seen.mask, axis=1).tolist())) > 1  # so the mean of means is another one
  trainable = (tiny.params(POLICY, 8), networks["critic"])  # not the policy that sampled

  def run(parts):
    config = tiny.changed(CONFIG, ptx__coef=27.8, ptx__ratio=2.0, micro_batches=parts)
    whole = functools.partial(ppo.gradients, make_learner(config))
    return jax.jit(whole)(trainable, ({}, {}), batch, text)

  whole = run(1)
  assert whole[1]["policy/ratio_var"] > 1e-3
  for parts in (2, 4):
    tiny.assert_trees_close(run(parts), whole, rtol=1e-3, atol=1e-4)


def assert_zero(tree):
  assert all(np.all(np.asarray(leaf) == 0.0) for leaf in jax.tree.leaves(tree))


@pytest.mark.conformance("A57")
def test_the_ptx_gradient_is_the_ppo_gradient_plus_coef_times_the_lm_gradient(gradients):
  add = lambda ppo_part, lm_part: ppo_part + 27.8 * lm_part
  expected = jax.tree.map(add, gradients["policy"][0], gradients["text"])
  tiny.assert_trees_close(gradients["total"][0], expected, rtol=1e-4, atol=1e-5)
  assert optax.tree.norm(gradients["text"]) > 0.01
  assert optax.tree.norm(gradients["policy"][0]) > 0.01


@pytest.mark.conformance("A54")
def test_policy_and_critic_share_no_gradient(gradients):
  assert_zero(gradients["policy"][1])
  assert_zero(gradients["value"][0])
  scaled = jax.tree.map(lambda x: CONFIG.vf_coef * x, gradients["value"][1])
  tiny.assert_trees_close(gradients["total"][1], scaled, rtol=1e-4, atol=1e-7)
  assert optax.tree.norm(scaled) > 0.01


# Minibatches.


@pytest.mark.conformance("A51", "B27")
@pytest.mark.parametrize("epochs, minibatches", [(4, 1), (4, 2), (1, 8)])  # the last: InstructGPT
def test_every_row_comes_once_an_epoch_and_epochs_and_steps_differ(networks, epochs, minibatches):
  config = tiny.changed(CONFIG, epochs=epochs, minibatches=minibatches)
  state = first_state(networks)
  order = lambda step: np.asarray(
    ppo.minibatch_order(ppo.keys(state.replace(step=jnp.int32(step)))[1], config)
  )
  first = order(0)
  assert first.shape == (epochs * minibatches, B // minibatches)
  passes = first.reshape(epochs, B)
  np.testing.assert_array_equal(np.sort(passes, axis=1), np.tile(np.arange(B), (epochs, 1)))
  assert len({tuple(row) for row in passes.tolist()}) == epochs
  np.testing.assert_array_equal(order(0), first)
  assert np.any(order(1) != first)


def test_sampling_and_shuffling_use_different_keys_in_every_step(networks):
  state = first_state(networks)
  used = [ppo.keys(state.replace(step=jnp.int32(step))) for step in range(3)]
  raw = {tuple(np.asarray(jax.random.key_data(key))) for pair in used for key in pair}
  assert len(raw) == 6


# The update.


@pytest.mark.conformance("A58")
def test_the_ema_moves_by_one_minus_decay_towards_the_policy(updated):
  before, after, _ = updated
  expected = jax.tree.map(lambda old, new: 0.75 * old + 0.25 * new, before.ema, after.policy)
  tiny.assert_trees_close(after.ema, expected, rtol=1e-5, atol=1e-6)
  assert tiny.digest(after.ema) != tiny.digest(after.policy)


@pytest.mark.conformance("B28")
def test_a_step_is_a_batch_of_rollouts_and_optimisers_count_minibatches(updated):
  before, after, _ = updated
  assert (int(before.step), int(after.step)) == (0, 1)
  for opt_state in (after.policy_opt, after.critic_opt):
    counts = {int(x) for x in jax.tree.leaves(opt_state) if x.dtype == jnp.int32}
    assert counts == {CONFIG.epochs * CONFIG.minibatches}
  np.testing.assert_array_equal(*map(jax.random.key_data, (before.key, after.key)))


@pytest.mark.conformance("A41", "A54")
def test_a_donated_update_leaves_the_reference_and_the_reward_model_untouched(networks, seen):
  judges = networks["judges"]
  before = tiny.digest(judges)
  state = first_state({"policy": judges.reference, "critic": judges.reward})
  buffers = lambda tree: {leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(tree)}
  assert not buffers(state.ema) & buffers((state.policy, state.critic, judges))
  after, _ = compiled_update(LEARNER)(state, seen)
  assert tiny.digest(judges) == before
  for trained, kept in ((after.policy, judges.reference), (after.critic, judges.reward)):
    jax.tree.map(lambda a, b: np.testing.assert_(np.any(a != b)), trained, kept)


@pytest.mark.conformance("A64", "B9", "B26")
def test_rollout_metrics_equal_numpy_over_response_tokens(seen, updated):
  _, _, metrics = updated
  live = np.asarray(seen.mask) > 0
  k1 = np.where(live, seen.logprobs - seen.ref_logprobs, 0.0).sum(axis=1)
  _, returns = numpy_experience(CONFIG, seen, CONFIG.kl.coef)
  scores, values = np.asarray(seen.scores), np.asarray(seen.values)
  expected = {
    "objective/kl": k1.mean(),
    "objective/kl_stderr": k1.std() / np.sqrt(B),
    "objective/kl_coef": CONFIG.kl.coef,
    "objective/entropy": -np.where(live, seen.logprobs, 0.0).sum(axis=1).mean(),
    "objective/scores": scores.mean(),
    "objective/non_score_reward": -CONFIG.kl.coef * k1.mean(),
    "objective/rlhf_reward": scores.mean() - CONFIG.kl.coef * k1.mean(),
    "val/explained_var": 1.0 - (returns - values)[live].var() / returns[live].var(),
    "episode/length": live.sum(axis=1).mean(),
    "episode/eos_rate": np.asarray(seen.finished).mean(),
  }
  for name, value in expected.items():
    np.testing.assert_allclose(metrics[name], value, rtol=1e-3, atol=1e-5, err_msg=name)
  assert metrics["policy/entropy"] > 0.0 and metrics["policy/approxkl"] > 0.0
  figures = ppo.evaluate(seen)
  np.testing.assert_allclose(figures["eval/kl"], k1.mean(), rtol=1e-4)
  np.testing.assert_allclose(figures["eval/scores_stderr"], scores.std() / 4.0, rtol=1e-4)


@pytest.mark.conformance("B29")
def test_a_nan_score_stops_the_run(networks, seen):
  broken = seen.replace(scores=seen.scores.at[3].set(jnp.nan))
  _, metrics = compiled_update(LEARNER)(first_state(networks), broken)
  with pytest.raises(loop.NonFiniteError, match="training stopped"):
    loop.finite_guard(lambda: "step 0")(1, {name: float(x) for name, x in metrics.items()})


@pytest.mark.conformance("B30")
def test_an_empty_response_carries_no_weight_in_the_update(networks, seen):
  # Row 0 without a token, twice, with different scores and values: the same networks come out.
  blank = lambda x, fill: x.at[0].set(fill)
  empty = seen.replace(mask=blank(seen.mask, 0.0))
  update = compiled_update(LEARNER)
  first, metrics = update(first_state(networks), empty)
  other = empty.replace(scores=blank(seen.scores, 50.0), values=blank(seen.values, 9.0))
  second, _ = update(first_state(networks), other)
  assert tiny.digest((first.policy, first.critic)) == tiny.digest((second.policy, second.critic))
  assert all(np.isfinite(x) for x in metrics.values())


# The KL coefficient.


ADAPTIVE = tiny.changed(CONFIG, kl__target=6.0, kl__horizon=10_000.0)


@pytest.mark.conformance("A55", "B26")
@pytest.mark.parametrize(
  "kl, error", [(6.0, 0.0), (6.6, 0.1), (5.4, -0.1), (60.0, 0.2), (-3.0, -0.2), (0.0, -0.2)]
)
def test_the_adaptive_coefficient_moves_by_the_clipped_relative_error(kl, error):
  got = ppo.next_kl_coef(ADAPTIVE, jnp.float32(0.15), jnp.float32(kl))
  np.testing.assert_allclose(got, 0.15 * (1.0 + error * B / 10_000), rtol=1e-6)


@pytest.mark.conformance("A55")
def test_the_adaptive_coefficient_of_a_thousand_episodes_moves_by_two_percent():
  config = tiny.changed(ADAPTIVE, rollout__batch_size=1024)
  got = ppo.next_kl_coef(config, jnp.float32(0.1), jnp.float32(100.0))
  np.testing.assert_allclose(got, 0.1 * 1.02048, rtol=1e-6)


@pytest.mark.conformance("A56")
def test_a_fixed_coefficient_stays(updated):
  _, after, _ = updated
  assert after.kl_coef == jnp.float32(CONFIG.kl.coef)
  assert ppo.next_kl_coef(CONFIG, jnp.float32(0.05), jnp.float32(1e6)) == jnp.float32(0.05)


@pytest.mark.conformance("A52")
def test_the_schedule_spans_all_minibatches_of_the_run():
  config = tiny.changed(
    CONFIG, num_steps=5, policy_optim__schedule="linear", policy_optim__final_fraction=0.0
  )
  optimizer, weight = make_learner(config).policy_optimizer, {"kernel": jnp.zeros(())}

  def move(opt_state, _):
    updates, opt_state = optimizer.update({"kernel": jnp.ones(())}, opt_state, weight)
    return opt_state, -updates["kernel"]

  # Adam's step on a constant gradient is the learning rate itself.
  _, rates = jax.lax.scan(move, optimizer.init(weight), None, length=config.updates * 5)
  np.testing.assert_allclose(rates, 1e-2 * (1.0 - np.arange(20) / 20), rtol=1e-3)


# Configuration.


def test_minibatches_must_divide_the_batch():
  with pytest.raises(UserError, match="batch_size 16 is not divisible by minibatches 3"):
    tiny.changed(CONFIG, minibatches=3)


@pytest.mark.conformance("A57")
def test_ptx_ratio_counts_pretraining_rows_an_episode():
  config = tiny.changed(CONFIG, ptx__coef=27.8, ptx__ratio=8.0)  # InstructGPT, appendix C.4
  assert config.ptx_rows * config.updates == 8 * B
  assert CONFIG.ptx_rows == 0
  with pytest.raises(UserError, match="gives no row to any of the 4 optimiser steps"):
    tiny.changed(CONFIG, ptx__coef=1.0, ptx__ratio=0.01)


# Learning: the score is the share of response tokens with an even id.


@jax.jit
def even(seen):
  """The share of response tokens with an even id, in each row and in all."""
  hits = jnp.where(seen.mask > 0, 1.0 - seen.responses % 2, 0.0)
  return jnp.sum(hits, axis=1) / jnp.sum(seen.mask, axis=1), jnp.sum(hits) / jnp.sum(seen.mask)


@pytest.fixture(scope="module")
def learn(networks, prompts):
  """`(sign, kl_coef) -> (share before, share after, KL)` of 15 steps of PPO."""
  sample, update = sampler(1.0), compiled_update(LEARNER)

  def run(sign, kl_coef):
    state, history = first_state(networks).replace(kl_coef=jnp.float32(kl_coef)), []
    for _ in range(15):
      parts = (state.policy, state.critic, networks["judges"], prompts)
      seen = sample(*parts, ppo.keys(state)[0])
      scores, share = even(seen)
      state, metrics = update(state, seen.replace(scores=sign * scores))
      history.append((float(share), float(metrics["objective/kl"])))
    share, kl = np.array(history).T
    return share[0], share[-4:].mean(), kl[-4:].mean()

  return run


@pytest.mark.conformance("A42")
def test_ppo_raises_rewarded_tokens_a_flipped_sign_lowers_them_a_large_kl_coef_stops_it(learn):
  before, raised, kl = learn(sign=1.0, kl_coef=0.0)
  assert raised > before + 0.25
  _, lowered, _ = learn(sign=-1.0, kl_coef=0.0)
  assert lowered < before - 0.25
  _, restrained, restrained_kl = learn(sign=1.0, kl_coef=10.0)
  assert abs(restrained - before) < 0.15
  # Not 0: Adam's first steps are as long as the learning rate, whatever the gradient.
  assert restrained_kl < 0.7 * kl
