"""A generated corpus of invented people, ships, rivers, books and battles.

A model can answer its questions only by reading the passage: all facts are
invented, and the splits train and eval share no invented word.
"""

import random

from qa_jax import errors
from qa_jax.data import synthetic_templates
from qa_jax.data.examples import Example
from qa_jax.data.examples import GoldAnswer

ONSETS = ('b', 'd', 'f', 'g', 'h', 'k', 'l', 'm', 'n', 'p', 'r', 's', 't', 'v',
          'z', 'br', 'dr', 'gr', 'kr', 'st')
VOWELS = ('a', 'e', 'i', 'o', 'u')
CODAS = ('', '', 'l', 'n', 'r', 's', 'th')
SPLITS = ('train', 'eval')
QUESTIONS_PER_PASSAGE = 4
# Further sentences of a passage. A quarter of them has a year, and no year may
# stand twice: of 4,000 sentences, 1,000 would need distinct years of the 900.
MAX_SENTENCES = 2000


def synthetic(*, seed: int = 0, size: int = 2000, subjects: int = 1,
              facts: int = 4, sentences: int = 0, impossible: float = 0.0,
              repeats: float = 0.2, kinds: str = '', paraphrases: int = 9,
              split: str = 'train') -> list[Example]:
  """Generates `size` examples; equal arguments give equal examples anywhere.

  A passage states `facts` facts about each of its `subjects`. They share their
  relations, so that only the name in a sentence tells them apart. `sentences`
  further sentences, at most MAX_SENTENCES, lengthen a passage; a thousand
  tokens need about 120. `repeats` is the share of passages that mention one
  answer twice. `impossible` is the share of questions that ask for a fact not
  in the passage. `kinds` lists kinds of subjects, such as "person,ship"; '' is
  all kinds. With fewer kinds, a model trained from scratch learns to read
  sooner.

  Raises:
    UserError: a parameter has the wrong type or is out of bounds.
  """
  for name, value, low, high in (
      ('seed', seed, 0, 2**63), ('size', size, 1, 10**7),
      ('subjects', subjects, 1, 8), ('facts', facts, 1, 8),
      ('sentences', sentences, 0, MAX_SENTENCES),
      ('impossible', impossible, 0, 1), ('repeats', repeats, 0, 1),
      ('paraphrases', paraphrases, 1, 9)):
    types = (int, float) if name in ('impossible', 'repeats') else (int,)
    if type(value) not in types or not low <= value <= high:
      raise errors.UserError(
          f'synthetic: {name}={value!r} must be '
          f'{"a number" if float in types else "an integer"} in {low} … {high}')
  known_kinds = synthetic_templates.KINDS
  chosen = kinds.split(',') if kinds else list(known_kinds)
  for what, value, known in (('split', split, SPLITS), *(
      ('kind', kind, known_kinds) for kind in chosen)):
    if value not in known:
      raise errors.UserError(f'synthetic: unknown {what} {value!r}'
                             f'{errors.did_you_mean(str(value), known)}')
  rng = random.Random(f'{split} {seed}')
  examples: list[Example] = []
  while len(examples) < size:
    passage = _Passage(rng, SPLITS.index(split), chosen, subjects, facts,
                       sentences, repeats, paraphrases)
    for _ in range(min(QUESTIONS_PER_PASSAGE, subjects * facts,
                       size - len(examples))):
      question, answers = passage.ask(rng, impossible)
      examples.append(Example(
          f'synthetic-{split}-{seed}-{len(examples)}', question,
          passage.context, answers, not answers, passage.title))
  return examples


class _Passage:
  """A context and the facts that its questions can ask for."""

  def __init__(self, rng: random.Random, parity: int, kinds: list[str],
               subjects: int, facts: int, sentences: int, repeats: float,
               paraphrases: int):
    self._paraphrases = paraphrases
    names = _Names(rng, parity)
    kind = synthetic_templates.KINDS[rng.choice(kinds)]
    stated = rng.sample(kind.relations, facts)
    while facts > 1 and len({r.answer for r in stated}) == facts:
      stated = rng.sample(kind.relations, facts)  # two need equal answer types
    self._unstated = [r for r in kind.relations if r not in stated]
    self._names = [names.fill(kind.name) for _ in range(subjects)]
    self.title = self._names[0]
    pronoun = rng.choice(kind.pronouns)
    statements = [(subject, relation, names.draw(relation.answer))
                  for subject in self._names for relation in stated]
    rng.shuffle(statements)
    # (sentence with a placeholder {A}, answer, stated fact or None)
    lines = []
    for n, (subject, relation, answer) in enumerate(statements):
      known = n and subjects == 1 and rng.random() < 0.8
      lines.append((rng.choice(relation.statements[:paraphrases]).replace(
          '{S}', pronoun if known else subject).replace('{N}', subject),
                    answer, (subject, relation)))
    asides = [(kind, names.draw(kind)) for kind in rng.choices(
        list(synthetic_templates.ASIDES), k=sentences)]
    if rng.random() < repeats:
      _, relation, answer = rng.choice(statements)
      asides.append((relation.answer, answer))
    for answer_kind, answer in asides:
      lines.insert(rng.randrange(len(lines) + 1), (
          rng.choice(synthetic_templates.ASIDES[answer_kind]), answer, None))
    self._open: list[tuple[str, synthetic_templates.Relation, GoldAnswer]] = []
    self.context = ''
    for line, answer, fact in lines:
      before, after = line.split('{A}')
      sentence = before + answer + after
      space = ' ' if self.context else ''
      begin = len(self.context) + len(space) + len(before)
      self.context += space + sentence[0].upper() + sentence[1:]
      if fact:
        self._open.append((*fact, GoldAnswer(answer, begin)))
    rng.shuffle(self._open)

  def ask(self, rng: random.Random,
          impossible: float) -> tuple[str, tuple[GoldAnswer, ...]]:
    """Returns a new question and its gold answers."""
    subject, relation, gold = self._open.pop()
    answers: tuple[GoldAnswer, ...] = (gold,)
    if rng.random() < impossible:
      relation, answers = rng.choice(self._unstated), ()
    question = rng.choice(relation.questions[:self._paraphrases])
    return question.replace('{N}', subject), answers


class _Names:
  """A generator of invented names, unique within a passage."""

  def __init__(self, rng: random.Random, parity: int):
    self._rng, self._parity, self._used = rng, parity, set()

  def fill(self, pattern: str) -> str:
    while '{W}' in pattern:
      pattern = pattern.replace('{W}', self._fresh(self._syllables), 1)
    return pattern

  def draw(self, kind: str) -> str:
    if kind in ('year', 'count'):
      low, high = (1100, 1999) if kind == 'year' else (11, 999)
      return self._fresh(lambda: str(self._rng.randint(low, high)))
    return self.fill('{W} {W}' if kind == 'person' else '{W}')

  def _fresh(self, make) -> str:
    while (name := make()) in self._used:
      pass
    self._used.add(name)
    return name

  def _syllables(self) -> str:
    # The indices of the two syllables sum to the parity of the split. Spelling
    # determines the syllables, so that no word occurs in both splits.
    parts = [self._rng.randrange(len(ONSETS) * len(VOWELS)) for _ in range(2)]
    if sum(parts) % 2 != self._parity:
      parts[1] ^= 1
    word = ''.join(ONSETS[p // len(VOWELS)] + VOWELS[p % len(VOWELS)]
                   for p in parts)
    return word.capitalize() + self._rng.choice(CODAS)
