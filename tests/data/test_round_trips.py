"""Windows of every kind of tokenizer give gold answers back, or say why not."""

import random

import pytest

from qa_jax.data import sources
from qa_jax.data import windows as windows_lib
from qa_jax.data.examples import Example
from qa_jax.data.examples import GoldAnswer
from tests.common import round_trips

# The window that owns a start (BERT's rule of maximal context) has at least
# half the overlap behind it, so that it has answers of 22 tokens whole.
LENGTHS = {'max_length': 84, 'window_overlap': 44, 'max_question_length': 16}
LONGEST = 20  # characters


@pytest.fixture(scope='module')
def examples() -> list[Example]:
  """Returns questions on long contexts, with answers at words and anywhere."""
  rng = random.Random(0)
  made = sources.load_examples('synthetic(size=60)')
  out = []
  for n in range(0, 60, 3):
    text = ' '.join(f'{e.context} ({rng.choice("$€£")}{rng.randint(1, 9)}.5-'
                    f"{rng.choice(['fold', 'year'])}'s)" for e in made[n:n + 3])
    starts = [i for i in range(len(text)) if not text[i].isspace()]
    answers = list(made[n].answers)
    for _ in range(12):
      begin = rng.choice(starts)
      end = begin + rng.choice((1, 4, 12, LONGEST))
      answers.append(GoldAnswer(text[begin:end].rstrip(), begin))
    out.append(Example(str(n), made[n].question, text, tuple(answers)))
  return out


@pytest.mark.parametrize('kind', round_trips.KINDS)
def test_an_answer_comes_back_or_begins_or_ends_inside_a_token(kind, examples):
  tokenizer = round_trips.learn(kind, [e.context for e in examples], 400)
  fates = round_trips.fates(examples, tokenizer, **LENGTHS)
  windows = windows_lib.make_windows(examples, tokenizer, **LENGTHS)
  assert len(windows) > 2 * len(examples)
  exact = [fate for fate in fates if fate.exact]
  others = [fate for fate in fates if not fate.exact]
  assert {fate.reason for fate in others} <= {
      f'{where} inside a token' for where in (
          'begins', 'ends', 'begins and ends')}
  assert all(fate.reachable for fate in fates)
  # Words are BERT's for each kind of tokenizer.
  assert [fate.whole_words for fate in exact] == [
      not fate.cuts_word for fate in exact]
  assert min(len(others), sum(fate.cuts_word for fate in exact),
             sum(fate.whole_words for fate in exact)) > 9
  audit = windows.audit
  assert audit['widened'] == len(others)
  assert audit['exact'] + audit['surplus'] == len(exact)
