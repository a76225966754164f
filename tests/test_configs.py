"""The configs in `configs/`: each builds, and the papers' carry the papers' numbers."""

import math

import pytest

from rlhf_jax import config as config_lib
from rlhf_jax.experiment import ExperimentConfig
from rlhf_jax.networks import heads
from rlhf_jax.training import optim
from rlhf_jax.types import UserError

EVERY = (
  "configs/village.py",
  "configs/village.py:tiny",
  "configs/hh.py:smollm2",
  "configs/hh.py:small",
  "configs/paper.py:instructgpt",
  "configs/paper.py:nplus",
)


def build(name: str) -> ExperimentConfig:
  return config_lib.build(ExperimentConfig, config_lib.load(name, {}))


@pytest.mark.parametrize("name", EVERY)
def test_a_config_builds_and_survives_the_way_through_json(name):
  built = build(name)
  again = config_lib.build(ExperimentConfig, config_lib.to_dict(built))
  assert again == built


@pytest.mark.parametrize("name", ("village", "hh", "paper"))
def test_an_unknown_variant_is_named_with_those_that_exist(name):
  with pytest.raises(UserError, match="nothing_like_it.*use"):
    config_lib.load(f"configs/{name}.py:nothing_like_it", {})


def test_a_warm_up_longer_than_the_first_reward_model_is_found_before_anything_runs():
  config = config_lib.load("configs/hh.py:small", {"comparisons.prompts": "32"})
  with pytest.raises(UserError, match="warmup_steps 5 leaves none of the run's 2"):
    config_lib.build(ExperimentConfig, config)


@pytest.mark.conformance("A51", "A52", "A56", "A58")
def test_instructgpt_has_its_papers_numbers():
  ppo = build("configs/paper.py:instructgpt").ppo
  assert ppo.num_steps * ppo.rollout.batch_size == 256_000
  assert ppo.rollout.batch_size // ppo.minibatches == 64
  assert (ppo.epochs, ppo.kl.coef, ppo.kl.target, ppo.ema_decay) == (1, 0.02, None, 0.992)
  assert ppo.ptx_rows * ppo.updates == 8 * ppo.rollout.batch_size
  rate = optim.schedule(ppo.policy_optim, ppo.num_steps * ppo.updates)
  peak = ppo.policy_optim.learning_rate
  assert float(rate(0)) == pytest.approx(peak / 10)
  assert float(rate(80)) == float(rate(4_000)) == pytest.approx(peak)


@pytest.mark.conformance("A52", "A53")
def test_nplus_has_its_papers_numbers():
  ppo = build("configs/paper.py:nplus").ppo
  assert math.isclose(ppo.num_steps * ppo.rollout.batch_size, 1e6, rel_tol=1e-3)
  assert (ppo.epochs, ppo.minibatches, ppo.rollout.sampling.temperature) == (4, 1, 0.7)
  assert (ppo.missing_eos, ppo.missing_eos_penalty) == ("replace", 1.0)
  assert ppo.policy_optim.eps == 1e-5
  steps = ppo.num_steps * ppo.updates
  assert float(optim.schedule(ppo.policy_optim, steps)(steps - 1)) < 1e-3 * 3e-6


def test_smollm2s_frozen_blocks_are_shared_by_all_networks_of_the_run():
  config = build("configs/hh.py:smollm2")
  names = [f"trunk/block_{i}/mlp/up/kernel" for i in range(config.model.n_layers)]
  params = {"trunk": {"embed": {"embedding": 0}}}
  for name in names:
    params["trunk"][name.split("/")[1]] = {"mlp": {"up": {"kernel": 0}}}
  _, frozen = optim.split(params, config.ppo.frozen)
  trunk = params["trunk"]
  assert heads.shared_stem(config.model, [trunk, trunk], frozen["trunk"]) == 24
  assert config.sft.frozen == config.reward.frozen == config.ppo.frozen
