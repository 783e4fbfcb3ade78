"""Answers two questions about a held-out passage, as the end of `make demo`.

  python -m experiments.demo --workdir=runs/quickstart

Prints EM and F1 of the held-out data, both answers and a command that asks the
first question again. It writes WORKDIR/plots/learning_curve.png and
WORKDIR/plots/two_questions.png.
"""

import pathlib
import shlex

from absl import flags

from experiments import cli
from qa_jax import errors

WORKDIR = flags.DEFINE_string('workdir', None, 'Directory of the run.')


def main() -> None:
  from qa_jax.checkpoints.run_directory import RunDirectory
  from qa_jax.data import sources
  from qa_jax.inference import span_view
  from qa_jax.io import plots as plots_lib
  from qa_jax.metrics import predictions as predictions_lib
  from qa_jax.runtime import settings

  workdir = pathlib.Path(WORKDIR.value)
  settings.configure_process()
  qa = cli.load_model(WORKDIR.value)
  if not qa.config.data.eval:
    raise errors.UserError(
        f'{workdir}: config.data.eval is empty, so the run has no held-out '
        'passage to ask about; use python -m experiments.predict')
  examples = [e for e in sources.load_examples(qa.config.data.eval)
              if e.answers]
  if not examples:
    raise errors.UserError(
        f'{workdir}: no question of config.data.eval={qa.config.data.eval!r} '
        'has an answer to show; use python -m experiments.predict')
  context = examples[0].context
  questions = [e for e in examples if e.context == context][:2]
  plots = workdir / 'plots'
  answers = qa.answer_batch([
      {'question': e.question, 'context': context} for e in questions])
  views = [qa.spans(e.question, context) for e in questions]
  plots_lib.plot_spans([
      (e.question, view, a.text)
      for e, view, a in zip(questions, views, answers, strict=True)],
      plots / 'two_questions.png', tokens=span_view.focus_tokens(views))
  plots_lib.plot_learning_curve(
      RunDirectory(workdir).read_metrics(), plots / 'learning_curve.png')
  metrics = predictions_lib.read_metrics(
      RunDirectory(workdir).evaluation(qa.config.data.eval)
      / predictions_lib.METRICS)
  print(f'held-out: {cli.scores_line(metrics)}')
  print(f'passage:  {context}')
  for e, a in zip(questions, answers, strict=True):
    print(f'{e.question}  →  {a.text or "(no answer)"}')
  print(f'pictures: {plots}/learning_curve.png, {plots}/two_questions.png')
  asked = shlex.join([f'--question={questions[0].question}',
                      f'--context={context}'])
  print('next: change the question or the passage of this command\n'
        '  python -m experiments.predict '
        f'{cli.workdir_flags(workdir, qa.config)} {asked}\n'
        'A model from scratch knows only its corpus. To read real text, see '
        '"Fine-tune on SQuAD" in README.md.')


if __name__ == '__main__':
  cli.run(main, model=True, required=('workdir',))
