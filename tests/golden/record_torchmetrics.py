"""Records the scores that torchmetrics' SQuAD gives the golden answers.

  python tests/golden/record_torchmetrics.py    (needs torchmetrics 1.9)
"""

import json
import pathlib

import torchmetrics
from torchmetrics.functional.text import squad

HERE = pathlib.Path(__file__).parent


def main():
  answers = json.loads((HERE / 'metrics_official.json').read_text('utf-8'))[
      'answers']
  rows = [({'prediction_text': a['prediction'], 'id': str(i)},
           {'answers': {'text': a['golds'], 'answer_start': [0] * len(
               a['golds'])}, 'id': str(i)})
          for i, a in enumerate(answers) if a['golds']]
  score = lambda pairs: [
      float(v) for v in squad(*map(list, zip(*pairs, strict=True))).values()]
  (HERE / 'metrics_torchmetrics.json').write_text(json.dumps(
      {'torchmetrics': torchmetrics.__version__, 'all': score(rows),
       'each': {p['id']: score([(p, t)]) for p, t in rows}}), 'utf-8')


if __name__ == '__main__':
  main()
