"""The phrase table compiled both ways: a template fills its slots, and finds them in a text.

  template.fill("Alice", value="mill")   ->  "Alice lives in the mill."
  read_assistant("She lives in the mill.") ->  Sentence(kind="fact", who="she", value="mill", ...)

Whatever `fill` writes, `read_user` or `read_assistant` reads back.
"""

import dataclasses
import functools
import re
from collections.abc import Iterator

from rlhf_jax.data.village import phrases
from rlhf_jax.data.village.phrases import PRONOUNS, Phrasings
from rlhf_jax.data.village.world import pronoun

# Words, the possessive and punctuation: the tokens of the village's vocabulary.
PIECE = r"[A-Za-z]+|'s|[^\sA-Za-z]"

_SLOT = re.compile(r"\{(\w+)\}")
_CASES = {"who": 0, "whom": 1, "whose": 2, "they": 0}
_SURFACES = {form: she for she, forms in PRONOUNS.items() for form in forms}
_OPENERS = {opener[0].upper() + opener[1:]: s for opener, s in phrases.OPENERS.items()}


@dataclasses.dataclass(frozen=True)
class Sentence:
  """What one sentence says; `who` is a name, "she", "he" or "" as the sentence has it."""

  kind: str
  relation: str | None
  who: str
  value: str
  opener: str  # "" or one of phrases.OPENERS, with a capital letter
  words: int  # without the opener

  @property
  def stance(self) -> phrases.Stance:
    return _OPENERS[self.opener] if self.opener else "plain"


@dataclasses.dataclass(frozen=True)
class Template:
  """One sentence with slots."""

  kind: str
  relation: str | None
  text: str
  held_out: bool

  def fill(self, name: str = "", *, value: str = "", opener: str = "", by_name: bool = True) -> str:
    """The sentence about the person of that name, called by the name or by a pronoun."""

    def slot(match: re.Match) -> str:
      match match[1]:
        case "opener":
          return opener
        case "value":
          return value
        case "name":
          return name
        case "they":
          return pronoun(name)
        case "whose" if by_name:
          return f"{name}'s"
        case case:
          return name if by_name else PRONOUNS[pronoun(name)][_CASES[case]]

    sentence = _SLOT.sub(slot, self.text)
    return sentence[0].upper() + sentence[1:]

  def read(self, sentence: str) -> Sentence | None:
    """The slots of a sentence, or None if this template does not say it."""
    match = self._pattern.fullmatch(sentence)
    if match is None:
      return None
    found = {key: value for key, value in match.groupdict().items() if value}
    who = next((found[key] for key in ("who", "whom", "whose", "they", "name") if key in found), "")
    who = who.removesuffix("'s")
    opener = found.get("opener", "")
    words = len(sentence.removeprefix(opener).split())
    who = _SURFACES.get(who.lower(), who)
    return Sentence(self.kind, self.relation, who, found.get("value", ""), opener, words)

  @functools.cached_property
  def _pattern(self) -> re.Pattern:
    parts = _SLOT.split(self.text)
    literals = [re.escape(part) for part in parts[::2]]
    if parts[0]:
      literals[0] = f"[{parts[0][0].lower()}{parts[0][0].upper()}]{re.escape(parts[0][1:])}"
    slots = [self._slot_pattern(slot) for slot in parts[1::2]]
    return re.compile("".join(a + b for a, b in zip(literals, [*slots, ""])))

  def _slot_pattern(self, slot: str) -> str:
    names = "|".join(phrases.NAMES)
    if slot == "opener":
      return f"(?P<opener>{'|'.join(map(re.escape, _OPENERS))})?"
    if slot == "value":
      return f"(?P<value>{'|'.join(phrases.RELATIONS[self.relation].values)})"
    if slot == "name":
      return f"(?P<name>{names})"
    forms = [forms[_CASES[slot]] for forms in PRONOUNS.values()]
    pronouns = "|".join(forms + [form.capitalize() for form in forms])
    if slot == "they":
      return f"(?P<they>{pronouns})"
    return (
      f"(?P<{slot}>(?:{names}){re.escape(chr(39) + 's') if slot == 'whose' else ''}|{pronouns})"
    )


