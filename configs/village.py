"""The whole recipe in a closed world where every answer can be checked.

  python experiments/chatgpt.py --config=configs/village.py --workdir=runs/village

Arguments: `village.py:tiny` runs every stage in seconds, for tests; it learns next to nothing.
"""

from ml_collections import ConfigDict

from rlhf_jax import config as config_lib
from rlhf_jax.data import village


def get_config(arg: str = "") -> ConfigDict:
  """The config named by `arg`: "" for the real thing, "tiny" for tests."""
  config = standard()
  if arg == "tiny":
    shrink(config)
  elif arg:
    raise ValueError(f"configs/village.py has no variant {arg!r}; use none, or 'tiny'.")
  return config


def standard() -> ConfigDict:
  config = ConfigDict()
  config.seed = 0
  config.rounds = 2
  config.mesh = dict(data=-1, fsdp=1, tensor=1)
  config.text = dict(template="village", tokenizer="village", vocab_size=1, on_too_long="error")
  config.pretrained = None
  config.model = model()
  config.data = data()
  config.sft = dict(
    num_steps=1_600,
    batch_size=16,  # rows
    micro_batches=1,
    sequence_length=72,  # tokens; dialogues are packed
    supervise="last",  # earlier turns hold mistakes on purpose
    pretraining_share=0.0,
    max_heldout=None,
    judge=None,
    eval_every=400,
    frozen=(),
    optim=optim(4e-3, "cosine", final_fraction=0.1, warmup_steps=50),
  )

  config.comparisons = comparisons()
  config.gold = "village"
  config.gold_model = None
  config.labeler = "simulated"  # or "store": people, on the labeling page
  config.labelers = dict(
    seed=0,
    labelers=3,
    noise=0.0,
    disagreement=0.0,
    length_bias=0.0,
    tie_margin=0.0,
    flip_rate=0.0,
  )
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
    num_epochs=2,  # two pass over answers of a closed world; real text overfits after one
    max_train=None,
    max_heldout=None,
    batch_size=8,  # rows of about 2.5 prompts each
    micro_batches=1,
    max_prompts=4,
    max_responses=4,
    sequence_length=144,  # a prompt and four answers
    eval_every=500,
    frozen=(),
    optim=optim(1e-3, "cosine", final_fraction=0.1, warmup_steps=10),
  )
  config.ppo = ppo()
  config.evaluation = dict(prompts=500, examples=27)
  config.checkpoints = dict(keep=2, keep_every=None, background=True)
  config.profile = dict(first_step=None, num_steps=2, operations=10)
  return config


def model() -> dict:
  """A model of 0.4 million parameters."""
  return dict(
    vocab_size=288,  # the village's few hundred words, rounded up
    d_model=96,
    n_layers=3,
    n_heads=3,
    n_kv_heads=3,
    head_dim=32,
    d_ff=288,
    rope_base=10_000.0,
    norm_eps=1e-5,
    tie_embeddings=False,
    compute=dict(
      dtype="float32",
      scan_layers=False,
      remat=False,
      logit_columns=None,
      attention="auto",
      panels="auto",
    ),
  )


def data() -> dict:
  """The village, and nothing else."""
  return dict(
    prepare=dict(data_dir="~/.cache/rlhf_jax/data", heldout_fraction=0.1, split_seed=0),
    village=config_lib.to_dict(village.STANDARD),
    hh_rlhf=None,
    open_assistant=None,
    instructions=None,
    jsonl=None,
    text=None,
    weights=dict(village=1.0),
    prompts_from=("prompt",),
  )


def comparisons() -> dict:
  """Every prompt answered four times."""
  return dict(
    prompts=14_000,
    responses=4,  # K; InstructGPT: 4 to 9
    include_original=False,
    include_recorded=False,
    heldout_prompts=200,
    batch_size=256,
    prompt_length=44,
    sampling=sampling(),
  )


def sampling() -> dict:
  """All of the policy's distribution, wherever it answers to be trained on."""
  return dict(
    max_new_tokens=24,
    temperature=1.0,
    top_k=0,
    top_p=1.0,
    stop=None,
    compact_to=(),
    cache_sizes=1,
  )


def ppo() -> dict:
  """Fifty batches of 128 episodes."""
  return dict(
    num_steps=50,
    epochs=1,  # InstructGPT, appendix C.4
    minibatches=4,
    micro_batches=1,
    gamma=1.0,
    lam=0.95,
    cliprange=0.2,
    value_cliprange=0.2,
    vf_coef=0.1,
    whiten_rewards=False,
    missing_eos="replace",  # N+
    missing_eos_penalty=5.0,
    ema_decay=0.0,
    kl=dict(coef=0.1, target=None, horizon=10_000.0),
    ptx=dict(coef=0.0, ratio=1.0, sequence_length=64),
    rollout=dict(
      batch_size=128,
      micro_batches=1,
      prompt_length=44,
      sampling=sampling(),
    ),
    eval_every=10,
    frozen=(),
    rules=(),
    offload=(),
    policy_optim=optim(4e-4, "linear", final_fraction=0.0, warmup_steps=0),
    value_optim=optim(1e-3, "linear", final_fraction=0.0, warmup_steps=0),
  )


def optim(
  learning_rate: float, schedule: str, final_fraction: float, warmup_steps: int
) -> dict[str, float | str | int]:
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


def shrink(config: ConfigDict) -> None:
  """Every stage in seconds."""
  config.model.update(d_model=32, n_layers=2, n_heads=2, n_kv_heads=2, head_dim=16, d_ff=64)
  config.data.village.update(demonstrations=400, prompts=200, heldout=64, texts=50)
  config.sft.update(num_steps=8, batch_size=8, eval_every=4)
  config.comparisons.update(prompts=32, heldout_prompts=16, batch_size=32)
  config.sft.optim.update(warmup_steps=2)
  config.reward.update(batch_size=8, max_prompts=2, eval_every=2)
  config.reward.optim.update(warmup_steps=1)
  config.ppo.update(num_steps=3, minibatches=2, eval_every=2)
  config.ppo.rollout.update(batch_size=16)
  config.evaluation.update(prompts=32, examples=9)
