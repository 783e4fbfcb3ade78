"""Records metrics_official.json from the official SQuAD scripts, by hand, once.

  python tests/golden/record_metrics.py \
      --v1=evaluate-v1.1.py --v2=evaluate-v2.0.py

The scripts of Rajpurkar et al. (2016; 2018) are linked from
https://rajpurkar.github.io/SQuAD-explorer/. Record with Python 3.11: from 3.12
on, `sum` compensates rounding, which changes last digits of version 2.0.
All recorded values come from the scripts;
no code of qa_jax runs. Re-record only to add cases.
"""

import argparse
import importlib.util
import json
import pathlib
import random
import subprocess
import sys
import tempfile

HERE = pathlib.Path(__file__).resolve().parent

# (prediction, golds)
ANSWERS = [
    ('Denver Broncos', ['Denver Broncos', 'The Denver Broncos']),
    ('the Denver Broncos!', ['Denver  Broncos']),
    ('in Denver', ['Denver', 'in Denver, Colorado', 'Colorado']),
    ('Denver', ['Boston', 'the city of Denver']),
    ('to be or not to be', ['to be', 'not to be']),
    ('b b c', ['b c c', 'b b b']),
    ('b', ['b c d e f']),  # 2pr / (p + r) is not 2·common / (m + n) in bits
    ('b c', ['b c d e f']),
    ('the', ['the']),
    ('the', ['The', 'a']),
    ('the', ['']),
    ('', ['the']),
    ('', ['']),
    ('', ['Denver']),
    ('Denver', ['']),
    ('Denver', ['the', 'Denver']),
    ('', ['the', 'Denver']),
    ('a', ['the', 'Denver']),
    ('.', ['...', '!']),
    ('the', []),
    ('', []),
    ('Denver', []),
    (' \t\n', []),
    ('$5.50', ['550', '5 50', '5.50']),
    ('U.S.', ['US', 'us']),
    ("Broncos' win", ['Broncos win']),
    ('well-known', ['wellknown', 'well known']),
    ('A.N. Other', ['Other', 'an other', 'N Other']),
    ('a-the', ['athe', '']),
    ('another theme', ['other me', 'another theme']),
    ('“Denver”', ['Denver', '"Denver"']),
    ('1963–1965', ['1963-1965', '19631965', '1963 1965']),
    ('Denver…', ['Denver...', 'Denver']),
    ('¿qué?', ['qué', '¿qué']),
    ('Beyoncé', ['Beyonce', 'beyonc\u0065\u0301', 'BEYONCÉ']),
    ('İstanbul', ['istanbul', 'i\u0307stanbul']),
    ('straße', ['STRASSE', 'STRAẞE']),
    ('to\u00a0Denver', ['to Denver']),
    ('to\u3000Denver\u2028now', ['to Denver now']),
    ('to\u200bDenver', ['to Denver', 'toDenver']),
    ('l’the', ['l’', 'l’ ', 'lthe']),
    ('é the é', ['é é', 'éthe é']),
    ('a_the', ['athe', 'a the']),
    ('東京 タワー', ['東京', '東京タワー']),
]

WORDS = [
    'the', 'a', 'an', 'The', 'of', 'in', 'Denver', 'denver', 'Broncos,',
    '1963', '1963–65', 'U.S.', '“city”', 'Beyoncé', '-', '...', 'and', 'river',
    'river.', 'king', '(king)', 'two', 'Two']


def salad(rng: random.Random, longest: int) -> str:
  return ' '.join(rng.choices(WORDS, k=rng.randint(0, longest)))


def random_set(seed: int, size: int, no_answer: float) -> dict:
  """Returns questions with golds, always-answer predictions, tied na_probs."""
  rng = random.Random(seed)
  golds, predictions, na_probs = {}, {}, {}
  for i in range(size):
    name = f'q{i:03d}'
    golds[name] = [] if rng.random() < no_answer else [
        salad(rng, 6) for _ in range(rng.randint(1, 4))]
    predictions[name] = (
        rng.choice(golds[name]) if golds[name] and rng.random() < 0.4
        else '' if rng.random() < 0.1 else salad(rng, 6))
    mean = 0.4 if golds[name] else 0.6
    na_probs[name] = round(min(max(rng.gauss(mean, 0.2), 0.0), 1.0), 2)
  names = list(golds)
  rng.shuffle(names)  # ties are broken by the order of this file
  return {'golds': golds, 'predictions': predictions,
          'na_probs': {k: na_probs[k] for k in names}}