def _expand(kind: str, phrasings: Phrasings, **clauses: str) -> Iterator[Template]:
  """Templates of one kind, with clauses (not slots) put in."""
  relation = clauses.pop("relation", None)
  for held_out, texts in enumerate(phrasings):
    for text in texts:
      for clause, filling in clauses.items():
        text = text.replace(f"{{{clause}}}", filling)
      yield Template(kind, relation, text, bool(held_out))


def _questions(r: phrases.Relation) -> Iterator[Template]:
  for frame in phrases.QUESTIONS.familiar:
    if frame == "{ask}":
      yield from _expand("ask", r.asks, relation=r.name)
    else:
      yield from _expand("ask", Phrasings((frame,), ()), indirect=r.indirect, relation=r.name)
  yield from _expand(
    "ask", Phrasings((), phrases.QUESTIONS.held_out), indirect=r.indirect, relation=r.name
  )
  for held_out, asks in enumerate(r.asks):
    for ask in asks:
      text = phrases.FOLLOW_UPS.replace("{ask}", ask)
      yield Template("follow", r.name, text, bool(held_out))


def _user_templates() -> Iterator[Template]:
  for r in phrases.RELATIONS.values():
    clauses = {"fact": r.facts[0], "inverted": r.inverted, "relation": r.name}
    yield from _questions(r)
    yield from _expand("premise", phrases.PREMISES, **clauses)
    yield from _expand("correct", phrases.CORRECTIONS, **clauses)
  for harm in phrases.HARMS:
    yield from _expand("request", phrases.REQUESTS, harm=harm)
    yield from _expand("alarm", phrases.ALARMS, harm=harm)
  yield from _expand("mean", Phrasings(phrases.MEANINGS, ()))


def _assistant_templates() -> Iterator[Template]:
  for r in phrases.RELATIONS.values():
    for fact in r.facts:
      yield Template("fact", r.name, f"{{opener}}{fact}.", False)
    yield Template("short", r.name, f"{r.short}.", False)
    yield Template("deny", r.name, f"{{opener}}{r.denial}.", False)
    for echo in phrases.ECHOES:
      yield Template("echo", r.name, echo.replace("{indirect}", r.indirect), False)
  for kind, texts in phrases.SENTENCES.items():
    yield from _expand(kind, Phrasings(texts, ()))


USER = tuple(_user_templates())
ASSISTANT = tuple(_assistant_templates())


@functools.cache
def templates(
  kind: str, relation: str | None = None, held_out: bool = False
) -> tuple[Template, ...]:
  """All ways to say `kind`, of the training data or held out."""
  found = (t for t in USER + ASSISTANT if (t.kind, t.relation) == (kind, relation))
  return tuple(t for t in found if t.held_out == held_out)


def sentences(text: str) -> list[str]:
  """Splits after each full stop, question mark or exclamation mark that a space follows."""
  text = text.strip()
  return re.split(r"(?<=[.?!])\s+", text) if text else []


@functools.lru_cache(maxsize=65536)
def read_user(sentence: str) -> Sentence | None:
  """What a user's sentence says, or None if the grammar does not have it."""
  return _read(USER, sentence)


@functools.lru_cache(maxsize=65536)
def read_assistant(sentence: str) -> Sentence | None:
  """What an assistant's sentence says, or None if the grammar does not have it."""
  return _read(ASSISTANT, sentence)


def _read(table: tuple[Template, ...], sentence: str) -> Sentence | None:
  return next((found for t in table if (found := t.read(sentence)) is not None), None)


def count_pieces(text: str) -> int:
  """Tokens of a text, without role markers."""
  return len(re.findall(PIECE, text))
