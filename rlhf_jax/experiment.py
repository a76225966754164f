"""A whole run's configuration, and what an experiment builds from it before the first step.

`configs/*.py` hold one ConfigDict for all stages. `start` turns it into an `ExperimentConfig`,
once, opens the working directory, and builds mesh, data, tokenizer and networks; mistakes in a
config or its data are reported here, before anything is trained or overwritten.
"""

import dataclasses
import functools
import itertools
import pathlib
from typing import Any, Literal

import jax
from jax.sharding import Mesh

from rlhf_jax import comparisons, reward, sft
from rlhf_jax import config as config_lib
from rlhf_jax.config import Count, PositiveInt
from rlhf_jax.data import rows, sources, village
from rlhf_jax.data.records import Demonstration, Text
from rlhf_jax.feedback.rounds import StoreConfig
from rlhf_jax.generation.respond import Responder
from rlhf_jax.generation.sampling import SamplingConfig, find_stops
from rlhf_jax.labelers.simulated import LabelerConfig
from rlhf_jax.networks import heads, pretrained
from rlhf_jax.networks.config import ModelConfig
from rlhf_jax.parallel import hosts, rules
from rlhf_jax.parallel import mesh as mesh_lib
from rlhf_jax.ppo_config import PPOConfig
from rlhf_jax.text import dialogue
from rlhf_jax.text import tokenizer as tokenizer_lib
from rlhf_jax.text.tokenizer import Tokenizer
from rlhf_jax.training import checkpoint, files, optim, profile
from rlhf_jax.types import Params, UserError

# Special tokens of a tokenizer that is trained here, whichever template the run uses.
TRAINED_SPECIALS = ("<|pad|>", "<|endoftext|>", "<|im_start|>", "<|im_end|>")

# Sections: what is kept, what is traced, and where and how long people are asked.
MAY_CHANGE = ("checkpoints", "profile", "store")


@dataclasses.dataclass(frozen=True)
class TextConfig:
  """How dialogues become tokens."""

  template: Literal["chatml", "llama3", "plain", "village"]
  tokenizer: str  # "village", "train" (a BPE learnt from the data), or a file or folder to load
  vocab_size: PositiveInt  # of a tokenizer that is trained here
  on_too_long: dialogue.OnTooLong  # what to do with a dialogue that cannot fit


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
  """What is measured before and after each round."""

  prompts: PositiveInt  # held-out conversations to answer
  examples: Count  # dialogues kept for the report


@dataclasses.dataclass(frozen=True)
class ExperimentConfig:
  """All of it."""

  seed: Count
  rounds: PositiveInt
  mesh: mesh_lib.MeshConfig
  text: TextConfig
  pretrained: str | None  # a checkpoint to start from; None starts from random parameters
  model: ModelConfig
  data: sources.DataConfig
  sft: sft.SFTConfig
  comparisons: comparisons.ComparisonConfig
  gold: Literal["village", "reward_model"]  # where the true reward comes from
  gold_model: reward.RewardConfig | None  # how that reward model is fitted to people's comparisons
  labeler: Literal["simulated", "store"]  # who ranks: `labelers`, or people, through `store`
  labelers: LabelerConfig
  store: StoreConfig
  reward: reward.RewardConfig
  ppo: PPOConfig
  evaluation: EvaluationConfig
  checkpoints: checkpoint.CheckpointConfig
  profile: profile.ProfileConfig

  def __post_init__(self):
    if (self.gold == "reward_model") != (self.gold_model is not None):
      raise UserError(
        f"config gold_model: must be given for gold 'reward_model' only, not {self.gold!r}."
      )
    optim.schedule(self.sft.optim, self.sft.num_steps)
    for config in (self.ppo.policy_optim, self.ppo.value_optim):
      optim.schedule(config, self.ppo.num_steps * self.ppo.updates)
    prompts = min(self.comparisons.prompts, self.reward.max_train or self.comparisons.prompts)
    fewest = prompts // (self.reward.batch_size * self.reward.max_prompts)  # if all rows were full
    optim.schedule(self.reward.optim, self.reward.num_epochs * max(fewest, 1))
    source = self.comparisons
    answers = source.responses + source.include_original
    if self.reward.max_responses < answers:
      raise UserError(
        f"config reward.max_responses {self.reward.max_responses} is fewer than the {answers} "
        f"answers that are ranked to a prompt; use {answers}."
      )
    longest = source.sampling.max_new_tokens + 1  # one that is cut is closed with an EOS
    room = source.prompt_length + source.responses * longest
    if self.reward.sequence_length < room:
      raise UserError(
        f"config reward.sequence_length {self.reward.sequence_length} is shorter than a prompt and "
        f"its answers of comparisons, {source.prompt_length} + {source.responses} * "
        f"{longest} tokens; use at least {room}."
      )


