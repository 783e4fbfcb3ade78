r"""Answers one question, or every line of a JSONL file.

  python -m experiments.predict --workdir=runs/squad \
      --question="Who …?" --context="…"
  python -m experiments.predict --workdir=runs/squad \
      --input=in.jsonl --output=out.jsonl

Each input line is an object with `question` and `context`. The output line has
its `id`, the answer and the n-best list. `probability` is the posterior of a
span among all spans of its context and no answer. After experiments.calibrate,
it estimates how often such an answer is right.
"""

import dataclasses
import json
import os
import pathlib

from absl import flags

from experiments import cli
from qa_jax import errors

WORKDIR = flags.DEFINE_string(
    'workdir', None, 'Run directory, checkpoint directory or hub id.')
QUESTION = flags.DEFINE_string('question', None, 'The question.')
CONTEXT = flags.DEFINE_string('context', None, 'The passage to answer from.')
INPUT = flags.DEFINE_string('input', None, 'JSONL file of questions.')
OUTPUT = flags.DEFINE_string('output', None, 'JSONL file of answers.')
N_BEST = flags.DEFINE_integer('n_best', 5, 'Candidates listed per question.')


def main() -> None:
  from qa_jax.inference import predict
  from qa_jax.io import files
  from qa_jax.runtime import settings

  given = {f.name for f in (QUESTION, CONTEXT, INPUT, OUTPUT)
           if f.value is not None}  # '' is a valid question or context
  if given not in ({'question', 'context'}, {'input', 'output'}):
    raise errors.UserError(
        'give --question and --context, or --input and --output')
  many = INPUT.value is not None
  if many:
    if os.path.realpath(INPUT.value) == os.path.realpath(OUTPUT.value):
      raise errors.UserError(f'--output={OUTPUT.value} is the file of --input, '
                             'whose questions would be lost; choose another')
    files.check_writable(pathlib.Path(OUTPUT.value))
    questions = predict.read_questions(pathlib.Path(INPUT.value))
  else:
    questions = [{'question': QUESTION.value, 'context': CONTEXT.value}]
  settings.configure_process()
  n_best = cli.listed(N_BEST)
  qa = cli.load_model(WORKDIR.value)
  answers = qa.answer_batch(questions, progress='predict' if many else '',
                            cache=many, n_best=n_best)
  if many:
    files.write_jsonl(pathlib.Path(OUTPUT.value), (
        {**({'id': q['id']} if 'id' in q else {}), **dataclasses.asdict(a)}
        for q, a in zip(questions, answers, strict=True)))
    print(f'{len(answers)} answers in {OUTPUT.value}')
    return
  best = answers[0]
  print(best.text or '(no answer)')
  for candidate in best.n_best:
    print(f'  {candidate["score"]:8.3f}  {candidate["probability"]:6.1%}'
          f'  {json.dumps(candidate["text"], ensure_ascii=False)}'
          f'  [{candidate["start"]}:{candidate["end"]}]')
  print(f'  {best.null_score:8.3f}  {best.null_probability:6.1%}  (null)')


if __name__ == '__main__':
  cli.run(main, model=True, required=('workdir',))
