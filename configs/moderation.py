"""Moderation: eight categories of undesired content, learnt from the samples OpenAI released.

  python experiments/moderate.py --config=configs/moderation.py --workdir=runs/moderation
  python experiments/moderate.py --config=configs/moderation.py:smollm2 --workdir=runs/moderation_lm

Data and weights are looked for in the folders that the environment variables RLHF_JAX_DATA and
RLHF_JAX_WEIGHTS name ("data" and "weights" without them); docs/moderation.md says what goes there.

Arguments, several of them with commas between: none trains a small model from scratch; `smollm2`
trains a norm and a linear head on the frozen lower half of SmolLM2-135M-Instruct; `reports` also
trains on what people reported, in the file reports.jsonl; `tiny` runs everything in seconds, for
tests, and learns next to nothing. docs/moderation.md has the run times and what comes of each.
"""

import os
import pathlib

from ml_collections import ConfigDict

DATA = pathlib.Path(os.environ.get("RLHF_JAX_DATA", "data"))
WEIGHTS = pathlib.Path(os.environ.get("RLHF_JAX_WEIGHTS", "weights"))


def get_config(arg: str = "") -> ConfigDict:
  """The config named by `arg`: "", or names of `VARIANTS` with commas between."""
  config = small()
  for name in arg.split(",") if arg else ():
    if name not in VARIANTS:
      raise ValueError(
        f"configs/moderation.py has no variant {name!r}; use none, or some of "
        f"{', '.join(map(repr, VARIANTS))}."
      )
    VARIANTS[name](config)
  return config


def small() -> ConfigDict:
  config = ConfigDict()
  config.seed = 0
  config.mesh = dict(data=-1, fsdp=1, tensor=1)
  config.data = dict(
    samples=dict(paths=(str(DATA / "openai-moderation/samples.jsonl.gz"),), on_malformed="error"),
    tweets=None,  # their classes teach little about these samples: docs/moderation.md
    reports=None,
    weights=dict(samples=1.0),
    evaluated="samples",
  )
  config.trunk = dict(
    checkpoint=None,
    tokenizer="train",
    vocab_size=4_096,
    blocks=None,
    pooling="mean",
    model=dict(
      vocab_size=4_096,
      d_model=128,
      n_layers=1,
      n_heads=4,
      n_kv_heads=4,
      head_dim=32,
      d_ff=256,
      rope_base=10_000.0,
      norm_eps=1e-5,
      tie_embeddings=True,
      compute=compute(),
    ),
  )
  config.fit = dict(
    num_epochs=3,  # ten remember the texts: loss 0.00 in training, 0.35 held out after 0.23
    batch_size=8,  # rows
    micro_batches=1,
    sequence_length=512,  # tokens; nine samples in ten are shorter
    max_texts=16,  # texts a row
    frozen=(),
    positive_weight_power=0.5,
    eval_every=100,
    optim=optim(2e-3, weight_decay=0.1),
  )
  config.evaluation = dict(folds=5, near_duplicate=0.7, bootstrap=1_000, level=0.95)
  # Of what is flagged, half is what it is said to be; more is out of reach for the rare categories.
  config.thresholds = dict(target="precision", value=0.5, min_positives=20, fallback=0.5)
  config.actions = {
    "sexual": dict(input="warn", output="block"),
    "hate": dict(input="warn", output="block"),
    "violence": dict(input="warn", output="warn"),
    "harassment": dict(input="warn", output="block"),
    "self-harm": dict(input="warn", output="block"),
    "sexual/minors": dict(input="block", output="block"),
    "hate/threatening": dict(input="block", output="block"),
    "violence/graphic": dict(input="warn", output="block"),
  }
  config.reports = dict(
    category="hate",
    count=50,
    pool=dict(paths=(str(DATA / "moderation/hate-speech-davidson.csv.gz"),), max_examples=4_000),
    weight=0.1,
  )
  config.checkpoints = dict(keep=1, keep_every=None, background=True)
  config.profile = dict(first_step=None, num_steps=2, operations=10)
  return config


def smollm2(config: ConfigDict) -> None:
  """A linear classifier on what the lower blocks of a pretrained model make of a text.

  Of the means after every fourth block, those of blocks 14 to 18 were the best; the upper blocks
  turn to the next token. Two blocks trained on top of 14 frozen ones were worse:
  mean AUPRC 0.47, not 0.58, on three of the folds; they remember a thousand texts.
  """
  gguf = str(WEIGHTS / "SmolLM2-135M-Instruct.Q4_1.gguf")
  config.trunk = dict(
    checkpoint=gguf,
    tokenizer=gguf,
    vocab_size=1,
    blocks=14,
    pooling="mean",
    model=dict(  # as its checkpoint says
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
      compute=compute(),
    ),
  )
  config.fit.update(
    batch_size=4,
    num_epochs=10,
    frozen=(r"trunk/embed/", r"trunk/block_"),
    optim=optim(3e-3, weight_decay=0.1),
  )


def with_reports(config: ConfigDict) -> None:
  """People's reports, as `python -m rlhf_jax.feedback export moderation` writes them, too.

  What fifty of one kind do at this weight is in docs/moderation.md.
  """
  config.data.reports = dict(paths=("reports.jsonl",), on_malformed="error")
  config.data.weights.reports = 0.1


def shrink(config: ConfigDict) -> None:
  """Sizes for tests."""
  config.trunk.vocab_size = config.trunk.model.vocab_size = 320
  config.trunk.model.update(d_model=16, n_heads=2, n_kv_heads=2, head_dim=8, d_ff=32)
  config.fit.update(num_epochs=2, sequence_length=32, max_texts=8, eval_every=4)
  config.fit.optim.update(warmup_steps=1)
  config.evaluation.update(folds=2, bootstrap=20)
  config.thresholds.update(min_positives=3)
  config.reports.update(count=4)


def compute() -> dict:
  """How networks are computed on a CPU."""
  return dict(
    dtype="float32",
    scan_layers=False,
    remat=False,
    logit_columns=None,
    attention="auto",
    panels="auto",
  )


def optim(learning_rate: float, weight_decay: float) -> dict:
  """AdamW; epsilon is N+'s."""
  return dict(
    learning_rate=learning_rate,
    schedule="cosine",
    warmup_steps=10,
    warmup_from=0.1,
    final_fraction=0.1,
    beta1=0.9,
    beta2=0.95,
    eps=1e-5,
    weight_decay=weight_decay,
    clip_norm=1.0,
  )


VARIANTS = {"smollm2": smollm2, "reports": with_reports, "tiny": shrink}
