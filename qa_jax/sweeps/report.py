"""The report of a comparison as Markdown, HTML, CSV, LaTeX and pictures."""

from collections.abc import Callable, Mapping, Sequence
import csv
import io
import math
import pathlib

from matplotlib import figure
import numpy as np

from qa_jax.io import documents
from qa_jax.io import files
from qa_jax.io import plots
from qa_jax.metrics import significance
from qa_jax.sweeps import compare

TITLES = {  # of metrics; a metric that no run has gets no column
    'exact_match': 'EM', 'f1': 'F1', 'has_answer_exact_match': 'HasAns EM',
    'has_answer_f1': 'HasAns F1', 'no_answer_exact_match': 'NoAns',
    'at_zero_f1': 'F1 at 0', 'at_held_out_f1': 'F1 at held-out τ',
    'best_f1': 'best F1', 'calibration_error_before': 'ECE at t = 1',
    'calibration_error': 'ECE'}
COSTS = {  # title, form
    'window_time': ('time per window', '{:.2f} ×'),
    'memory': ('memory', '{:.2f} ×'),
    'device_seconds': ('device-seconds', '{:,.0f}'),
    'compile_seconds': ('compiling (s)', '{:.1f}')}
NOTES = {
    'window_time': ' Time per window, of training, and memory are relative to '
                   'the default; they mean something if the trials ran alike.',
    'device_seconds': ' Device-seconds and compiling are means over runs, of '
                      'the steps and evaluations that led to the result, '
                      'without those of a stopped run after its last row.'}
POWER_SEEDS = (3, 5, 10, 20, 40)  # seeds of the table of power
LATEX = str.maketrans({
    **{symbol: f'\\{symbol}' for symbol in '{}&%$#_'},
    '\\': r'\textbackslash{}', '~': r'\textasciitilde{}',
    '^': r'\textasciicircum{}'})
READING = (
    'Δ is variant − default in percentage points, on the same questions and '
    'averaged over the seeds that both have, whose number is given; ± is the '
    'standard deviation over those seeds. The floor is the difference that '
    'seeds alone cause: the standard deviation of the difference between two '
    'means over as many seeds of the default. The interval is a 95 % '
    'percentile bootstrap over seeds, articles and the questions of an article '
    f'({significance.BOOTSTRAPS} draws; with few seeds their part is too '
    'narrow). p is that of a two-sided paired sign-flip permutation test over '
    'questions, on scores averaged over seeds '
    f'({significance.RESAMPLES} patterns of signs, or all there are). p '
    '(articles) turns all questions of an article at once. p (seeds) is that '
    'of a paired t-test over seeds. p (Holm) is the larger of p and p (seeds), '
    'corrected for the number of variants, each score by itself. A difference '
    f'counts if there are at least {compare.MIN_SEEDS} common seeds, p (Holm) '
    '< 0.05, |Δ| exceeds the floor and the interval leaves out 0.')


def write_report(comparison: compare.Comparison, output: pathlib.Path) -> None:
  """Writes all files of the report into `output`, curves if there are any."""
  plot_report(comparison, output / 'report.png')
  if has_curves(comparison):
    plot_curves(comparison, output / 'report_curves.png')
  files.write_text(output / 'report.md', report_markdown(comparison))
  files.write_text(output / 'report.csv', csv_table(comparison))
  files.write_text(output / 'report_runs.csv', csv_of_runs(comparison))
  files.write_text(output / 'report.tex', latex_table(comparison))
  files.write_text(output / 'report.html', documents.to_html(
      report_blocks(comparison), output))


