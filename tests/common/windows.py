"""A small vocabulary, and windows that are cut with it."""

from qa_jax.data import tokenizer
from qa_jax.data import windows
from qa_jax.data.examples import Example
from qa_jax.data.examples import GoldAnswer

VOCAB = tokenizer.Tokenizer(
    (*tokenizer.SPECIAL, *'abcdefghijklmnopqrstuvwxyz',
     *(f'##{c}' for c in 'abcdefghijklmnopqrstuvwxyz'), '.', '$'), True)


def example(n=1, question='a b', answers=(), context=None, **more):
  """Returns an example; its context is `context` or n letters and spaces."""
  context = ' '.join('abcdefghij'[i % 10] for i in range(n)) if (
      context is None) else context
  return Example(f'q{n}', question, context, tuple(
      GoldAnswer(*a) for a in answers), **more)


def cut(*examples, max_length=12, window_overlap=3, max_question_length=4):
  """Returns the windows of examples with the vocabulary VOCAB."""
  return windows.make_windows(
      examples, VOCAB, max_length=max_length, window_overlap=window_overlap,
      max_question_length=max_question_length)
