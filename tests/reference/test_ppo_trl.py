"""One whole iteration of PPO beside TRL's own PPOTrainer, run live on the same rollouts.

TRL samples nothing here: both sides are given the same responses. From there on each computes on
its own code log-probabilities, KL-shaped rewards, values, GAE, whitening, and three epochs of two
minibatches with AdamW on policy and critic. Compared are the metrics that both report, and every
weight of both networks at the end.

Three differences are set aside, and stated. The head of our critic has a bias, which is frozen at 0
here. TRL whitens with the unbiased variance, we with the biased one as lm-human-preferences does
(`test_advantages_reference.py` has the factor between them), so its `masked_var` is told
`unbiased=False`. And it shuffles with NumPy, which is given our order. Responses fill their length,
because TRL puts the score one past an EOS and we on it.
"""

import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
tokenizers = pytest.importorskip("tokenizers")
transformers = pytest.importorskip("transformers")
datasets = pytest.importorskip("datasets")
pytest.importorskip("trl")
with warnings.catch_warnings():
  warnings.simplefilter("ignore")  # "experimental"
  trl_ppo = pytest.importorskip("trl.experimental.ppo.ppo_trainer")

from rlhf_jax import config as config_lib  # noqa: E402
from rlhf_jax import ppo, ppo_config, rollout  # noqa: E402
from rlhf_jax.generation.decode import Completion  # noqa: E402
from rlhf_jax.networks import heads, hf_layout, likelihood  # noqa: E402
from rlhf_jax.training import optim  # noqa: E402
from rlhf_jax.types import PromptBatch  # noqa: E402

pytestmark = pytest.mark.reference

B, P, R, EPOCHS, MINIBATCHES = 16, 6, 9, 3, 2
TEMPERATURE, KL_COEF, LEARNING_RATE = 0.7, 0.15, 3e-3
PROMPT_LENGTHS = np.arange(B) % P + 1

OPTIM = {
  "learning_rate": LEARNING_RATE,
  "schedule": "constant",
  "warmup_steps": 0,
  "warmup_from": 0.0,
  "final_fraction": 1.0,
  "beta1": 0.9,
  "beta2": 0.999,
  "eps": 1e-4,  # large, so that Adam does not blow up the rounding of gradients near 0
  "weight_decay": 0.0,
  "clip_norm": None,
}
PPO = {
  "num_steps": 1,
  "epochs": EPOCHS,
  "minibatches": MINIBATCHES,
  "micro_batches": 2,
  "gamma": 0.97,
  "lam": 0.9,
  "cliprange": 0.15,
  "value_cliprange": 0.1,
  "vf_coef": 0.3,
  "whiten_rewards": False,
  "missing_eos": "keep",
  "missing_eos_penalty": 0.0,
  "ema_decay": 0.0,
  "kl": {"coef": KL_COEF, "target": None, "horizon": 1.0},
  "ptx": {"coef": 0.0, "ratio": 0.0, "sequence_length": 1},
  "rollout": {
    "batch_size": B,
    "micro_batches": 1,
    "prompt_length": P,
    "sampling": {
      "max_new_tokens": R,
      "temperature": TEMPERATURE,
      "top_k": 0,
      "top_p": 1.0,
      "stop": None,
      "compact_to": (),
      "cache_sizes": 1,
    },
  },
  "eval_every": 1,
  "frozen": (),
  "rules": (),
  "offload": (),
  "policy_optim": OPTIM,
  "value_optim": OPTIM,
}
SHARED_METRICS = {  # TRL's name: ours
  "objective/kl": "objective/kl",
  "objective/entropy": "objective/entropy",
  "objective/scores": "objective/scores",
  "objective/non_score_reward": "objective/non_score_reward",
  "objective/rlhf_reward": "objective/rlhf_reward",
  "policy/approxkl_avg": "policy/approxkl",
  "policy/clipfrac_avg": "policy/clipfrac",
  "policy/entropy_avg": "policy/entropy",
  "loss/policy_avg": "loss/policy",
  "loss/value_avg": "loss/value",
  "val/clipfrac_avg": "val/clipfrac",
  "val/ratio": "policy/ratio",
}