def report_blocks(comparison: compare.Comparison) -> list[documents.Block]:
  """Returns the report as a list of document blocks."""
  shown, costs = _shown(comparison), _costs(comparison)
  known = [k for k in COSTS if any(not math.isnan(c[k]) for c in costs)]
  variants = comparison.variants
  best = max(variants, key=lambda v: v.mean('f1'))
  default = comparison.default and f' The default has {comparison.default}.'
  blocks = [
      documents.Title(
          1, f'{_variants(comparison)} on {comparison.questions} questions'),
      documents.Text(_headline(comparison)),
      documents.Text(f'Data: {comparison.data}.{default}'),
      *map(documents.Text, _earlier(comparison)),
      documents.Text(f'Best F1: {best.label}, '
                     f'{_spread(best.mean("f1"), best.sd("f1"))} over '
                     f'{len(best.runs)} seeds; its config is '
                     f'{best.runs[0].path}/config.json.'),
      documents.Table([
          'variant', 'seeds', *(TITLES[k] for k in shown),
          'F1, 95 % over seeds', *(COSTS[k][0] for k in known)], [[
              v.label, str(len(v.runs)),
              *(_spread(v.mean(k), v.sd(k)) for k in shown), _interval(v, 'f1'),
              *(_number(cost[k], COSTS[k][1]) for k in known)]
              for v, cost in zip(variants, costs, strict=True)]),
      documents.Text(
          '± is the standard deviation over seeds; the 95 % interval is '
          "Student's, of the mean over seeds." + ''.join(
              text for name, text in NOTES.items() if name in known))]
  for score in compare.SCORES:
    compared = [v for v in variants if score in v.deltas]
    if compared:
      blocks += [
          documents.Title(2, f'{TITLES[score]} against the default'),
          documents.Table(['variant', 'seeds', 'Δ', 'floor', '95 % interval',
                           'p', 'p (articles)', 'p (seeds)', 'p (Holm)',
                           'counts'],
                          [_delta(v.label, v.deltas[score]) for v in compared])]
  if len(variants) > 1:
    blocks += [documents.Text(READING)]
  blocks += _power_blocks(comparison)
  blocks += [documents.Picture('Per-seed scores', 'report.png')]
  if has_curves(comparison):
    blocks += [documents.Picture('Learning curves', 'report_curves.png')]
  if comparison.left_out:
    blocks += [documents.Title(2, 'Left out'),
               documents.Items(list(comparison.left_out.items()))]
  return blocks


def _power_blocks(comparison: compare.Comparison) -> list[documents.Block]:
  """Returns the table of detectable differences; [] for one default seed."""
  default = comparison.variants[0]
  if len(default.runs) < 2:
    return []
  return [
      documents.Title(2, 'Power'),
      documents.Table(
          ['seeds', *(f'{TITLES[score]}, points' for score in compare.SCORES)],
          [[str(seeds), *(_number(compare.detectable_difference(
              comparison, score, seeds)) for score in compare.SCORES)]
           for seeds in sorted({*POWER_SEEDS, max(
               len(default.runs), compare.MIN_SEEDS)})]),
      documents.Text(
          'The smallest true difference that the test over seeds and the one '
          f'over {comparison.questions:,} questions each find with a '
          f'probability of 80 %, at the level 0.05 / {comparison.planned}. It '
          f'is estimated from {len(default.runs)} seeds of the default: the '
          'smaller their number, the rougher the estimate.')]


def headline(comparison: compare.Comparison) -> list[str]:
  """Returns lines on the default, the result, and the missing runs."""
  default = comparison.variants[0]
  em, f1 = (_spread(default.mean(name), default.sd(name))
            for name in compare.SCORES)
  lines = [f'{_variants(comparison)} on {comparison.questions} '
           f'questions of {comparison.data}; {default.label}: EM {em}  F1 {f1}',
           _headline(comparison)]
  seeds = len(default.runs)
  if seeds >= compare.MIN_SEEDS:
    power = compare.detectable_difference(comparison, 'f1', seeds)
    lines.append(f'{seeds} seeds show a true difference of {_number(power)} '
                 'points F1 with a probability of 80 %')
  lines += _earlier(comparison)
  if comparison.left_out:
    path, reason = next(iter(comparison.left_out.items()))
    lines.append(f'left out: {len(comparison.left_out)} runs, the first is '
                 f'{path}: {reason}')
  return lines


def _earlier(comparison: compare.Comparison) -> list[str]:
  """Returns a line on the runs that are not scored at their last step."""
  found = [f'{run.path} ({run.earlier})' for v in comparison.variants
           for run in v.runs if run.earlier]
  return found and [f'Scored at an earlier checkpoint than the last one: '
                    f'{", ".join(found)}.']


def _variants(comparison: compare.Comparison) -> str:
  count = len(comparison.variants)
  return f'{count} variant{"s" * (count != 1)}'


def _headline(comparison: compare.Comparison) -> str:
  """Returns the result of the comparison in F1, in one sentence."""
  others = [v for v in comparison.variants if 'f1' in v.deltas]
  if not others:
    return ('No variant is compared with the default: none has a seed in '
            'common with it.' if len(comparison.variants) > 1 else
            'There is one variant, so nothing is compared.')
  best = max(others, key=lambda v: (v.deltas['f1'].verdict == 'better',
                                    v.deltas['f1'].mean))
  delta = best.deltas['f1']
  points = f'{_number(delta.mean, "{:+.2f}")} points F1'
  if all(v.deltas['f1'].verdict == 'too few seeds' for v in others):
    return (f'Too few seeds for a verdict: {compare.MIN_SEEDS} seeds on each '
            f'side are needed. The highest difference is that of {best.label}, '
            f'{points}.')
  better, worse = (sum(v.deltas['f1'].verdict == verdict for v in others)
                   for verdict in ('better', 'worse'))
  if better:
    return (f'{best.label} is better than the default by {points}; '
            f'{better} of {len(others)} variants are better, {worse} worse.')
  return ('No variant is better than the default beyond what seeds and '
          f'questions explain; {worse} of {len(others)} are worse. The highest '
          f'difference is that of {best.label}, {points}.')


