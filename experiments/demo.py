"""The end of `make demo`: asks the trained model and draws the pictures.

  python -m experiments.demo --workdir=runs/quickstart

Takes a held-out passage and two of its questions, prints the answers, writes
WORKDIR/plots/{learning_curve,two_questions}.png, and ends with EM and F1.
"""

import pathlib

from absl import flags

from experiments import cli
from qa_jax import evaluate
from qa_jax import files
from qa_jax import logs
from qa_jax import pictures
from qa_jax import predict
from qa_jax import runtime
from qa_jax.data import sources

WORKDIR = flags.DEFINE_string('workdir', None, 'Directory of the run.')


def main() -> None:
  cli.required(workdir=WORKDIR.value)
  workdir = pathlib.Path(WORKDIR.value)
  runtime.configure()
  qa = predict.load(workdir)
  examples = sources.load(qa.config.data.eval)
  context = examples[0].context
  asked = [e for e in examples if e.context == context and e.answers][:2]
  plots = workdir / 'plots'
  answers = qa.answer_batch([
      {'question': e.question, 'context': context} for e in asked])
  pictures.spans([
      (e.question, qa.spans(e.question, context), a.text)
      for e, a in zip(asked, answers, strict=True)],
                 plots / 'two_questions.png')
  pictures.learning_curve(
      logs.read_metrics(workdir), plots / 'learning_curve.png')
  metrics = files.read_object(
      workdir / 'eval' / evaluate.data_name(qa.config.data.eval)
      / 'metrics.json')
  print(f'pictures: {plots}/learning_curve.png, {plots}/two_questions.png')
  print(f'passage:  {context}')
  print(f'held-out: EM {metrics["exact_match"]:.2f}  F1 {metrics["f1"]:.2f} '
        f'on {metrics["total"]} questions')
  for e, a in zip(asked, answers, strict=True):
    print(f'{e.question}  →  {a.text}')


if __name__ == '__main__':
  cli.run(main)