@pytest.fixture
def models(make_llama):
  """Four different networks, so that none can stand in for another unnoticed; one layer each."""
  kinds = {
    "policy": "CausalLM",
    "reference": "CausalLM",
    "reward": "SequenceClassification",
    "critic": "SequenceClassification",
  }
  return {
    name: make_llama(kind, seed=seed, num_hidden_layers=1)
    for seed, (name, kind) in enumerate(kinds.items())
  }


@pytest.fixture
def rows():
  """Left-padded prompts [B, P] and responses [B, R]; no pad (0), and EOS (2) at their ends only."""
  rng = np.random.default_rng(0)
  tokens = rng.integers(3, 40, (B, P + R))
  tokens[:, :P] *= np.arange(P)[None, :] >= P - PROMPT_LENGTHS[:, None]
  tokens[:, -1] = 2
  return tokens[:, :P], tokens[:, P:]


def our_iteration(import_llama, models, rows, whiten_rewards):
  """Metrics, stored tensors of policy and critic, and the order of the rows."""
  read = {name: import_llama(model) for name, model in models.items()}
  model_config, params = read["policy"][0], {name: read[name][1] for name in read}
  policy, scalar = heads.Policy(model_config), heads.ScalarNetwork(model_config)
  config = config_lib.build(ppo_config.PPOConfig, PPO | {"whiten_rewards": whiten_rewards})
  learner = ppo.make_learner(policy, scalar, config, stem_blocks=0)
  critic, bias = optim.split(params["critic"], (r"^score/bias$",))
  state = ppo.init(learner, params["policy"], critic, jax.random.key(0))
  prompts = PromptBatch(jnp.asarray(rows[0]), jnp.asarray(rows[0] != 0, jnp.float32))
  responses, ones = jnp.asarray(rows[1]), jnp.ones((B, R))

  @jax.jit
  def iterate(state, judges):
    sequences = jnp.concatenate([prompts.tokens, responses], axis=1)
    mask = jnp.concatenate([prompts.mask, ones], axis=1)
    of = likelihood.of_responses(policy, state.policy, sequences, mask, responses, TEMPERATURE)
    logprobs = of.logprobs
    completion = Completion(responses, ones, logprobs, finished=jnp.zeros((B,)))
    whole = optim.merge(state.critic, bias)
    how = rollout.Scoring(policy, scalar, TEMPERATURE, eos_id=2)
    seen = rollout.score(how, judges, whole, prompts, completion)
    return ppo.update(state, ({}, bias), seen, None, learner)

  judges = rollout.Judges(reference=params["reference"], reward=params["reward"])
  order = ppo.minibatch_order(ppo.keys(state)[1], config)
  state, metrics = iterate(state, judges)
  return metrics, state, np.asarray(order).reshape(EPOCHS, B)


def trl_arguments(folder, whiten_rewards):
  """The same numbers under TRL's names, and all that could write, log or use a GPU switched off."""
  return trl_ppo.PPOConfig(
    output_dir=str(folder),
    per_device_train_batch_size=B,
    num_mini_batches=MINIBATCHES,
    num_ppo_epochs=EPOCHS,
    total_episodes=B,
    response_length=R,
    temperature=TEMPERATURE,
    learning_rate=LEARNING_RATE,
    adam_epsilon=OPTIM["eps"],
    kl_coef=KL_COEF,
    cliprange=PPO["cliprange"],
    cliprange_value=PPO["value_cliprange"],
    vf_coef=PPO["vf_coef"],
    gamma=PPO["gamma"],
    lam=PPO["lam"],
    whiten_rewards=whiten_rewards,
    num_sample_generations=0,
    bf16=False,
    use_cpu=True,
    gradient_checkpointing=False,
    report_to="none",
    save_strategy="no",
    disable_tqdm=True,
  )


