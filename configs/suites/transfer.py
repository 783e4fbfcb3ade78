"""In and out of domain, other languages, adversarial passages.

  python -m experiments.suite --workdir=runs/squad \
      --suite=configs/suites/transfer.py

SQuAD comes from TensorFlow Datasets; the rest are files that you fetch into
data/: xquad/xquad.LANGUAGE.json (Artetxe et al., 2020), mlqa/test-context-LANG
-question-LANG.json (Lewis et al., 2020), mrqa/dev and mrqa/ood/*.jsonl.gz
(Fisch et al., 2019), adversarial/{AddSent,AddOneSent}.json (Jia and Liang,
2017). What is not there is skipped and named. Variants: all, and tiny, a
rehearsal on generated corpora, one of which is missing.
"""

import ml_collections

MLQA = ('en', 'es', 'de', 'ar', 'hi', 'vi', 'zh')
XQUAD = (*MLQA, 'el', 'ru', 'tr', 'th', 'ro')
MRQA_IN = ('SQuAD', 'NewsQA', 'TriviaQA-web', 'SearchQA', 'HotpotQA',
           'NaturalQuestionsShort')
MRQA_OUT = ('BioASQ', 'DROP', 'DuoRC.ParaphraseRC', 'RACE',
            'RelationExtraction', 'TextbookQA')


def get_config(variant: str = 'all') -> ml_collections.ConfigDict:
  if variant not in ('all', 'tiny'):
    raise ValueError(f'transfer.py:{variant}: choose all or tiny')
  if variant == 'tiny':
    groups = {'generated': {
        'in_domain': 'synthetic(seed=2, size=100, split="eval")',
        'unanswerable': 'synthetic(seed=3, size=100, impossible=0.5, '
        'split="eval")'}, 'missing': {'squad2': 'data/nowhere.json'}}
  else:
    mrqa = lambda folder, names: {
        name.partition('.')[0]: f'data/mrqa/{folder}/{name}.jsonl.gz'
        for name in names}
    groups = {
        'squad': {
            'squad1': 'tfds(name="squad/v1.1", split="validation")',
            'squad2': 'tfds(name="squad/v2.0", split="validation")'},
        'adversarial': {name: f'data/adversarial/{name}.json'
                        for name in ('AddSent', 'AddOneSent')},
        'mrqa_in_domain': mrqa('dev', MRQA_IN),
        'mrqa_out_of_domain': mrqa('ood', MRQA_OUT),
        'xquad': {x: f'data/xquad/xquad.{x}.json' for x in XQUAD},
        'mlqa': {x: f'data/mlqa/test-context-{x}-question-{x}.json'
                 for x in MLQA}}
  return ml_collections.ConfigDict(groups)
