"""From a run, or a pretrained model, to a policy with everything it takes to answer."""

import dataclasses
import pathlib
from collections.abc import Iterable
from typing import Any

import jax

from rlhf_jax import config as config_lib
from rlhf_jax import standing
from rlhf_jax.experiment import ExperimentConfig
from rlhf_jax.generation.sampling import SamplingConfig, Stops, find_stops
from rlhf_jax.networks import heads, pretrained
from rlhf_jax.text import dialogue
from rlhf_jax.text.messages import Conversation
from rlhf_jax.text.tokenizer import Tokenizer
from rlhf_jax.training import checkpoint, files
from rlhf_jax.types import Params, UserError


@dataclasses.dataclass(frozen=True)
class Loaded:
  """A policy, its weights on the host's first device, and how text becomes its tokens."""

  name: str  # as village-round_1
  checkpoint: pathlib.Path
  policy: heads.Policy
  params: Params
  tokenizer: Tokenizer
  template: dialogue.ChatTemplate

  def prompt(self, conversation: Conversation, context: int) -> tuple[int, ...]:
    """Ids of a dialogue and of the assistant's header; the oldest turns go until it fits.

    Raises:
      UserError: the last message alone is longer than `context`, or no reply is due.
    """
    kept = dialogue.truncate(
      conversation, context, self.template, self.tokenizer, on_too_long="error"
    )
    return dialogue.encode_prompt(kept, self.template, self.tokenizer)

  def reply(self, ids: Iterable[int]) -> str:
    """The text of a reply, before its EOS and without what the template puts before it."""
    return dialogue.decode_response(ids, self.template, self.tokenizer)

  def stops(self, sampling: SamplingConfig) -> Stops:
    """What ends its answers."""
    return find_stops(sampling, self.tokenizer)


def config_of(workdir: pathlib.Path) -> ExperimentConfig:
  """The config of the run in a working directory.

  Raises:
    UserError: `workdir` holds no run.
  """
  path = workdir.expanduser() / "config.json"
  if not path.exists():
    raise UserError(f"{workdir} holds no run: there is no config.json in it.")
  return config_lib.build(ExperimentConfig, files.read_json(path))


def of_run(workdir: pathlib.Path, policy: str) -> Loaded:
  """A policy of a working directory, by its path in there; "newest" is the newest.

  Raises:
    UserError: `workdir` holds no run, no such policy, or one that does not fit its config.
  """
  workdir = workdir.expanduser().absolute()
  config = config_of(workdir)
  found = standing.find_policy(workdir, policy)
  trained_here = config.text.tokenizer in ("village", "train")
  tokenizer = workdir / "tokenizer" if trained_here else config.text.tokenizer
  initial = lambda: heads.init(heads.Policy(config.model), jax.random.key(0))
  params, _ = checkpoint.load_params(workdir / found, jax.eval_shape(initial))
  stage = found.removesuffix("/policy").removesuffix("/ppo").replace("/", "-")
  name = f"{workdir.name}-{stage}"  # sft or round_N
  return _loaded(name, workdir / found, config, params, tokenizer)


def of_pretrained(section: Any) -> Loaded:
  """The pretrained model that a config starts from.

  Raises:
    UserError: the config names none, or weights of another shape.
  """
  config = config_lib.build(ExperimentConfig, section)
  if config.pretrained is None or config.text.tokenizer in ("village", "train"):
    raise UserError(
      "this config starts from no pretrained model with a tokenizer of its own; train one first "
      "and give its --workdir."
    )
  params = pretrained.load_as(config.model, config.pretrained)
  path = pathlib.Path(config.pretrained)
  return _loaded(path.stem, path, config, params, config.text.tokenizer)


def _loaded(name, path, config, params, tokenizer) -> Loaded:
  template = dialogue.TEMPLATES[config.text.template]
  tokenizer = Tokenizer.load(tokenizer, eos=template.end)
  policy, params = heads.unrolled(heads.Policy(config.model), params)  # it is there to decode
  return Loaded(name, path, policy, params, tokenizer, template)
