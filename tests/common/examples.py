"""Small files in every format of a data source."""

import copy
import json
import pathlib

from qa_jax.data.examples import Example
from qa_jax.data.examples import GoldAnswer

CONTEXT = 'Mira built the Osprey in Tarn. The Osprey sank.'
SQUAD = {'version': 'v2.0', 'data': [{'title': 'Osprey', 'paragraphs': [{
    'context': CONTEXT, 'qas': [
        {'id': 'who', 'question': 'Who built it?', 'is_impossible': False,
         'answers': [{'text': 'Mira', 'answer_start': 0}]},
        {'id': 'what', 'question': 'What sank?', 'is_impossible': False,
         'answers': [{'text': 'the Osprey', 'answer_start': 11},
                     {'text': 'Osprey', 'answer_start': 35}]},
        {'id': 'when', 'question': 'When?', 'is_impossible': True,
         'answers': [],
         'plausible_answers': [{'text': 'Tarn', 'answer_start': 25}]}]}]}]}
MRQA_ROW = {'id': '', 'context': CONTEXT, 'qas': [
    {'qid': 'what', 'question': 'What sank?', 'answers': ['osprey'],
     'detected_answers': [
         {'text': 'Osprey', 'char_spans': [[15, 20], [35, 40], [15, 20]],
          'token_spans': [[3, 3], [8, 8], [3, 3]]},
         {'text': 'Tarn', 'char_spans': [[25, 28]]}]}]}
MRQA = (json.dumps({'header': {'dataset': 'invented', 'split': 'dev'}}) + '\n'
        + json.dumps(MRQA_ROW) + '\n')
GOLDS = (GoldAnswer('Osprey', 15), GoldAnswer('Osprey', 35),
         GoldAnswer('Tarn', 25))
MRQA_EXAMPLES = [Example('what', 'What sank?', CONTEXT, GOLDS,
                         accepted=('osprey',))]


def write(path: pathlib.Path, content) -> str:
  """Writes bytes, text or (other values) JSON; returns the path as a SPEC."""
  if not isinstance(content, (bytes, str)):
    content = json.dumps(content)
  path.write_bytes(content if isinstance(content, bytes)
                   else content.encode('utf-8', 'surrogatepass'))
  return str(path)


def changed(tree, path, value):
  """Returns a copy of a JSON tree with the value at `path` replaced."""
  if not path:
    return value
  tree = copy.deepcopy(tree)
  holder = tree
  for key in path[:-1]:
    holder = holder[key]
  holder[path[-1]] = value
  return tree


QA = ('data', 0, 'paragraphs', 0, 'qas', 0)
START = (*QA, 'answers', 0, 'answer_start')
