r"""Writes an HTML page with the scores of a passage's tokens and spans.

  python -m experiments.inspect_spans --workdir=runs/squad \
      --question="Who …?" --context="…" --output=page.html

--second_question shows the passage with two questions side by side. --png also
draws the scores near the best spans with matplotlib, for a paper. A passage of
several windows is shown with the scores of the window that holds the best span.
"""

import os
import pathlib

from absl import flags

from experiments import cli
from qa_jax import errors

WORKDIR = flags.DEFINE_string(
    'workdir', None, 'Run directory, checkpoint directory or hub id.')
QUESTION = flags.DEFINE_string('question', None, 'The question. (required)')
SECOND_QUESTION = flags.DEFINE_string(
    'second_question', None, 'A second question about the passage.')
CONTEXT = flags.DEFINE_string(
    'context', None, 'The passage to answer from. (required)')
OUTPUT = flags.DEFINE_string('output', None, 'HTML file to write.')
PNG = flags.DEFINE_string('png', None, 'PNG file to write.')
N_BEST = flags.DEFINE_integer('n_best', 10, 'Candidates listed per question.')


def main() -> None:
  from qa_jax.inference import span_view
  from qa_jax.io import files
  from qa_jax.io import plots
  from qa_jax.runtime import settings
  from qa_jax.serving import inspect_page

  for flag in QUESTION, CONTEXT:  # '' is a text, too
    cli.check_required(flag.name, none=[None])
  outputs = [pathlib.Path(f) for f in (OUTPUT.value, PNG.value) if f]
  for path in outputs:
    files.check_writable(path)
  if PNG.value:
    errors.require(PNG.value.lower().endswith('.png'), (
        f'--png={PNG.value}: expected a name that ends in .png'))
    errors.require(os.path.realpath(PNG.value) != os.path.realpath(
        OUTPUT.value), f'--png={PNG.value} is the file of --output')
  settings.configure_process()
  n_best = cli.listed(N_BEST)
  qa = cli.load_model(WORKDIR.value)
  questions = [q for q in (QUESTION.value, SECOND_QUESTION.value)
               if q is not None]
  answered = inspect_page.answer_questions(
      qa, questions, CONTEXT.value, n_best=n_best)
  html = inspect_page.render_page(qa, answered, CONTEXT.value, title=(
      f'Scores of tokens and spans: {pathlib.Path(WORKDIR.value).name}'))
  if PNG.value:
    plots.plot_spans(
        [(question, view, answer.text) for question, view, answer in answered],
        pathlib.Path(PNG.value), by_layer=True, tokens=span_view.focus_tokens(
            [view for _, view, _ in answered]))
  files.write_text(pathlib.Path(OUTPUT.value), html)
  print(', '.join(map(str, outputs)))


if __name__ == '__main__':
  cli.run(main, model=True, required=('workdir', 'output'))
