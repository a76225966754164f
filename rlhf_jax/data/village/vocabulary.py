"""The village's tokenizer: one token a word, a few hundred in all."""

import re

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from rlhf_jax.data.village import grammar, phrases
from rlhf_jax.data.village.world import World

SPECIALS = ("<pad>", "<unk>", "<system>", "<user>", "<assistant>", "<end>")
SPACE = "▁"  # the mark of a word that a space, or nothing, goes before


def words(world: World) -> tuple[str, ...]:
  """All tokens of the world's language but the special ones, sorted.

  They depend on the world's relations only: worlds of other seeds and sizes share their ids.
  """
  texts = [" ".join(phrases.NAMES)]
  relations = (None, *world.relations)
  for template in grammar.USER + grammar.ASSISTANT:
    if template.relation in relations:
      for name in ("Alice", "Bob"):
        openers = ["", *phrases.OPENERS] if "{opener}" in template.text else [""]
        for opener in openers:
          fillings = [template.fill(name, opener=opener, by_name=by) for by in (True, False)]
          texts += fillings
  for relation in world.relations:
    texts.append(" ".join(phrases.RELATIONS[relation].values))
  return tuple(sorted({piece for text in texts for piece in _pieces(text)}))


def build_tokenizer(world: World) -> tokenizers.Tokenizer:
  """A word-level `tokenizers.Tokenizer`; `decode(encode(text)) == text` for all of the grammar.

  A word is the same token at the start of a text, after a role marker and inside a sentence.
  `<pad>` is no other token's double, and `<end>` ends a message.
  """
  vocabulary = {token: i for i, token in enumerate((*SPECIALS, *words(world)))}
  tokenizer = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
  tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
    [
      pre_tokenizers.Metaspace(replacement=SPACE, prepend_scheme="always"),
      pre_tokenizers.Split(tokenizers.Regex(r"'s|[.,?!]"), behavior="isolated"),
    ]
  )
  tokenizer.decoder = decoders.Metaspace(replacement=SPACE, prepend_scheme="always")
  tokenizer.add_special_tokens(
    [tokenizers.AddedToken(token, special=True, normalized=False) for token in SPECIALS]
  )
  return tokenizer


def _pieces(text: str) -> list[str]:
  pieces = re.findall(grammar.PIECE, text)
  return [SPACE + piece if piece[0].isalpha() else piece for piece in pieces]
