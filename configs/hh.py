"""The same recipe on real dialogues: Anthropic's HH-RLHF, with people's comparisons as the start.

  python experiments/chatgpt.py --config=configs/hh.py:smollm2 --workdir=runs/hh
  python experiments/chatgpt.py --config=configs/hh.py:small --workdir=runs/hh_small

Data and weights are looked for in the folders that the environment variables RLHF_JAX_DATA and
RLHF_JAX_WEIGHTS name ("data" and "weights" without them); docs/data.md says how to fill these.

Arguments: `smollm2` starts from SmolLM2-135M-Instruct and trains its upper blocks (an hour on two
CPU cores); `small` trains a small model from scratch (a quarter of an hour).

Comparisons of a policy's own answers are ranked by a reward model that was fitted to people's
comparisons, in the place of people: the synthetic setup of Gao et al. 2022.
"""

import os
import pathlib

from ml_collections import ConfigDict

DATA = pathlib.Path(os.environ.get("RLHF_JAX_DATA", "data"))
WEIGHTS = pathlib.Path(os.environ.get("RLHF_JAX_WEIGHTS", "weights"))


def get_config(arg: str = "") -> ConfigDict:
  """The config named by `arg`, "smollm2" or "small"."""
  if arg == "smollm2":
    return smollm2()
  if arg == "small":
    return small()
  raise ValueError(f"configs/hh.py has no variant {arg!r}; use 'smollm2' or 'small'.")


def smollm2() -> ConfigDict:
  config = common()
  gguf = str(WEIGHTS / "SmolLM2-135M-Instruct.Q4_1.gguf")
  config.text = dict(template="chatml", tokenizer=gguf, vocab_size=1, on_too_long="skip")
  config.pretrained = gguf
  # Helpfulness alone: the harmless half prefers the opposite in places, and from a thousand pairs
  # of both this model learnt neither (held-out accuracy 0.52; 0.62 from a thousand of these).
  config.data.hh_rlhf.paths = files("hh-rlhf/helpful-base.jsonl.gz")
  config.model = dict(  # as its checkpoint says
    vocab_size=49_152,
    d_model=576,
    n_layers=30,
    n_heads=9,
    n_kv_heads=3,
    head_dim=64,
    d_ff=1_536,
    rope_base=100_000.0,
    norm_eps=1e-5,
    tie_embeddings=True,
    compute=compute(logit_columns=16),
  )
  # A CPU trains the upper blocks only. The blocks below are the same in policy, reference, critic
  # and reward model, so PPO runs them once a rollout.
  lower_24 = (r"trunk/embed/", r"trunk/block_(\d|1\d|2[0-3])/")
  lower_18 = (r"trunk/embed/", r"trunk/block_(\d|1[0-7])/")
  config.sft.update(frozen=lower_24, num_steps=60, batch_size=8, sequence_length=160, eval_every=20)
  config.sft.optim.update(learning_rate=1e-4)
  config.reward.update(frozen=lower_24, batch_size=4, sequence_length=228, eval_every=30)
  config.reward.optim.update(learning_rate=2e-4)
  config.gold_model = config.reward.copy_and_resolve_references()
  config.gold_model.update(
    eval_every=1_000,
    frozen=lower_18,
    max_train=1_500,
    max_heldout=None,
    batch_size=8,
    max_prompts=3,
    max_responses=2,
    sequence_length=192,
  )
  config.gold_model.optim.update(learning_rate=1e-4)
  config.ppo.update(frozen=lower_24, num_steps=12, eval_every=6)
  config.ppo.policy_optim.update(learning_rate=1e-4)
  config.ppo.value_optim.update(learning_rate=5e-4)
  config.evaluation.update(prompts=48)
  return config


def small() -> ConfigDict:
  config = common()
  config.text = dict(template="plain", tokenizer="train", vocab_size=2_048, on_too_long="skip")
  config.pretrained = None
  config.model = dict(
    vocab_size=2_048,
    d_model=128,
    n_layers=4,
    n_heads=4,
    n_kv_heads=4,
    head_dim=32,
    d_ff=384,
    rope_base=10_000.0,
    norm_eps=1e-5,
    tie_embeddings=True,
    compute=compute(logit_columns=None),
  )
  config.sft.update(num_steps=400, batch_size=16, sequence_length=192, eval_every=100)
  config.sft.optim.update(learning_rate=2e-3, warmup_steps=40)
  config.reward.update(batch_size=8, sequence_length=228, eval_every=50)
  config.reward.optim.update(learning_rate=5e-4)
  config.gold_model = config.reward.copy_and_resolve_references()
  config.gold_model.update(max_responses=2, sequence_length=256, max_train=2_000)
  config.comparisons.update(prompts=1_000, heldout_prompts=100, batch_size=256)
  config.ppo.update(num_steps=40)
  config.ppo.kl.update(coef=0.2)  # at 0.02 it drifted 35 nats in a round, here 16
  config.ppo.rollout.update(batch_size=64)
  config.ppo.policy_optim.update(learning_rate=2e-4)
  config.evaluation.update(prompts=128)
  return config


