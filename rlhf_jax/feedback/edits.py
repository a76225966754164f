"""How far what a labeler submitted is from what was suggested."""


def levenshtein(a: str, b: str) -> int:
  """The least number of characters to insert, delete or replace that turns `a` into `b`.

  The bit-vector algorithm of Myers (1999) in Hyyrö's form (2003): a column of the table of
  distances is kept as its vertical differences, one bit a character of `a`, so that a text of
  100,000 characters costs a few operations on long integers a character of `b`.
  """
  if not a or not b:
    return len(a) + len(b)
  places = {}
  for i, letter in enumerate(a):
    places[letter] = places.get(letter, 0) | 1 << i
  every, last = (1 << len(a)) - 1, 1 << len(a) - 1
  rises, falls, distance = every, 0, len(a)  # where distance grows by 1 down the column, or shrinks
  for letter in b:
    equal = places.get(letter, 0)
    diagonal = ((((equal & rises) + rises) ^ rises) | equal | falls) & every
    right_rises = (falls | ~(diagonal | rises)) & every
    right_falls = rises & diagonal
    distance += bool(right_rises & last) - bool(right_falls & last)
    right_rises, right_falls = (right_rises << 1 | 1) & every, right_falls << 1 & every
    rises = (right_falls | ~(diagonal | right_rises)) & every
    falls = right_rises & diagonal
  return distance


def edit_fraction(a: str, b: str) -> float:
  """Levenshtein distance over the length of the longer text: 0 untouched, 1 nothing kept."""
  return levenshtein(a, b) / max(len(a), len(b), 1)