def make_sets() -> dict[str, dict]:
  sets = {
      'salad': random_set(1, 200, 0.5),
      'answerable': random_set(2, 100, 0.0),
      'unanswerable': random_set(3, 20, 1.0),
      'ties': {
          'golds': {'a': ['x'], 'b': [], 'c': ['y'], 'd': [], 'e': ['z']},
          'predictions': {'a': 'x', 'b': 'wrong', 'c': 'y', 'd': 'the',
                          'e': ''},
          'na_probs': {'c': 0.5, 'd': 0.5, 'b': 0.5, 'a': 0.5, 'e': 0.5}},
      'logits': {
          'golds': {'a': ['x'], 'b': [], 'c': ['y'], 'd': []},
          'predictions': {'a': 'x', 'b': 'wrong', 'c': 'y', 'd': 'wrong'},
          'na_probs': {'a': -7.5, 'b': 3, 'c': 1.5, 'd': -1}},
      'article': {
          'golds': {'a': [], 'b': ['x']},
          'predictions': {'a': 'the', 'b': 'x'},
          'na_probs': {'a': 0.1, 'b': 0.2}},
      'hopeless': {
          'golds': {'a': ['x'], 'b': []},
          'predictions': {'a': 'wrong', 'b': 'wrong'},
          'na_probs': {'a': 0.1, 'b': 0.2}},
  }
  full = sets['answerable']
  sets['missing'] = full | {'predictions': {
      k: v for k, v in full['predictions'].items() if not k.endswith('7')}}
  sets['unknown'] = sets['ties'] | {
      'predictions': sets['ties']['predictions'] | {'nobody': 'x'},
      'na_probs': {'nobody': 0.0} | sets['ties']['na_probs']}
  # Predictions after a threshold, as a run writes them.
  full = sets['salad']
  sets['thresholded'] = full | {'predictions': {
      k: '' if full['na_probs'][k] > 0.1 else v
      for k, v in full['predictions'].items()}}
  return sets


# (version, set, --na-prob-thresh; None: no --na-prob-file either)
RUNS = [
    ('1.1', 'answerable', None), ('1.1', 'missing', None),
    ('2.0', 'answerable', None), ('2.0', 'answerable', 0.5),
    ('2.0', 'unanswerable', None), ('2.0', 'unanswerable', 0.5),
    ('2.0', 'salad', None), ('2.0', 'salad', 1.0), ('2.0', 'salad', 0.5),
    ('2.0', 'salad', 0.37), ('2.0', 'salad', 0.0), ('2.0', 'salad', -1.0),
    ('2.0', 'thresholded', None), ('2.0', 'thresholded', 1.0),
    ('2.0', 'ties', 1.0), ('2.0', 'ties', 0.5), ('2.0', 'ties', 0.4),
    ('2.0', 'logits', 1.0), ('2.0', 'logits', -2.0),
    ('2.0', 'article', 1.0), ('2.0', 'hopeless', 1.0), ('2.0', 'unknown', 1.0),
]


def squad(golds: dict[str, list[str]], version: str) -> dict:
  return {'version': version, 'data': [{'title': '', 'paragraphs': [{
      'context': '', 'qas': [
          {'id': k, 'question': '', 'answers': [
              {'text': t, 'answer_start': 0} for t in texts]}
          for k, texts in golds.items()]}]}]}


def run_script(script: str, case: dict, version: str,
               threshold: float | None) -> dict[str, float]:
  """Returns the output of a script; `threshold` None leaves out na_probs."""
  with tempfile.TemporaryDirectory() as folder:
    paths = {name: pathlib.Path(folder) / f'{name}.json'
             for name in ('data', 'predictions', 'na_probs')}
    for name, value in {**case, 'data': squad(case['golds'], version)}.items():
      if name in paths:
        paths[name].write_text(json.dumps(value))
    command = [sys.executable, script, paths['data'], paths['predictions']]
    if threshold is not None:
      command += ['--na-prob-file', paths['na_probs'],
                  f'--na-prob-thresh={threshold}']
    return json.loads(subprocess.run(
        command, check=True, stdout=subprocess.PIPE).stdout)


def load(script: str):
  spec = importlib.util.spec_from_file_location('official', script)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


def score_answers(v1, v2, pairs: list[tuple[str, list[str]]]) -> list[dict]:
  """Returns [EM, F1] of each pair by version; null: 1.1 fails without golds."""
  rows = []
  for prediction, golds in pairs:
    one = [float(v1.metric_max_over_ground_truths(f, prediction, golds))
           for f in (v1.exact_match_score, v1.f1_score)] if golds else None
    exact, f1 = v2.get_raw_scores(
        squad({'q': golds}, '2.0')['data'], {'q': prediction})
    rows.append({'prediction': prediction, 'golds': golds, '1.1': one,
                 '2.0': [float(exact['q']), float(f1['q'])]})
  return rows


def main() -> None:
  parser = argparse.ArgumentParser()
  parser.add_argument('--v1', required=True)
  parser.add_argument('--v2', required=True)
  scripts = vars(parser.parse_args())
  if sys.version_info >= (3, 12):
    sys.exit('record with Python 3.11: later ones sum differently')
  v1, v2 = load(scripts['v1']), load(scripts['v2'])
  sets = make_sets()
  recorded = {
      'answers': score_answers(v1, v2, ANSWERS),
      'normalized': {text: v2.normalize_answer(text) for text in sorted(
          {t for prediction, golds in ANSWERS for t in (prediction, *golds)})},
      'sets': sets,
      'runs': [
          {'version': version, 'set': name, 'threshold': threshold,
           'expected': run_script(
               scripts['v1' if version == '1.1' else 'v2'], sets[name],
               version, threshold)}
          for version, name, threshold in RUNS]}
  (HERE / 'metrics_official.json').write_text(
      json.dumps(recorded, indent=1) + '\n')


if __name__ == '__main__':
  main()
