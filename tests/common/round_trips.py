"""Gold answers that windows give back, for small tokenizers of three kinds.

  python -m tests.common.round_trips SPEC [SIZE]

SPEC names data, such as SQuAD's file, and SIZE the entries of a vocabulary. The
command prints the number of gold answers by `Fate`.
"""

import collections
from collections.abc import Sequence
import dataclasses
import pathlib
import sys
import tempfile

import numpy as np
import tokenizers

from qa_jax.data import sources
from qa_jax.data import tokenizer as tokenizer_lib
from qa_jax.data import tokenizer_files
from qa_jax.data import windows as windows_lib
from qa_jax.data.examples import Example

KINDS = ('wordpiece', 'bpe', 'unigram')
SPECIAL = ['<s>', '<pad>', '</s>', '<unk>', '<mask>']
LENGTHS = {'max_length': 384, 'window_overlap': 128, 'max_question_length': 64}


@dataclasses.dataclass(frozen=True, order=True)
class Fate:
  """What became of a gold answer."""

  exact: bool  # a window has it, character by character
  reason: str  # if not: the reason
  reachable: bool  # a search can find the span
  whole_words: bool  # a search of whole words can find it
  cuts_word: bool  # the answer begins or ends inside a word of BERT


def learn(kind: str, texts: Sequence[str], size: int
          ) -> tokenizer_lib.Tokenizer:
  """Learns a tokenizer like those of BERT, RoBERTa or XLM-R."""
  if kind == 'wordpiece':
    return tokenizer_lib.train_tokenizer(texts, vocab_size=size)
  parts, trainers = tokenizers.pre_tokenizers, tokenizers.trainers
  if kind == 'bpe':
    library = tokenizers.Tokenizer(tokenizers.models.BPE())
    library.pre_tokenizer = parts.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=SPECIAL, show_progress=False,
        initial_alphabet=parts.ByteLevel.alphabet())
  else:
    library = tokenizers.Tokenizer(tokenizers.models.Unigram())
    library.normalizer = tokenizers.normalizers.NFKC()
    library.pre_tokenizer = parts.Sequence(
        [parts.WhitespaceSplit(), parts.Metaspace()])
    trainer = trainers.UnigramTrainer(
        vocab_size=size, special_tokens=SPECIAL, unk_token='<unk>',
        show_progress=False)
  library.train_from_iterator(texts, trainer)
  library.post_processor = tokenizers.processors.TemplateProcessing(
      single='<s> $A </s>', pair='<s> $A </s> </s> $B </s>',
      special_tokens=[('<s>', 0), ('</s>', 2)])
  with tempfile.TemporaryDirectory() as directory:
    library.save(str(pathlib.Path(directory) / 'tokenizer.json'))
    return tokenizer_files.read_tokenizer(directory)


def fates(examples: Sequence[Example], tokenizer: tokenizer_lib.Tokenizer,
          **lengths: int) -> list[Fate]:
  """Returns the fate of each gold answer, in order, by plain loops."""
  single = [dataclasses.replace(example, id=f'{example.id}-{k}',
                                answers=(answer,))
            for example in examples for k, answer in enumerate(example.answers)]
  windows = windows_lib.make_windows(single, tokenizer, **LENGTHS | lengths)
  of_example = [[] for _ in single]
  for window, example in enumerate(windows.example_of):
    of_example[example].append(window)
  out = []
  for example, numbers in zip(single, of_example, strict=True):
    answer = example.answers[0]
    begin, end = answer.start, answer.start + len(answer.text)
    assert example.context[begin:end] == answer.text
    length = int(windows.total_lengths[numbers].max())
    rows, whole = (windows.gather(
        np.array(numbers), length, whole_words=words)
                   for words in (False, True))
    read, reachable, legal = set(), False, False
    for i, window in enumerate(numbers):
      first, last = windows.gold_spans[window, 0]
      if first > 0:
        a, b = windows.char_spans(*(np.array([x]) for x in (
            window, first, last)))
        read.add((int(a[0]), int(b[0])))
        reachable |= bool(rows['start_mask'][i, first])
        legal |= bool(whole['start_mask'][i, first]
                      and whole['end_mask'][i, last])
    assert len(read) < 2  # all windows agree
    tokens = tokenizer.encode([example.context]).offsets.tolist()
    reason = ''
    if not read:
      reason = 'no window'
    elif read != {(begin, end)}:
      inside = [where for where, place in (('begins', begin), ('ends', end))
                if any(a < place < b for a, b in tokens)]
      reason = f'{" and ".join(inside)} inside a token' if inside else 'other'
    out.append(Fate(not reason, reason, reachable, legal,
                    _cuts_word(example.context, begin, end)))
  return out


def _cuts_word(context: str, begin: int, end: int) -> bool:
  inner = {i for _, (a, b) in tokenizers.pre_tokenizers.BertPreTokenizer()
           .pre_tokenize_str(context) for i in range(a + 1, b)}
  return begin in inner or end in inner


def main() -> None:
  spec, size = sys.argv[1], int((*sys.argv[2:], '8000')[0])
  examples = sources.load_examples(spec)
  texts = sorted({text for e in examples for text in (e.context, e.question)})
  for kind in KINDS:
    counts = collections.Counter(
        fates(examples, learn(kind, texts, size)))
    print(f'{kind}: {sum(counts.values())} gold answers')
    for fate, count in sorted(counts.items(), reverse=True):
      print(f'  {count:6} {fate}')


if __name__ == '__main__':
  main()