def report_markdown(comparison: compare.Comparison) -> str:
  return documents.to_markdown(report_blocks(comparison))


def csv_table(comparison: compare.Comparison) -> str:
  """Returns CSV with a row for each variant; unknown values are empty."""
  rows = []
  for v, cost in zip(comparison.variants, _costs(comparison), strict=True):
    row: dict[str, str | float] = {'variant': v.label, 'seeds': len(v.runs)}
    for name in _shown(comparison):
      row |= {name: v.mean(name), f'{name}_sd': v.sd(name)}
    for score in compare.SCORES:
      delta = v.deltas.get(score, compare.Delta(0, *[math.nan] * 8))
      row |= {f'{score}_delta': delta.mean, f'{score}_delta_sd': delta.sd, **{
          f'{score}_{name}': getattr(delta, name)
          for name in ('floor', 'low', 'high', 'p', 'p_articles', 'p_seeds',
                       'p_holm')},
              f'{score}_seeds': delta.seeds,
              f'{score}_verdict': delta.verdict if delta.seeds else ''}
    rows.append({**row, **cost})
  return _to_csv(rows)


def csv_of_runs(comparison: compare.Comparison) -> str:
  """Returns CSV with a row for each run; unknown values are empty."""
  shown = _shown(comparison)
  return _to_csv([
      {'variant': v.label, 'seed': run.config.seed, 'run': str(run.path),
       **{name: run.metrics.get(name, math.nan) for name in shown}}
      for v in comparison.variants for run in v.runs])


def _to_csv(rows: Sequence[Mapping[str, str | float]]) -> str:
  out = io.StringIO()
  writer = csv.DictWriter(out, list(rows[0]), lineterminator='\n')
  writer.writeheader()
  writer.writerows({k: '' if x != x else x for k, x in row.items()}
                   for row in rows)
  return out.getvalue()


def latex_table(comparison: compare.Comparison) -> str:
  r"""Returns a LaTeX table; it needs \usepackage{booktabs}."""
  scores = [TITLES[score] for score in compare.SCORES]
  lines = [r'\begin{tabular}{l' + 'r' * 4 * len(scores) + '}', r'\toprule',
           ' & '.join(['Variant', *scores, *(
               rf'$\Delta$ {s} & floor & $p$' for s in scores)]) + r' \\',
           r'\midrule']
  for v in comparison.variants:
    cells = [v.label.translate(LATEX), *(
        _spread(v.mean(s), v.sd(s)) for s in compare.SCORES)]
    for score in compare.SCORES:
      delta = v.deltas.get(score)
      cells += ['', '', ''] if delta is None else [
          _spread(delta.mean, delta.sd, '+'), _number(delta.floor),
          _number(delta.p_holm, '{:.4f}')]
    lines.append(' & '.join(cells).replace('±', r'$\pm$').replace(
        '−', '$-$').replace('–', '--') + r' \\')
  return '\n'.join([*lines, r'\bottomrule', r'\end{tabular}']) + '\n'


def plot_report(comparison: compare.Comparison, path: pathlib.Path) -> None:
  """Plots seeds as dots, their means as bars and the floor as a band."""
  variants = comparison.variants
  fig = figure.Figure(figsize=(9, 1.7 + 0.32 * len(variants)),
                      layout='constrained')
  panels = fig.subplots(1, len(compare.SCORES), sharey=True)
  for panel, score in zip(panels, compare.SCORES, strict=True):
    default = variants[0].mean(score)
    floor = variants[0].sd(score) * math.sqrt(2 / len(variants[0].runs))
    panel.axvline(default, color='0.6', linewidth=1)
    if floor > 0:
      panel.axvspan(default - floor, default + floor, color='0.9',
                    label='seed-noise floor')
    for y, v in enumerate(variants):
      panel.errorbar(
          [v.mean(score)], [y], xerr=np.abs(np.nan_to_num(np.array(
              _limits(v, score))[:, None] - v.mean(score))),
          color=plots.END, linewidth=1, capsize=3,
          label='95 % interval' if y == 0 and len(v.runs) > 1 else None)
      panel.plot([run.metrics[score] for run in v.runs], [y] * len(v.runs),
                 'o', color=plots.START, markersize=5, alpha=0.7,
                 label='a seed' if y == 0 else None)
      panel.plot([v.mean(score)], [y], '|', color=plots.END, markersize=16,
                 markeredgewidth=2, label='mean' if y == 0 else None)
    panel.set(xlabel=f'{TITLES[score]} (%)')
    panel.margins(y=0.6 / (len(variants) + 1))
  panels[0].set_yticks(range(len(variants)), [v.label for v in variants],
                       fontsize=8)
  panels[0].invert_yaxis()
  fig.legend(*panels[-1].get_legend_handles_labels(), fontsize=7, ncols=4,
             loc='outside lower center')
  plots.save_figure(fig, path)


