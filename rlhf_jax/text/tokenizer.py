"""Text to token ids and back, through the `tokenizers` library.

`Tokenizer` is a thin wrapper with two rules of its own. Text is only text: `encode` never yields a
special token, whatever a user types, and never adds BOS or EOS; templates write those with
`encode_special`. And the pad is not the EOS, so that no mask can hide an EOS with the padding.
"""

import collections.abc
import dataclasses
import functools
import gzip
import json
import pathlib
import struct

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from rlhf_jax.types import UserError

# Tokens that serve as padding where a tokenizer names none (or names its EOS), best first.
PAD_TOKENS = ("<|pad|>", "<pad>", "[PAD]", "<|endoftext|>", "<unk>")

_GGUF_CONTROL = 3  # token_type of a special token in GGUF metadata
_DIGITS_APART = pre_tokenizers.Sequence(
  [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
)
_GGUF_PRE_TOKENIZERS = {  # by `tokenizer.ggml.pre`
  "smollm": _DIGITS_APART,
  "gpt-2": pre_tokenizers.ByteLevel(add_prefix_space=False),
}


@dataclasses.dataclass(frozen=True)
class Tokenizer:
  """`tokenizers.Tokenizer` with the roles of its special tokens."""

  backend: tokenizers.Tokenizer
  eos: str  # ends the assistant's message (the chat template's end)
  pad: str
  bos: str | None

  def __post_init__(self):
    if self.pad == self.eos:
      raise UserError(
        f"pad and EOS are both {self.eos!r}: masking the padding would mask the end of every "
        f"reply. Choose another pad among {sorted(self.specials)}."
      )
    for name in ("eos", "pad", "bos"):
      text = getattr(self, name)
      if text is not None and text not in self.specials:
        raise UserError(f"{name} {text!r} is not a special token; those are {self.specials}.")

  @classmethod
  def load(
    cls, path: str | pathlib.Path, *, eos: str | None = None, pad: str | None = None
  ) -> "Tokenizer":
    """From a folder, a `tokenizer.json`, a `.gguf` file or llama2.c's `.bin`.

    EOS, BOS and pad come from the file (for JSON: from `tokenizer_config.json` beside it) unless
    given here.

    Raises:
      UserError: no such file, no tokenizer inside it, or no EOS or pad can be told.
    """
    path = pathlib.Path(path)
    if path.suffix == ".gguf":
      return from_gguf(path, eos=eos, pad=pad)
    if path.suffix == ".bin":
      return from_llama2c(path, eos=eos, pad=pad)
    return _from_json(path / "tokenizer.json" if path.is_dir() else path, eos, pad)

  def save(self, folder: str | pathlib.Path) -> None:
    """Writes `tokenizer.json` and `tokenizer_config.json`, as Hugging Face lays them out."""
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    self.backend.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast"}
    config |= {"eos_token": self.eos, "pad_token": self.pad, "bos_token": self.bos}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")

  def encode(self, text: str) -> list[int]:
    """Ids of ordinary text; names of special tokens in it are ordinary text too."""
    ids = self._text_backend.encode(text, add_special_tokens=False).ids
    if self._forbidden.isdisjoint(ids):
      return ids
    # A word-level vocabulary holds special tokens as words, so they need a second guard.
    return [self._unknown if i in self._forbidden else i for i in ids]

  def encode_special(self, text: str) -> list[int]:
    """Ids of text written by a template, whose special tokens count as such."""
    return list(self._template_ids(text))

  def decode(self, ids: collections.abc.Iterable[int], skip_special: bool = True) -> str:
    return self.backend.decode([int(i) for i in ids], skip_special_tokens=skip_special)

  def token_id(self, text: str) -> int:
    """The id of one token; raises UserError if the vocabulary lacks it."""
    token = self.backend.token_to_id(text)
    if token is None:
      raise UserError(f"token {text!r} is not in the vocabulary of {self.vocab_size} tokens.")
    return token

  @functools.cached_property
  def specials(self) -> tuple[str, ...]:
    """The special tokens, by id."""
    added = sorted(self.backend.get_added_tokens_decoder().items())
    return tuple(token.content for _, token in added if token.special)

  @functools.cached_property
  def vocab_size(self) -> int:
    """One more than the highest id."""
    return max(self.backend.get_vocab(with_added_tokens=True).values()) + 1

  @functools.cached_property
  def eos_id(self) -> int:
    return self.token_id(self.eos)

  @functools.cached_property
  def pad_id(self) -> int:
    return self.token_id(self.pad)

  @functools.cached_property
  def bos_id(self) -> int | None:
    return None if self.bos is None else self.token_id(self.bos)

  @functools.cached_property
  def _text_backend(self) -> tokenizers.Tokenizer:
    # A copy, because switching one object to and fro would not be safe between threads.
    backend = tokenizers.Tokenizer.from_str(self.backend.to_str())
    backend.encode_special_tokens = True
    return backend

  @functools.cached_property
  def _template_ids(self) -> collections.abc.Callable[[str], tuple[int, ...]]:
    # Templates write the same few texts around every message.
    encode = lambda text: tuple(self.backend.encode(text, add_special_tokens=False).ids)
    return functools.lru_cache(maxsize=64)(encode)

  @functools.cached_property
  def _forbidden(self) -> frozenset[int]:
    unknown = getattr(self.backend.model, "unk_token", None)
    return frozenset(self.token_id(text) for text in self.specials if text != unknown)

  @functools.cached_property
  def _unknown(self) -> int:
    unknown = getattr(self.backend.model, "unk_token", None)
    if unknown is None:
      raise UserError("text holds the name of a special token, and there is no unknown token.")
    return self.token_id(unknown)


def from_gguf(
  path: str | pathlib.Path, *, eos: str | None = None, pad: str | None = None
) -> Tokenizer:
  """The byte-level BPE tokenizer in the metadata of a GGUF file.

  Raises:
    UserError: no such file, or a kind of tokenizer that is not known here.
  """
  import gguf  # here, because it is slow to import and only weights in GGUF need it

  reader = gguf.GGUFReader(_existing(path))
  field = lambda name: reader.fields[f"tokenizer.ggml.{name}"].contents()
  model, pre = field("model"), field("pre")
  if model != "gpt2" or pre not in _GGUF_PRE_TOKENIZERS:
    raise UserError(
      f"{path} holds a tokenizer {model!r} with pre-tokenizer {pre!r}; known are 'gpt2' with "
      f"{', '.join(map(repr, _GGUF_PRE_TOKENIZERS))}. Use the model's tokenizer.json instead."
    )
  tokens = field("tokens")
  merges = [tuple(merge.split(" ")) for merge in field("merges")]
  backend = _byte_level_bpe({text: i for i, text in enumerate(tokens)}, merges)
  backend.pre_tokenizer = _GGUF_PRE_TOKENIZERS[pre]
  backend.add_special_tokens(
    [_special(text) for text, kind in zip(tokens, field("token_type")) if kind == _GGUF_CONTROL]
  )
  eos = eos or tokens[field("eos_token_id")]
  stated = tokens[field("padding_token_id")] if _has(reader, "padding_token_id") else None
  bos = tokens[field("bos_token_id")] if _has(reader, "bos_token_id") else None
  return Tokenizer(backend, eos=eos, pad=pad or _choose_pad(backend, eos, stated), bos=bos)


def from_vocab_merges(vocab: str | pathlib.Path, merges: str | pathlib.Path) -> Tokenizer:
  """GPT-2's tokenizer from `vocab.json` and `merges.txt` (both may be gzipped), and a `<|pad|>`.

  GPT-2 has one special token, so the pad is a new id after the vocabulary.
  """
  ids = json.loads(_read_text(vocab))
  lines = _read_text(merges).splitlines()
  pairs = [tuple(line.split(" ")) for line in lines if line and not line.startswith("#version")]
  backend = _byte_level_bpe(ids, pairs)
  backend.add_special_tokens([_special("<|endoftext|>"), _special("<|pad|>")])
  return Tokenizer(backend, eos="<|endoftext|>", pad="<|pad|>", bos=None)


def from_llama2c(
  path: str | pathlib.Path, *, eos: str | None = None, pad: str | None = None
) -> Tokenizer:
  """The tokenizer of a llama2.c model, whose file lists pieces and scores of a sentencepiece BPE.

  sentencepiece joins the neighbours that make the piece with the best score, so every way to split
  a piece into two others is a merge, ranked by that score.
  """
  data = _existing(path).read_bytes()
  pieces, scores, at = [], [], 4  # the first int32 is the longest piece
  while at < len(data):
    score, length = struct.unpack_from("<fi", data, at)
    pieces.append(data[at + 8 : at + 8 + length].decode())
    scores.append(score)
    at += 8 + length
  pieces[:3] = ["<unk>", "<s>", "</s>"]
  vocab = {text: i for i, text in enumerate(pieces)}
  merges = []
  for text in sorted(vocab, key=lambda text: -scores[vocab[text]]):
    splits = ((text[:i], text[i:]) for i in range(1, len(text)))
    merges += [pair for pair in splits if pair[0] in vocab and pair[1] in vocab]
  model = models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True)
  backend = tokenizers.Tokenizer(model)
  backend.normalizer = normalizers.Prepend(" ")
  backend.decoder = decoders.Sequence(
    [decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
  )
  backend.add_special_tokens([_special(text) for text in pieces[:3]])
  return Tokenizer(backend, eos=eos or "</s>", pad=pad or "<unk>", bos="<s>")


def train_bpe(
  texts: collections.abc.Iterable[str],
  vocab_size: int,
  specials: collections.abc.Sequence[str],
  *,
  eos: str,
  pad: str,
) -> Tokenizer:
  """A byte-level BPE for small models trained from scratch; `specials` get the first ids."""
  least = 256 + len(specials)
  if vocab_size < least:
    raise UserError(f"vocab_size {vocab_size} is below {least}: 256 bytes and the specials.")
  backend = _byte_level_bpe({}, [])
  trainer = trainers.BpeTrainer(
    vocab_size=vocab_size,
    special_tokens=[_special(text) for text in specials],
    initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    show_progress=False,
  )
  backend.train_from_iterator(texts, trainer)
  return Tokenizer(backend, eos=eos, pad=pad, bos=None)


def _from_json(path: pathlib.Path, eos: str | None, pad: str | None) -> Tokenizer:
  text = _read_text(path)
  try:
    backend = tokenizers.Tokenizer.from_str(text)
  except Exception as error:  # the library raises bare Exception
    raise UserError(f"{path} is no tokenizer that the tokenizers library reads: {error}") from error
  beside = path.parent / "tokenizer_config.json"
  named = json.loads(beside.read_text()) if beside.exists() else {}
  name = lambda key: named[key]["content"] if isinstance(named.get(key), dict) else named.get(key)
  eos = eos or name("eos_token")
  if eos is None:
    raise UserError(f"{path} does not say which token is the EOS; give it as eos=.")
  pad = pad or _choose_pad(backend, eos, name("pad_token"))
  return Tokenizer(backend, eos=eos, pad=pad, bos=name("bos_token"))


def _choose_pad(backend: tokenizers.Tokenizer, eos: str, stated: str | None) -> str:
  for text in (stated, *PAD_TOKENS):
    if text is not None and text != eos and backend.token_to_id(text) is not None:
      return text
  raise UserError(f"no pad token other than the EOS {eos!r} was found; name a special one as pad=.")


def _byte_level_bpe(vocab: dict[str, int], merges: list[tuple]) -> tokenizers.Tokenizer:
  backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges))
  backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  backend.decoder = decoders.ByteLevel()
  return backend


def _special(text: str) -> tokenizers.AddedToken:
  return tokenizers.AddedToken(text, special=True, normalized=False)


def _has(reader, name: str) -> bool:
  return f"tokenizer.ggml.{name}" in reader.fields


def _existing(path: str | pathlib.Path) -> pathlib.Path:
  path = pathlib.Path(path)
  if not path.is_file():
    raise UserError(f"tokenizer file {path} does not exist.")
  return path


def _read_text(path: str | pathlib.Path) -> str:
  path = _existing(path)
  opened = gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open()
  with opened as file:
    return file.read()