def make_tokenizer():
  """TRL wants one; of it only the ids of pad and EOS, and the side of the padding, are used."""
  vocabulary = {"<pad>": 0, "<unk>": 1, "<eos>": 2} | {f"w{i}": i for i in range(3, 40)}
  words = tokenizers.models.WordLevel(vocabulary, unk_token="<unk>")
  tokenizer = transformers.PreTrainedTokenizerFast(
    tokenizer_object=tokenizers.Tokenizer(words), pad_token="<pad>", eos_token="<eos>"
  )
  tokenizer.padding_side = "left"
  return tokenizer


def their_iteration(models, rows, order, whiten_rewards, folder, monkeypatch):
  """Runs TRL's `PPOTrainer.train` for one batch; returns what it logs. The models are changed."""
  tokenizer = make_tokenizer()
  responses = {tuple(prompt[prompt != 0]): response for prompt, response in zip(*rows)}

  def given_responses(model, queries, chunk, pad_id, generation_config):
    """What `batch_generation` returns: the sequences, and logits over the temperature."""
    drawn = [responses[tuple(query[query != 0].tolist())] for query in queries]
    sequences = torch.cat([queries, torch.tensor(np.array(drawn))], dim=1)
    logits = trl_ppo.forward(model, sequences, pad_id).logits[:, P - 1 : -1]
    return sequences, logits / generation_config.temperature

  # The data loader shuffles the rows, so our order is translated into places of its batch.
  places = []
  monkeypatch.setattr(trl_ppo, "batch_generation", given_responses)
  monkeypatch.setattr(trl_ppo, "masked_var", functools.partial(trl_ppo.masked_var, unbiased=False))
  collate = transformers.DataCollatorWithPadding(tokenizer)

  def remember(examples):
    places[:] = [row["row"] for row in examples]
    return collate([{"input_ids": row["input_ids"]} for row in examples])

  epochs = iter(order)
  shuffled = lambda size: np.array([places.index(row) for row in next(epochs)])
  prompts = [prompt[prompt != 0].tolist() for prompt in rows[0]]
  dataset = datasets.Dataset.from_dict({"input_ids": prompts, "row": list(range(B))})
  trainer = trl_ppo.PPOTrainer(
    args=trl_arguments(folder, whiten_rewards),
    processing_class=tokenizer,
    model=models["policy"],
    ref_model=models["reference"],
    reward_model=models["reward"],
    value_model=models["critic"],
    train_dataset=dataset,
    eval_dataset=dataset,
    data_collator=remember,
  )
  logged = {}
  monkeypatch.setattr(trainer, "log", logged.update)
  monkeypatch.setattr(np.random, "permutation", shuffled)
  trainer.train()
  return logged


@pytest.mark.conformance("A26", "A31", "A38", "A43", "A44", "A47", "A49")
@pytest.mark.parametrize("whiten_rewards", [False, True])
def test_an_iteration_ends_with_trls_metrics_and_trls_weights(
  import_llama, models, rows, whiten_rewards, tmp_path, monkeypatch, assert_close
):
  ours, state, order = our_iteration(import_llama, models, rows, whiten_rewards)
  before = {name: models[name].state_dict()["model.norm.weight"].clone() for name in models}
  theirs = their_iteration(models, rows, order, whiten_rewards, tmp_path, monkeypatch)
  assert_close(
    {name: float(ours[name]) for name in SHARED_METRICS.values()},
    {name: theirs[trl_name] for trl_name, name in SHARED_METRICS.items()},
    atol=1e-5,
    rtol=1e-5,
  )
  # The comparison means something only where clipping bit and both networks moved.
  assert 0.05 < ours["policy/clipfrac"] < 0.95 and 0.05 < ours["val/clipfrac"] < 0.95
  for name, params in (("policy", state.policy), ("critic", state.critic)):
    weights = {key: value.numpy() for key, value in models[name].state_dict().items()}
    tensors = hf_layout.disassemble(params)
    assert np.abs(weights["model.norm.weight"] - before[name].numpy()).max() > LEARNING_RATE
    assert_close(tensors, weights, atol=1e-5)