def common() -> ConfigDict:
  """What both share; sizes and rates are set above."""
  config = ConfigDict()
  config.seed = 0
  config.rounds = 2
  config.mesh = dict(data=-1, fsdp=1, tensor=1)
  config.data = data()

  config.sft = dict(
    num_steps=1,
    batch_size=1,
    micro_batches=1,
    sequence_length=1,
    supervise="all",
    pretraining_share=0.1,  # InstructGPT, appendix C.3
    max_heldout=64,
    judge=None,
    eval_every=1,
    frozen=(),
    optim=optim(1e-4, "cosine", final_fraction=0.1, warmup_steps=10),
  )

  sampling = dict(
    max_new_tokens=32, temperature=1.0, top_k=0, top_p=1.0, stop=None, compact_to=(), cache_sizes=1
  )
  config.comparisons = dict(
    prompts=128,
    responses=4,  # K; InstructGPT: 4 to 9
    include_original=False,
    include_recorded=False,
    heldout_prompts=32,
    batch_size=32,
    prompt_length=96,
    sampling=sampling,
  )
  config.gold = "reward_model"
  config.labeler = "simulated"  # or "store": people
  config.labelers = labelers()
  config.store = dict(
    url="feedback.db",  # or postgresql://USER@HOST/NAME
    overlap=1,  # InstructGPT's comparisons are by one person each
    wait="wait",  # for all rankings, or "take" those that are there
    earlier=True,
    fewest=1,
    poll_seconds=5.0,
    timeout_hours=None,
  )
  config.reward = dict(
    num_epochs=1,  # InstructGPT, appendix C.2: more overfits
    max_train=None,
    max_heldout=64,
    batch_size=1,  # rows
    micro_batches=1,
    max_prompts=2,
    max_responses=4,
    sequence_length=1,
    eval_every=1,
    frozen=(),
    optim=optim(1e-4, "cosine", final_fraction=0.1, warmup_steps=5),
  )
  config.ppo = ppo(sampling)
  config.evaluation = dict(prompts=64, examples=12)
  config.checkpoints = dict(keep=2, keep_every=None, background=True)
  config.profile = dict(first_step=None, num_steps=2, operations=10)
  return config


def data() -> dict:
  """People's comparisons, instructions for SFT, text for PPO-ptx."""
  return dict(
    prepare=dict(data_dir="~/.cache/rlhf_jax/data", heldout_fraction=0.1, split_seed=0),
    village=None,
    hh_rlhf=dict(
      paths=files("hh-rlhf/helpful-base.jsonl.gz", "hh-rlhf/harmless-base.jsonl.gz"),
      on_malformed="skip",  # a few pairs have no common prompt
    ),
    open_assistant=None,
    instructions=dict(  # written for a model that follows instructions, rewritten as dialogues
      paths=files("instructions/instruction-data.json.gz", "dolly-open-qa/open_qa.jsonl.gz"),
      on_malformed="skip",
    ),
    jsonl=None,
    text=dict(
      paths=files("text/wikitext-2-valid.txt.gz"), on_malformed="error", document_chars=2_000
    ),
    weights=dict(hh_rlhf=0.6, instructions=0.4, text=1.0),
    prompts_from=("comparison",),
  )


def labelers() -> dict:
  """One who always says what the gold reward model says (Gao et al. 2022)."""
  return dict(
    seed=0,
    labelers=1,
    noise=0.0,
    disagreement=0.0,
    length_bias=0.0,
    tie_margin=0.0,
    flip_rate=0.0,
  )


def compute(logit_columns: int | None) -> dict:
  """How networks are computed on a CPU."""
  return dict(
    dtype="float32",
    scan_layers=False,
    remat=False,
    logit_columns=logit_columns,
    attention="auto",
    panels="auto",
  )


def ppo(sampling: dict) -> dict:
  """Sized for a CPU: few large updates, hence a KL coefficient above InstructGPT's 0.02."""
  return dict(
    num_steps=1,
    epochs=2,
    minibatches=2,
    micro_batches=1,
    gamma=1.0,
    lam=0.95,
    cliprange=0.2,
    value_cliprange=0.2,
    vf_coef=0.1,
    whiten_rewards=False,
    missing_eos="keep",  # answers are cut at 32 tokens, so most do not end
    missing_eos_penalty=1.0,
    ema_decay=0.0,
    kl=dict(coef=0.1, target=None, horizon=10_000.0),  # N+: 0.05; Ziegler et al.: 0.15
    ptx=dict(coef=0.0, ratio=1.0, sequence_length=128),
    rollout=dict(batch_size=32, micro_batches=1, prompt_length=96, sampling=sampling),
    eval_every=10,
    frozen=(),
    rules=(),
    offload=(),
    policy_optim=optim(5e-5, "linear", final_fraction=0.0, warmup_steps=2),
    value_optim=optim(2e-4, "linear", final_fraction=0.0, warmup_steps=2),
  )


def files(*names: str) -> tuple[str, ...]:
  """Paths below the data folder."""
  return tuple(str(DATA / name) for name in names)


def optim(learning_rate: float, schedule: str, final_fraction: float, warmup_steps: int) -> dict:
  """AdamW with InstructGPT's betas (appendix C) and N+'s epsilon."""
  return dict(
    learning_rate=learning_rate,
    schedule=schedule,
    warmup_steps=warmup_steps,
    warmup_from=0.1,
    final_fraction=final_fraction,
    beta1=0.9,
    beta2=0.95,
    eps=1e-5,
    weight_decay=0.0,
    clip_norm=1.0,
  )
