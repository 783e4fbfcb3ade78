"""Records pipeline_golden.json from the pipeline of transformers 4.57, once.

  pip install 'transformers==4.57.*' torch
  python tests/golden/record_pipeline.py

The pipeline "question-answering" was removed in transformers 5.3. The model is
tiny_bert, with the vocabulary that is recorded beside the results. Each case
holds the arguments of a call and its result.
"""

import json
import pathlib
import string
import tempfile
import warnings

import transformers

HERE = pathlib.Path(__file__).resolve().parent
LETTERS = string.ascii_lowercase
VOCAB = ['[PAD]', '[UNK]', '[CLS]', '[SEP]', '[MASK]', *LETTERS,
         *('##' + c for c in LETTERS), *string.digits, *'.,!?$-():;\'"/']
VOCAB += [f'[unused{i}]' for i in range(100 - len(VOCAB))]
# Every word is one token and no text occurs twice in a window, so that
# align_to_words and the merging of equal texts change nothing.
SHORT = 'a b: c d e, f g h! I 5'
OTHER = 'z Y, x (w) v u - t s'
PARTS = 'the ships sail, on $5 a day'  # words of several tokens
LONG = ' '.join(LETTERS[i * 7 % 26] for i in range(60))
ONE, TWO = ({'question': 'x y', 'context': SHORT},
            {'question': 'who?', 'context': OTHER})
CASES = [
    ONE, TWO, {**ONE, 'top_k': 4}, {**TWO, 'top_k': 5, 'max_answer_len': 2},
    {**ONE, 'top_k': 3, 'handle_impossible_answer': True},
    {'question': 'q', 'context': 'a b', 'top_k': 6,
     'handle_impossible_answer': True, 'max_answer_len': 1},
    {'question': ['x y', 'who?'], 'context': [SHORT, OTHER]},
    {'question': ['x y', 'who?'], 'context': SHORT, 'top_k': 2},
    {'question': ['x y'], 'context': [SHORT]},
    {'args': [ONE]}, {'args': [[ONE, TWO]]}, {'args': ['x y', SHORT]},
    {'args': [[ONE]], 'top_k': 2}, {'args': [ONE, TWO], 'top_k': 2},
    {'data': [TWO, ONE]}, {'squad_examples': [ONE, TWO]},
    {'generator': [ONE, TWO, ONE]},
    {'question': 'a ship', 'context': PARTS, 'align_to_words': False},
    {'question': 'x', 'context': 'c d', 'top_k': 3},
    {'question': 'x', 'context': LONG, 'max_seq_len': 30, 'doc_stride': 9,
     'max_answer_len': 4, 'align_to_words': False},
]


def main() -> None:
  warnings.simplefilter('ignore')
  with tempfile.TemporaryDirectory() as directory:
    vocab = pathlib.Path(directory) / 'vocab.txt'
    vocab.write_text('\n'.join(VOCAB) + '\n')
    tokenizer = transformers.BertTokenizerFast(
        str(vocab), model_max_length=40)
  model = transformers.BertForQuestionAnswering.from_pretrained(
      HERE / 'tiny_bert')
  pipe = transformers.pipeline('question-answering', model=model,
                               tokenizer=tokenizer)
  rows = []
  for case in CASES:
    options = dict(case)
    args = options.pop('args', [])
    if 'squad_examples' in options:
      args = [[transformers.SquadExample(
          None, e['question'], e['context'], None, None, None)
               for e in options.pop('squad_examples')]]
    if 'generator' in options:
      args = [(row for row in options.pop('generator'))]
    result = pipe(*args, **options)
    rows.append({'call': case, 'result': result if isinstance(
        result, dict) else list(result)})
  (HERE / 'pipeline_golden.json').write_text(json.dumps(
      {'transformers': transformers.__version__, 'vocab': VOCAB,
       'cases': rows}, indent=1) + '\n')


if __name__ == '__main__':
  main()