@dataclasses.dataclass(frozen=True)
class Run:
  """What every stage of a run needs."""

  config: ExperimentConfig
  workdir: pathlib.Path
  mesh: Mesh
  data: sources.Data
  tokenizer: Tokenizer

  @property
  def template(self) -> dialogue.ChatTemplate:
    return dialogue.TEMPLATES[self.config.text.template]

  @functools.cached_property
  def policy(self) -> heads.Policy:
    return heads.Policy(self.config.model)

  @functools.cached_property
  def scalar(self) -> heads.ScalarNetwork:
    return heads.ScalarNetwork(self.config.model)

  def key(self, *names: str) -> jax.Array:
    """The PRNG key of a stage: the run's seed, folded with the stage's name."""
    key = jax.random.key(self.config.seed)
    for letter in "/".join(names).encode():
      key = jax.random.fold_in(key, letter)
    return key

  def seed(self, *names: str) -> int:
    """The seed of something that is drawn on the host, as `key` is on the device."""
    return int(jax.random.bits(self.key(*names)))

  def abstract(self, network: heads.Policy | heads.ScalarNetwork) -> Params:
    """Shapes of a network's parameters, and where they live on the mesh."""
    return rules.abstract(heads.shapes(network), self.mesh)

  def initial_policy(self) -> Params:
    """The policy that SFT starts from: the pretrained one, or random parameters."""
    config = self.config
    if config.pretrained is not None:
      return rules.place(pretrained.load_as(config.model, config.pretrained), self.mesh)
    init = functools.partial(heads.init, self.policy)
    layout = rules.partition(heads.shapes(self.policy), self.mesh)
    return jax.jit(init, out_shardings=layout)(self.key("init"))

  def responder(
    self, sampling: SamplingConfig, prompt_length: int, batch_size: int, samples: int = 1
  ) -> Responder:
    """A compiled way from conversations to answers, about `batch_size` of them at a time."""
    devices = mesh_lib.batch_devices(self.mesh)
    return Responder(
      self.policy,
      self.tokenizer,
      self.template,
      self.mesh,
      sampling,
      prompt_length,
      max(batch_size // samples // devices, 1) * devices,
      samples,
    )


def start(config: Any, workdir: str | pathlib.Path) -> Run:
  """Opens a run: the same command with the same config goes on where it was killed.

  Raises:
    UserError: a mistake in the config or its data, or a `workdir` that another config made.
  """
  built = config_lib.build(ExperimentConfig, config)
  workdir = pathlib.Path(workdir).expanduser().absolute()
  mesh = mesh_lib.make(built.mesh)
  check_batches(built, mesh)
  check_workdir(built, workdir)
  with hosts.first_goes_first("data and tokenizer"):
    data = sources.load(built.data)
    tokenizer = find_tokenizer(built, data, workdir)
  if tokenizer.vocab_size > built.model.vocab_size:
    raise UserError(
      f"config model.vocab_size: {built.model.vocab_size} is smaller than the tokenizer's "
      f"vocabulary of {tokenizer.vocab_size}."
    )
  run = Run(built, workdir, mesh, data, tokenizer)
  for section in (built.comparisons, built.ppo.rollout):
    find_stops(section.sampling, tokenizer)
  check_prompts(run)
  if hosts.is_first():
    files.write_json_atomic(workdir / "config.json", config_lib.to_dict(built))
  hosts.wait("started")
  return run


def check_batches(config: ExperimentConfig, mesh: Mesh) -> None:
  """Raises a UserError for a batch that the mesh cannot split."""
  ppo_rows = config.ppo.rollout.batch_size // config.ppo.minibatches // config.ppo.micro_batches
  for name, size in (
    ("sft.batch_size / sft.micro_batches", config.sft.batch_size // config.sft.micro_batches),
    ("comparisons.batch_size", config.comparisons.batch_size),
    (
      "reward.batch_size / reward.micro_batches",
      config.reward.batch_size // config.reward.micro_batches,
    ),
    ("ppo.rollout.batch_size / ppo.minibatches / ppo.micro_batches", ppo_rows),
    (
      "ppo.rollout.batch_size / ppo.rollout.micro_batches",
      config.ppo.rollout.batch_size // config.ppo.rollout.micro_batches,
    ),
  ):
    mesh_lib.check_batch(mesh, size, name)


def check_workdir(config: ExperimentConfig, workdir: pathlib.Path) -> None:
  """Raises a UserError where `workdir` cannot be written or holds work of another config."""
  files.ensure_writable(workdir)
  begun = any(workdir.rglob("about.json")) or any(workdir.rglob("done.json"))
  if begun and (workdir / "config.json").exists():
    changed = differs(config, workdir)
    if changed:
      shown = "\n  ".join(changed[:8] + ([f"... {len(changed) - 8} more"] if changed[8:] else []))
      raise UserError(
        f"{workdir} was made with another config; choose another --workdir, or use the values it "
        f"was made with (there -> now):\n  {shown}"
      )


def differs(config: ExperimentConfig, workdir: pathlib.Path) -> list[str]:
  """The keys in which `config` is another than the one that `workdir` was begun with.

  What is traced and which checkpoints stay may differ, since these change no result, and how people
  are asked, since they are not in the config's hands.
  """
  old, new = files.read_json(workdir / "config.json"), config_lib.to_dict(config)
  results_of = lambda sections: {k: v for k, v in sections.items() if k not in MAY_CHANGE}
  return config_lib.differences(results_of(old), results_of(new))


def check_prompts(run: Run) -> None:
  """Raises a UserError for a prompt that PPO, hours later, would find too long."""
  if run.config.text.on_too_long == "error":
    for split in ("train", "heldout"):
      rows.prompt_rows(
        run.data.prompts(split),
        run.template,
        run.tokenizer,
        max_tokens=run.config.ppo.rollout.prompt_length,
        on_too_long="error",
      )


def find_tokenizer(
  config: ExperimentConfig, data: sources.Data, workdir: pathlib.Path
) -> Tokenizer:
  """The tokenizer that the config names; one that is made here is kept in the workdir."""
  template = dialogue.TEMPLATES[config.text.template]
  name = config.text.tokenizer
  if name not in ("village", "train"):
    return Tokenizer.load(name, eos=template.end)
  folder, fresh = workdir / "tokenizer", workdir / "tmp-tokenizer"
  is_new = not (workdir / "config.json").exists() or differs(config, workdir)
  if is_new and hosts.is_first():
    make = village_tokenizer if name == "village" else train_tokenizer
    make(config, data).save(fresh)
    files.replace_directory(fresh, folder)
  return Tokenizer.load(folder, eos=template.end)


def village_tokenizer(config: ExperimentConfig, data: sources.Data) -> Tokenizer:
  """One token a word."""
  backend = village.build_tokenizer(village.build_world(config.data.village))
  return Tokenizer(backend, eos=dialogue.VILLAGE.end, pad="<pad>", bos=None)


def train_tokenizer(config: ExperimentConfig, data: sources.Data) -> Tokenizer:
  """A byte-level BPE learnt from the training dialogues and texts of the run."""
  template = dialogue.TEMPLATES[config.text.template]
  dialogues = (r.conversation for r in data.records(Demonstration, "train"))
  texts = (r.text for r in data.records(Text, "train"))
  return tokenizer_lib.train_bpe(
    itertools.chain((dialogue.render(d, template) for d in dialogues), texts),
    config.text.vocab_size,
    TRAINED_SPECIALS,
    eos=template.end,
    pad="<|pad|>",
  )
