"""Features as made by run_qa's prepare_train_features."""

import pathlib
import time

import numpy as np
import torch_squad
import transformers

LENGTH, OVERLAP = 384, 128


class Features:

  def load(self, data, folder):
    self.rows = torch_squad.read_squad(data)
    self.tokenizer = transformers.BertTokenizerFast(
        vocab=str(pathlib.Path(folder) / 'vocab.txt'), do_lower_case=True)
    # The datasets library maps batches of 1000 columns.
    self.columns = [{key: [row[key] for row in self.rows[i:i + 1000]]
                     for key in ('question', 'context', 'answers')}
                    for i in range(0, len(self.rows), 1000)]

  def write(self, target):
    feats = torch_squad.features(self.tokenizer, self.rows, LENGTH, OVERLAP)
    shape = len(feats), LENGTH
    out = {'token_ids': np.full(shape, self.tokenizer.pad_token_id, np.int32),
           'token_type_ids': np.zeros(shape, np.int32),
           'start_positions': np.array([f['start'] for f in feats]),
           'end_positions': np.array([f['end'] for f in feats])}
    for k, f in enumerate(feats):
      n = len(f['input_ids'])
      out['token_ids'][k, :n] = f['input_ids']
      out['token_type_ids'][k, :n] = f['token_type_ids']
    np.savez(target, **out)

  def run(self, name):
    """Returns the seconds of all batches; 'pad 384' is run_qa's default."""
    padding = 'max_length' if name == 'pad 384' else False
    began = time.perf_counter()
    for columns in self.columns:
      prepare_train_features(self.tokenizer, columns, padding)
    return time.perf_counter() - began


def prepare_train_features(tokenizer, columns, padding):
  """Tokenises a batch of columns and labels every window, as run_qa does."""
  encoded = tokenizer(
      [q.lstrip() for q in columns['question']], columns['context'],
      truncation='only_second', max_length=LENGTH, stride=OVERLAP,
      return_overflowing_tokens=True, return_offsets_mapping=True,
      padding=padding)
  sample_of = encoded.pop('overflow_to_sample_mapping')
  offset_mapping = encoded.pop('offset_mapping')
  encoded['start_positions'], encoded['end_positions'] = [], []
  for i, offsets in enumerate(offset_mapping):
    ids = encoded['input_ids'][i]
    cls = ids.index(tokenizer.cls_token_id)
    sequence = encoded.sequence_ids(i)
    answers = columns['answers'][sample_of[i]]
    start = end = cls
    if answers:
      first = answers[0]['answer_start']
      last = first + len(answers[0]['text'])
      left = 0
      while sequence[left] != 1:
        left += 1
      right = len(ids) - 1
      while sequence[right] != 1:
        right -= 1
      if offsets[left][0] <= first and offsets[right][1] >= last:
        while left < len(offsets) and offsets[left][0] <= first:
          left += 1
        start = left - 1
        while offsets[right][1] >= last:
          right -= 1
        end = right + 1
    encoded['start_positions'].append(start)
    encoded['end_positions'].append(end)
  return encoded


def calls():
  features = Features()
  return {'load': features.load, 'write': features.write,
          'run': features.run}