def has_curves(comparison: compare.Comparison) -> bool:
  """Returns whether a run was evaluated more often than at its end."""
  return any(len(run.curve) > 1 for v in comparison.variants for run in v.runs)


def plot_curves(comparison: compare.Comparison, path: pathlib.Path) -> None:
  """Plots F1 over steps: thin lines for seeds, thick ones for their means."""
  fig = figure.Figure(figsize=(9, 4), layout='constrained')
  axes = fig.subplots()
  for i, v in enumerate(comparison.variants):
    colour = f'C{i % 10}'
    for run in v.runs:
      axes.plot(*zip(*run.curve, strict=True) if run.curve else ([], []),
                color=colour, linewidth=0.7, alpha=0.5)
    steps = set.intersection(*(
        {step for step, _ in run.curve} for run in v.runs))
    axes.plot(sorted(steps), [
        np.mean([dict(run.curve)[step] for run in v.runs])
        for step in sorted(steps)], color=colour, linewidth=2, label=v.label,
        linestyle=('-', '--', ':', '-.')[i // 10 % 4])
  axes.set(xlabel='step', ylabel='F1 on data.eval (%)')
  axes.legend(loc='best', fontsize=7)
  plots.save_figure(fig, path)


def _shown(comparison: compare.Comparison) -> list[str]:
  return [name for name in TITLES if any(
      name in run.metrics for v in comparison.variants for run in v.runs)]


def _costs(comparison: compare.Comparison) -> list[dict[str, float]]:
  """Returns the costs; time and memory are relative to the default."""
  def mean(of: Callable[[compare.Run], float], v: compare.Variant) -> float:
    known = [of(run) for run in v.runs if not math.isnan(of(run))]
    return sum(known) / len(known) if known else math.nan

  seconds = lambda v: mean(lambda run: 1 / run.examples_per_second, v)
  memory = lambda v: mean(lambda run: run.peak_megabytes, v)
  default = comparison.variants[0]
  return [{'window_time': seconds(v) / seconds(default),
           'memory': memory(v) / memory(default),
           'device_seconds': mean(lambda run: run.device_seconds, v),
           'compile_seconds': mean(lambda run: run.compile_seconds, v)}
          for v in comparison.variants]


def _delta(label: str, delta: compare.Delta) -> list[str]:
  return [label, str(delta.seeds), _spread(delta.mean, delta.sd, '+'),
          _number(delta.floor),
          f'{_number(delta.low, "{:+.2f}")} … {_number(delta.high, "{:+.2f}")}',
          _number(delta.p, '{:.4f}'), _number(delta.p_articles, '{:.4f}'),
          _number(delta.p_seeds, '{:.4f}'), _number(delta.p_holm, '{:.4f}'),
          delta.verdict]


def _spread(mean: float, sd: float, sign: str = '') -> str:
  text = _number(mean, f'{{:{sign}.2f}}')
  return text if math.isnan(sd) else f'{text} ± {sd:.2f}'


def _number(value: float, form: str = '{:.2f}') -> str:
  """Formats a number with a minus sign; NaN gives a dash."""
  return '–' if math.isnan(value) else form.format(value).replace('-', '−')


def _limits(v: compare.Variant, name: str) -> tuple[float, float]:
  """Returns the 95 % interval over seeds of a percentage, within 0 … 100."""
  mean, half = v.mean(name), v.half_width(name)
  return (math.nan, math.nan) if math.isnan(half) else (
      max(mean - half, 0.0), min(mean + half, 100.0))


def _interval(v: compare.Variant, name: str) -> str:
  low, high = _limits(v, name)
  return '–' if math.isnan(low) else f'{_number(low)} … {_number(high)}'
