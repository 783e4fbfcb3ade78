"""Reports, from run directories written by hand: every number is worked out."""

import base64
import csv
import dataclasses
import html.parser
import json
import math
import pathlib
import re
import shutil

from matplotlib import image
import numpy as np
import pytest

from qa_jax import errors
from qa_jax.checkpoints import run_directory
from qa_jax.checkpoints.run_directory import RunDirectory
from qa_jax.data import sources
from qa_jax.data import store
from qa_jax.io import files
from qa_jax.metrics import significance
from qa_jax.metrics import squad
from qa_jax.sweeps import compare
from qa_jax.sweeps import report
from tests.common import commands
from tests.common import tiny

SPEC = 'synthetic(seed=1, size=40, split="eval")'


def fake(path: pathlib.Path, wrong=(), *, head='independent', seed=0,
         spec=SPEC, rates=(), **changes) -> pathlib.Path:
  """A run that answers all of SPEC's questions but those at `wrong`."""
  examples = sources.load_examples(spec)
  predictions = {e.id: 'no such text' if i in wrong else (*e.gold_texts, '')[0]
                 for i, e in enumerate(examples)}
  config = tiny.config(seed=seed, model={'head': head}, data={'eval': spec},
                       **changes)
  files.write_json(path / 'config.json', config.to_dict())
  files.write_json(path / 'run.json', {
      'sha256': {'eval': store.fingerprint(examples)}})
  if rates:
    files.write_jsonl(path / 'metrics.jsonl', [
        {'step': 10 * i, 'split': 'train', 'examples_per_second': rate,
         'peak_megabytes': 100 * rate} for i, rate in enumerate(rates)])
  output = path / 'eval' / run_directory.evaluation_name(spec)
  files.write_json(output / 'predictions.json', predictions)
  files.write_json(output / 'metrics.json',
                   squad.squad_metrics(examples, predictions))
  return path


def sweep_of(workdir: pathlib.Path, *names: str) -> pathlib.Path:
  files.write_json(workdir / 'sweep.json', {'trials': names})
  return workdir


@pytest.fixture
def runs(tmp_path) -> list[pathlib.Path]:
  """Two seeds of the default, shared and mlp. Right answers of 40:
  30 and 28, 35 and 31, 30 and 27."""
  return [
      fake(tmp_path / 'a', range(10)),
      fake(tmp_path / 'b', range(12), seed=1),
      fake(tmp_path / 'c', range(5), head='shared'),
      fake(tmp_path / 'd', range(9), head='shared', seed=1),
      fake(tmp_path / 'e', range(10), head='mlp'),
      fake(tmp_path / 'f', range(13), head='mlp', seed=1)]


def test_delta_noise_and_p_by_hand(runs):
  default, shared, mlp = compare.compare(runs).variants
  assert (default.mean('exact_match'), default.deltas) == (72.5, {})
  # 30 and 28 of 40 are 75 and 70 percent: their sd is 5 / √2.
  assert default.sd('exact_match') == pytest.approx(5 / math.sqrt(2))
  delta = shared.deltas['exact_match']
  # 5 of 40 more with one seed and 3 with the other: 12.5 and 7.5 points.
  assert delta.mean == pytest.approx(10.0)
  assert delta.sd == pytest.approx(5 / math.sqrt(2))
  assert delta.floor == pytest.approx(5 / math.sqrt(2))  # · √(2 / 2 seeds)
  # Averaged over seeds, questions 5 … 11 gain and none loses: of 2^7 patterns
  # of signs, 2 are as extreme.
  assert delta.p == pytest.approx(2 / 2**7)
  # Question 12 alone loses: either sign is as extreme.
  assert mlp.deltas['exact_match'].p == 1
  # t of 12.5 and 7.5 is 4. With one degree of freedom, t is Cauchy's.
  assert delta.p_seeds == pytest.approx(1 - 2 * math.atan(4) / math.pi)
  assert delta.p_holm == pytest.approx(2 * delta.p_seeds)  # of two variants
  # They are of two passages: of 2^2 patterns, 2 are as extreme, and a draw of
  # passages may have neither.
  assert delta.p_articles == pytest.approx(2 / 4)
  assert 0 == delta.low < 10 < delta.high < 30 and not delta.counts


@pytest.mark.parametrize('seeds', [2, 3])
def test_a_gain_in_every_passage_counts_from_three_seeds_on(tmp_path, seeds):
  """Every second question wrong, or every fourth: each passage gains one."""
  passage = [e.article for e in sources.load_examples(SPEC)]
  assert len(set(passage)) == 10 and passage == sorted(
      passage, key=passage.index)
  for seed in range(seeds):
    fake(tmp_path / f'a{seed}', range(0, 40, 2), seed=seed)
    fake(tmp_path / f'b{seed}', range(0, 40, 4), seed=seed, head='shared')
  found = compare.compare([tmp_path / f'{x}{s}' for x in 'ab'
                           for s in range(seeds)])
  delta = found.variants[1].deltas['exact_match']
  assert delta.p == delta.p_articles == pytest.approx(2 / 2**10)
  assert delta.p_seeds == 0  # 25 points with every seed
  assert 10 < delta.low < 25 < delta.high < 45
  assert delta.counts == (seeds == 3)
  assert delta.verdict == ('better' if seeds == 3 else 'too few seeds')
  headline = report.report_markdown(found).split('\n\n')[1]
  assert headline.startswith(
      'head=shared is better than the default by +25.00 points F1'
      if seeds == 3 else 'Too few seeds for a verdict: 3 seeds on each side')


def power_table(markdown: str) -> dict[int, tuple[float, float]]:
  """Returns {seeds: detectable (EM, F1)} of a report."""
  rows = re.findall(r'^\| (\d+) \| ([\d.]+) \| ([\d.]+) \|$', markdown, re.M)
  return {int(seeds): (float(em), float(f1)) for seeds, em, f1 in rows}


def test_power_is_that_of_the_seeds_of_the_default(runs):
  text = report.report_markdown(compare.compare(runs))
  table = power_table(text)
  assert [*table] == [3, 5, 10, 20, 40]
  for seeds, (em, f1) in table.items():
    # The two seeds have 75 and 70 percent: the sd of a difference of two
    # independent ones is √2 · 5 / √2. Two variants are compared.
    by_seeds = significance.detectable_difference(5.0, seeds, comparisons=2)
    # 2 of 40 questions are right with one seed: their variance is 5,000.
    by_questions = significance.detectable_difference(
        math.sqrt(2 * 5000 * 2 / 40 / seeds), 40, comparisons=2)
    assert em == f1 == pytest.approx(max(by_seeds, by_questions), abs=0.01)
  assert 'from 2 seeds of the default' in text and '0.05 / 2' in text


def test_power_of_equal_means_is_that_of_the_questions(tmp_path):
  fake(tmp_path / 'a', range(10))
  fake(tmp_path / 'b', range(10, 20), seed=1)
  table = power_table(report.report_markdown(compare.compare(
      [tmp_path / 'a', tmp_path / 'b'])))
  assert table[5][0] == pytest.approx(significance.detectable_difference(
      math.sqrt(2 * 5000 * 20 / 40 / 5), 40), abs=0.01)


def test_power_of_a_pilot_is_that_of_the_planned_comparisons(runs, tmp_path):
  result = commands.command('report', f'--workdir={runs[0]},{runs[1]}',
                            f'--output={tmp_path}', '--planned=8')
  assert result.code == 0, result.err
  text = (tmp_path / 'report.md').read_text(encoding='utf-8')
  assert power_table(text)[5][0] == pytest.approx(
      significance.detectable_difference(5.0, 5, comparisons=8), abs=0.01)
  assert '0.05 / 8' in text
  assert '--planned=-1 must be at least 0' in commands.refusal(
      'report', f'--workdir={runs[0]}', '--planned=-1')


def test_the_power_table_has_the_seeds_of_the_default_and_needs_two(runs):
  found = compare.compare([runs[0], runs[2]])
  text = report.report_markdown(found)
  assert 'Power' not in text and not power_table(text)
  default, *others = found.variants
  default = dataclasses.replace(default, runs=[*default.runs] * 4)
  _, table, _ = report._power_blocks(
      dataclasses.replace(found, variants=[default, *others]))
  assert [row[0] for row in table.rows] == ['3', '4', '5', '10', '20', '40']


def test_headline_says_which_difference_the_seeds_show(tmp_path):
  for seed in range(3):
    fake(tmp_path / f'a{seed}', range(10 + 2 * seed), seed=seed)
  found = compare.compare([tmp_path / f'a{seed}' for seed in range(3)])
  shown = compare.detectable_difference(found, 'f1', 3)
  assert shown > 5
  assert report.headline(found)[2] == (
      f'3 seeds show a true difference of {shown:.2f} points F1 with a '
      'probability of 80 %')


def test_a_difference_on_which_seeds_disagree_does_not_count(tmp_path):
  """With two of three seeds all 40 questions gain, with one most lose."""
  for seed, (ours, theirs) in enumerate(((20, 0), (20, 0), (0, 14))):
    fake(tmp_path / f'a{seed}', range(ours), seed=seed)
    fake(tmp_path / f'b{seed}', range(theirs), seed=seed, head='shared')
  found = compare.compare([tmp_path / f'{x}{s}' for x in 'ab'
                           for s in range(3)])
  delta = found.variants[1].deltas['exact_match']
  # Differences of 50, 50 and -35 points: t = 0.765 with 2 degrees of freedom.
  t = np.mean([50, 50, -35]) / (np.std([50, 50, -35], ddof=1) / math.sqrt(3))
  assert delta.p_seeds == pytest.approx(1 - t / math.sqrt(2 + t * t))
  assert delta.p < 0.05 < delta.p_seeds and delta.verdict == 'no'
  assert report.report_markdown(found).split('\n\n')[1].startswith(
      'No variant is better than the default beyond what')


@pytest.mark.parametrize(('changes', 'counts'), [
    ({}, True), ({'mean': -3.0, 'low': -5.0, 'high': -1.0}, True),
    ({'floor': 3.0}, False), ({'floor': math.nan}, False),
    ({'mean': -3.0, 'low': -5.0, 'high': -1.0, 'floor': 4.0}, False),
    ({'p_holm': 0.05}, False), ({'p_holm': math.nan}, False),
    ({'low': 0.0}, False), ({'low': -1.0}, False),
    ({'seeds': compare.MIN_SEEDS - 1}, False),
    ({'p': 0.9, 'p_articles': 0.9, 'p_seeds': 0.9}, True)])
def test_a_difference_counts_by_its_corrected_p_floor_and_interval(
    changes, counts):
  delta = compare.Delta(**{
      'seeds': 3, 'mean': 3.0, 'sd': 1.0, 'floor': 2.9, 'low': 1.0,
      'high': 5.0, 'p': 0.001, 'p_articles': 0.001, 'p_seeds': 0.001,
      'p_holm': 0.049, **changes})
  assert delta.counts == counts


def test_a_difference_that_counts_alone_does_not_below_the_floor(tmp_path):
  """Every seed and article gains 10 points; the seeds differ by 40."""
  passage = [e.article for e in sources.load_examples(SPEC)]
  groups = [[i for i, p in enumerate(passage) if p == name]
            for name in dict.fromkeys(passage)]
  for seed, each in ((0, 1), (1, 3)):  # wrong questions of four, by the default
    fake(tmp_path / f'a{seed}', [i for g in groups for i in g[:each]],
         seed=seed)
    fake(tmp_path / f'b{seed}', [i for g in groups for i in g[:each - 1]],
         seed=seed, head='shared')
  delta = compare.compare([
      tmp_path / f'{x}{s}' for x in 'ab' for s in (0, 1)
      ]).variants[1].deltas['exact_match']
  assert delta.p_holm < 0.05 and delta.low > 0
  assert delta.floor > abs(delta.mean) and not delta.counts


def test_holm_is_over_the_variants(tmp_path):
  runs = [fake(tmp_path / 'a', range(16))]
  # n questions more: p = 2 / 2^n, with n 8, 10 and 5.
  for head, right in (('shared', 8), ('mlp', 10), ('biased', 5)):
    runs.append(fake(tmp_path / head, range(16 - right), head=head))
  deltas = [v.deltas['f1'] for v in compare.compare(runs).variants[1:]]
  assert [d.p for d in deltas] == pytest.approx([2 / 2**n for n in (8, 10, 5)])
  assert [d.p_holm for d in deltas] == pytest.approx(
      [2 * 2 / 2**8, 3 * 2 / 2**10, 2 / 2**5])
  assert all(math.isnan(d.floor) and not d.counts for d in deltas)


def test_equal_runs_differ_by_nothing(tmp_path):
  runs = [fake(tmp_path / f'{head}{seed}', range(7), head=head, seed=seed)
          for head in ('independent', 'biased') for seed in (0, 1, 2)]
  for delta in compare.compare(runs).variants[1].deltas.values():
    assert (delta.mean, delta.sd, delta.low, delta.high) == (0, 0, 0, 0)
    assert delta.p == delta.p_holm == 1 and not delta.counts


def test_delta_is_over_common_seeds(tmp_path):
  runs = [fake(tmp_path / 'a', range(10)),
          fake(tmp_path / 'b', range(20), seed=1),
          fake(tmp_path / 'c', range(8), head='shared', seed=1),
          fake(tmp_path / 'd', (), head='shared', seed=2),
          fake(tmp_path / 'e', (), head='mlp', seed=7)]
  _, shared, mlp = compare.compare(runs).variants
  delta = shared.deltas['exact_match']
  assert delta.mean == pytest.approx(30.0) and math.isnan(delta.sd)
  assert delta.floor == pytest.approx(25 / math.sqrt(2) * math.sqrt(2))
  assert mlp.deltas == {}
  text = report.report_markdown(compare.compare(runs))
  assert '| head=mlp | 1 |' in text
  assert re.search(r'head=shared \| 1 \| \+30\.00 \|', text)


def test_a_lucky_question_set_gains_less_than_its_floor(tmp_path):
  """The questions say yes (p = 2 / 2^8), the seeds say it is noise."""
  runs = [fake(tmp_path / 'a', range(8)),
          fake(tmp_path / 'b', range(30), seed=1),
          fake(tmp_path / 'c', (), head='shared'),
          fake(tmp_path / 'd', range(30), head='shared', seed=1)]
  delta = compare.compare(runs).variants[1].deltas['exact_match']
  assert delta.p < 0.05 and delta.mean == pytest.approx(10.0)
  assert delta.floor > 30 and not delta.counts


def test_variants_are_named_by_what_they_change(tmp_path):
  runs = [fake(tmp_path / 'a'),
          fake(tmp_path / 'b', head='mlp', objective='span_softmax'),
          fake(tmp_path / 'c', decode={'search': 'argmax'})]
  found = compare.compare(runs)
  assert [v.label for v in found.variants] == [
      'default', 'head=mlp, objective=span_softmax', 'search=argmax']
  assert found.default == (
      'head=independent, objective=cross_entropy, search=two_stage')


def test_a_sweep_is_read_in_its_order(tmp_path):
  fake(tmp_path / 'trials' / 'b')
  fake(tmp_path / 'trials' / 'a', head='mlp')
  fake(tmp_path / 'trials' / 'old', head='shared')
  found = compare.compare([sweep_of(tmp_path, 'b', 'a')])
  assert [v.runs[0].path.name for v in found.variants] == ['b', 'a']


@pytest.mark.parametrize(('log', 'rows', 'reason'), [
    ('step 1\nerror: not finite\n\n', 3, 'not finite'),
    ('ValueError: x', 0, 'ValueError: x'),
    # A library's late traceback, and the sweep's own note.
    ('sweep: python\nerror: disk full\nRuntimeError: loop', 3, 'disk full'),
    ('error: old\nsweep: died of signal 9', 3, 'died of signal 9'),
    ('error: RUN: stopped by SIGTERM', 3, 'stopped by SIGTERM'),
    ('', 3, 'stopped after step 20'),
    (None, 0, 'not started')])
def test_incomplete_trials_are_listed_with_their_reason(
    tmp_path, log, rows, reason):
  fake(tmp_path / 'trials' / 'a')
  bad = fake(tmp_path / 'trials' / 'b', head='mlp', rates=[1.0] * rows)
  for path in bad.glob('eval/*/metrics.json'):
    path.unlink()
  if log is not None:
    files.write_text(tmp_path / 'logs' / 'b.log', log.replace('RUN', str(bad)))
  found = compare.compare([sweep_of(tmp_path, 'a', 'b')])
  assert found.left_out == {str(bad): reason}
  assert f'## Left out\n\n- `{bad}`: {reason}' in report.report_markdown(found)
  assert report.headline(found)[-1] == (
      f'left out: 1 runs, the first is {bad}: {reason}')


def test_a_trial_without_its_directory_is_said_to_be(tmp_path):
  fake(tmp_path / 'trials' / 'a')
  files.write_text(tmp_path / 'logs' / 'b.log', 'F1 62\nevaluate it by x\n')
  files.write_text(tmp_path / 'logs' / 'c.log', 'error: no such file\n')
  found = compare.compare([sweep_of(tmp_path, 'a', 'b', 'c')])
  assert [*found.left_out.values()] == [
      'its directory is missing; its log ends with: evaluate it by x',
      'no such file']


def test_sweeps_with_a_common_default_are_compared(tmp_path):
  for name, head, wrong in (('x', 'shared', 5), ('y', 'mlp', 8)):
    fake(tmp_path / name / 'trials' / 'default', range(wrong))
    fake(tmp_path / name / 'trials' / head, head=head)
  found = compare.compare([sweep_of(tmp_path / 'x', 'default', 'shared'),
                           sweep_of(tmp_path / 'y', 'default', 'mlp')])
  assert [(v.label, len(v.runs)) for v in found.variants] == [
      ('default', 1), ('head=shared', 1), ('head=mlp', 1)]
  first = tmp_path / 'x' / 'trials' / 'default'
  assert found.variants[0].runs[0].path == first
  assert found.left_out == {f'{tmp_path}/y/trials/default':
                            f'has the config and the seed of {first}'}


def test_a_run_that_has_only_begun_is_one_of_its_variant(tmp_path):
  begun = fake(tmp_path / 'a')
  for path in begun.glob('eval/*/metrics.json'):
    path.unlink()
  found = compare.compare([
      begun, fake(tmp_path / 'b', head='mlp', seed=1),
      fake(tmp_path / 'c', seed=1)])
  assert [v.label for v in found.variants] == ['default', 'head=mlp']


def test_a_default_whose_first_seed_never_began_is_the_default(tmp_path):
  for name, given in (('a.seed-1', {}), ('b.seed-0', {'head': 'mlp'}),
                      ('b.seed-1', {'head': 'mlp'})):
    fake(tmp_path / 'trials' / name, seed=int(name[-1]), **given)
  found = compare.compare([sweep_of(
      tmp_path, 'a.seed-0', 'b.seed-0', 'a.seed-1', 'b.seed-1')])
  assert [(v.label, len(v.runs)) for v in found.variants] == [
      ('default', 1), ('head=mlp', 2)]
  assert [*found.left_out.values()] == ['not started']
  with pytest.raises(errors.UserError, match='the default has no complete'):
    compare.compare([sweep_of(tmp_path, 'c.seed-0', 'b.seed-0')])


def test_costs_are_relative_to_the_default(tmp_path):
  runs = [fake(tmp_path / 'a', rates=(1, 10, 10, 12)),
          fake(tmp_path / 'b', rates=(1, 30, 10), seed=1),
          fake(tmp_path / 'c', rates=(9, 0, 0, 5), head='mlp'),
          fake(tmp_path / 'd', head='shared')]
  found = compare.compare(runs)
  # Medians after the first row: 10 and 20 a second, 1/10 and 1/20 on average.
  row = report.report_markdown(found).split('| head=mlp ')[1].split('\n')[0]
  assert row.endswith(f'| {0.2 / 0.075:.2f} × | {500 / 1500:.2f} × |')
  row = report.report_markdown(found).split('| head=shared ')[1].split('\n')[0]
  assert row.endswith('| – | – |')
  for path in tmp_path.glob('*/metrics.jsonl'):
    path.unlink()
  assert 'time per window' not in report.report_markdown(compare.compare(runs))


@pytest.mark.parametrize(('impossible', 'there'), [(0.0, False), (0.5, True)])
def test_squad_2_has_its_columns(tmp_path, impossible, there):
  spec = f'synthetic(size=20, impossible={impossible})'
  text = report.report_markdown(
      compare.compare([fake(tmp_path / 'a', spec=spec)]))
  assert all((title in text) == there for title in ('HasAns F1', 'NoAns'))


def test_csv_has_all_numbers(runs):
  found = compare.compare(runs)
  rows = list(csv.DictReader(report.csv_table(found).splitlines()))
  assert [r['variant'] for r in rows] == ['default', 'head=shared', 'head=mlp']
  delta = found.variants[1].deltas['f1']
  for name, value in (('f1', found.variants[1].mean('f1')),
                      ('f1_delta', delta.mean), ('f1_floor', delta.floor),
                      ('f1_low', delta.low), ('f1_p_holm', delta.p_holm),
                      ('f1_seeds', 2)):
    assert float(rows[1][name]) == value
  assert [r['f1_verdict'] for r in rows] == ['', *['too few seeds'] * 2]
  assert rows[0]['f1_delta'] == rows[0]['window_time'] == ''


def test_csv_of_runs_has_each_seed(runs):
  rows = list(csv.DictReader(report.csv_of_runs(
      compare.compare(runs)).splitlines()))
  assert [(r['variant'], r['seed'], r['run'], float(r['exact_match']))
          for r in rows] == [
      (label, str(i % 2), str(runs[i]), right / 40 * 100)
      for i, (label, right) in enumerate(zip(
          ['default'] * 2 + ['head=shared'] * 2 + ['head=mlp'] * 2,
          [30, 28, 35, 31, 30, 27], strict=True))]


def test_tables_are_rectangular(runs):
  found = compare.compare(runs)
  for grid in re.findall(r'(?:^\|.*\n)+', report.report_markdown(found), re.M):
    lines = grid.strip().split('\n')
    assert len({line.count(' | ') for line in lines}) == 1
    # Head, rule, and the variants or 5 numbers of seeds.
    assert len(lines) in (4, 5, 7)
  lines = report.latex_table(found).splitlines()
  assert len(lines) == 4 + 3 + 2
  columns = len(lines[0].split('{')[-1].rstrip('}'))
  for line in (lines[2], *lines[4:7]):
    assert line.count(' & ') == columns - 1 and line.endswith(r' \\')


def test_a_row_of_latex_has_the_floor_and_the_corrected_p(runs):
  found = compare.compare(runs)
  text = report.latex_table(found)
  assert '$-$' in text and '−' not in text and '–' not in text
  deltas = []
  for variant, line in zip(found.variants[1:], text.splitlines()[5:],
                           strict=False):
    cells = line.removesuffix(r' \\').split(' & ')[3:]
    for n, score in enumerate(compare.SCORES):
      delta = variant.deltas[score]
      deltas.append(delta)
      assert cells[3 * n + 1:3 * n + 3] == [
          f'{delta.floor:.2f}', f'{delta.p_holm:.4f}']
  assert any(abs(d.floor - d.sd) > 0.1 for d in deltas)
  assert any(d.p_holm - d.p > 0.001 for d in deltas)


def test_labels_are_escaped(tmp_path):
  runs = [fake(tmp_path / 'a'), fake(
      tmp_path / 'b', head='mlp(x="50%|{a_b}~\\^")')]
  found = compare.compare(runs)
  assert (r'head=mlp(x="50\%|\{a\_b\}\textasciitilde{}\textbackslash{}'
          r'\textasciicircum{}") & ') in report.latex_table(found)
  assert r'50%\|{a_b}' in report.report_markdown(found)


def test_picture_has_a_dot_for_every_seed(runs, tmp_path):
  report.plot_report(compare.compare(runs), tmp_path / 'new' / 'report.png')
  pixels = image.imread(tmp_path / 'new' / 'report.png')[..., :3]
  blue = np.all(np.abs(pixels - (0.3, 0.61, 0.79)) < 0.05, axis=-1)
  assert blue.sum() > 6 * 10  # START, translucent on white


def test_interval_over_seeds_by_hand(tmp_path):
  """Of 75 and 70: t(0.975, 1) is 12.706, the standard error is 2.5."""
  runs = [fake(tmp_path / 'a', range(10)),
          fake(tmp_path / 'b', range(12), seed=1)]
  default = compare.compare(runs).variants[0]
  assert default.half_width('exact_match') == pytest.approx(
      12.7062 * 2.5, rel=1e-5)
  assert math.isnan(compare.compare(runs[:1]).variants[0].half_width('f1'))
  row = report.report_markdown(compare.compare(runs)).split('| default ')[1]
  low = default.mean('f1') - default.half_width('f1')
  assert default.mean('f1') + default.half_width('f1') > 100  # is clipped
  assert f'| {low:.2f} … 100.00 |' in row.split('\n')[0]


def with_rows(path, *rows):
  files.write_jsonl(path / 'metrics.jsonl', rows)


def test_costs_are_sums_over_rows_and_means_over_runs(tmp_path):
  runs = [fake(tmp_path / 'a'), fake(tmp_path / 'b', seed=1),
          fake(tmp_path / 'c', head='mlp')]
  train = {'step': 5, 'split': 'train', 'device_seconds': 2000.0,
           'compile_seconds': 1.5}
  held_out = {'step': 9, 'split': 'eval', 'f1': 3.0, 'device_seconds': 500.0,
              'compile_seconds': 0.5}
  with_rows(runs[0], train, held_out)
  with_rows(runs[1], train)
  found = compare.compare(runs)
  assert '| device-seconds | compiling (s) |' in report.report_markdown(found)
  rows = list(csv.DictReader(report.csv_table(found).splitlines()))
  assert [r['device_seconds'] for r in rows] == ['2250.0', '']
  assert [r['compile_seconds'] for r in rows] == ['1.75', '']
  assert '| 2,250 | 1.8 |' in report.report_markdown(found)


def test_best_is_named(runs):
  found = compare.compare(runs)
  default, shared, mlp = found.variants
  mlp = dataclasses.replace(mlp, runs=[dataclasses.replace(
      run, metrics={**run.metrics, 'exact_match': 99.0}) for run in mlp.runs])
  assert 'Best F1: head=shared, ' in report.report_markdown(
      dataclasses.replace(found, variants=[default, shared, mlp]))


def test_headline_is_of_the_best_difference_that_counts(runs):
  found = compare.compare(runs)
  default, shared, mlp = found.variants
  shared, mlp = (dataclasses.replace(variant, deltas={
      'f1': dataclasses.replace(variant.deltas['f1'], seeds=3, mean=mean,
                                floor=1.0, low=1.0, high=20.0, p_holm=p)})
                 for variant, mean, p in ((shared, 3.0, 0.01), (mlp, 9.0, 0.5)))
  assert report.headline(dataclasses.replace(
      found, variants=[default, mlp, shared]))[1] == (
          'head=shared is better than the default by +3.00 points F1; 1 of 2 '
          'variants are better, 0 worse.')


def test_a_run_that_is_scored_at_an_earlier_checkpoint_is_named(runs):
  where = [RunDirectory(path).record_evaluation(SPEC) for path in runs]
  for path in runs:
    with_rows(path, *({'step': step, 'split': 'eval', 'f1': 30.0}
                      for step in (2, 4)))
  for folder, step in zip(where[:2], (4, 2), strict=True):
    run_directory.record_step(folder, step)
  found = compare.compare(runs)
  line = (f'Scored at an earlier checkpoint than the last one: {runs[1]} '
          '(step 2 of 4).')
  assert line in report.headline(found)
  assert line in report.report_markdown(found).splitlines()
  run_directory.record_step(where[1], 4)
  assert 'earlier' not in report.report_markdown(compare.compare(runs))


def test_curves_are_drawn_if_there_are_any(runs, tmp_path):
  with_rows(runs[0], {'step': 30, 'split': 'eval', 'f1': 60.0})  # its end
  report.write_report(compare.compare(runs), tmp_path / 'none')
  assert not (tmp_path / 'none' / 'report_curves.png').exists()
  for path in runs[:3]:
    with_rows(path, *({'step': step, 'split': 'eval', 'f1': 30.0 + step}
                      for step in (10, 20, 30)))
  found = compare.compare(runs)
  assert found.variants[0].runs[0].curve == [(10, 40.0), (20, 50.0),
                                             (30, 60.0)]
  report.write_report(found, tmp_path / 'some')
  pixels = image.imread(tmp_path / 'some' / 'report_curves.png')[..., :3]
  blue = np.all(np.abs(pixels - (0.12, 0.47, 0.71)) < 0.05, axis=-1)  # C0
  assert blue.sum() > 200
  text = (tmp_path / 'some' / 'report.md').read_text()
  assert '![Learning curves](report_curves.png)' in text


class Reader(html.parser.HTMLParser):
  """Tags, text and what a page refers to."""

  def __init__(self, text):
    super().__init__()
    self.tags, self.links, self.text, self.meta = [], [], '', []
    self.feed(text)

  def handle_starttag(self, tag, attrs):
    self.tags.append(tag)
    self.links += [v for k, v in attrs if k in ('src', 'href')]
    self.meta += [v for k, v in attrs if tag == 'meta' and k == 'content']

  def handle_data(self, data):
    self.text += data


def test_page_needs_no_other_file_and_runs_nothing(tmp_path):
  bad = '<script>alert("x")</script>'
  fake(tmp_path / 'trials' / 'a')
  fake(tmp_path / 'trials' / 'b', head=f'mlp(x={bad!r})')
  sweep_of(tmp_path, 'a', 'b', 'c')
  files.write_text(tmp_path / 'logs' / 'c.log', f'error: {bad}')
  found = compare.compare([tmp_path])
  report.write_report(found, tmp_path / 'out')
  page = Reader((tmp_path / 'out' / 'report.html').read_text())
  assert 'script' not in page.tags
  # A label in the headline and three tables, and a reason.
  assert page.text.count(bad) == 5
  assert len(page.links) == 1 and page.tags.count('img') == 1
  head, _, data = page.links[0].partition(',')
  assert head == 'data:image/png;base64'
  assert base64.b64decode(data) == (
      tmp_path / 'out' / 'report.png').read_bytes()
  assert page.meta[0].startswith("default-src 'none'; img-src data:;")
  assert page.tags.count('tr') == sum(
      len(re.findall('^\\|', report.report_markdown(found), re.M)) - n
      for n in [page.tags.count('table')])  # less a rule for each table


def test_pruned_trials_are_listed_with_their_reason(tmp_path):
  fake(tmp_path / 'trials' / 'a')
  sweep_of(tmp_path, 'a', 'b')
  files.write_text(tmp_path / 'logs' / 'b.log', 'step 3')
  files.write_json(tmp_path / 'pruned' / 'b.json', {'reason': 'F1 3.00'})
  assert 'trials/b`: pruned: F1 3.00' in report.report_markdown(
      compare.compare([tmp_path]))


def test_a_report_of_one_run_says_variant(runs):
  [run] = runs[:1]
  assert report.headline(compare.compare([run]))[0].startswith('1 variant on ')


def test_command_writes_its_files_and_prints_the_headline(runs, tmp_path):
  result = commands.command(
      'report', '--workdir=' + ','.join(map(str, runs)),
      f'--output={tmp_path}/out')
  assert (result.code, result.err) == (0, '')
  compared = compare.compare(runs)
  best = max(compared.variants[1:], key=lambda v: v.mean('f1'))
  subject, verdict, where = result.out.splitlines()
  assert subject.startswith(f'3 variants on {compared.questions} questions')
  assert '; default: EM 72.50 ± 3.54  F1 72.50' in subject
  assert verdict.startswith('Too few seeds for a verdict')
  assert verdict.endswith(
      f'{best.label}, {best.deltas["f1"].mean:+.2f} points F1.')
  assert where.startswith(f'report: {tmp_path}/out/report.md')
  assert {p.name for p in (tmp_path / 'out').iterdir()} == {
      *(f'report.{kind}' for kind in ('md', 'html', 'csv', 'tex', 'png')),
      'report_runs.csv'}
  again = commands.command('report', f'--workdir={runs[0]}')
  assert again.code == 0 and (runs[0] / 'report' / 'report.md').is_file()


def test_the_same_runs_give_the_same_report(runs):
  assert report.csv_table(compare.compare(runs)) == report.csv_table(
      compare.compare(runs))


def other_data(tmp_path):
  return [fake(tmp_path / 'a'), fake(tmp_path / 'b', spec='synthetic(size=9)')]


def changed_data(tmp_path):
  path = fake(tmp_path / 'a')
  files.write_json(path / 'run.json', {'sha256': {'eval': 'x'}})
  return [path]


def no_default(tmp_path):
  sweep_of(tmp_path, 'a', 'b')
  fake(tmp_path / 'trials' / 'b')
  return [tmp_path]


def empty_sweep(tmp_path):
  return [sweep_of(tmp_path)]


def broken(name, content):
  def make(tmp_path):
    path = fake(tmp_path / 'a')
    next(path.rglob(name)).write_text(content)
    return [path]
  return make


@pytest.mark.parametrize(('make', 'message'), [
    (lambda p: [p], 'is neither a run nor a sweep: it has no config.json and'),
    (lambda p: [p / 'nowhere'], 'is neither a run nor a sweep'),
    (other_data, 'were evaluated on different questions; report them apart'),
    (changed_data, f'{SPEC} is not what '),
    (no_default, 'trials/a: not started'),
    (empty_sweep, 'sweep.json names no trials'),
    (broken('config.json', '{'), 'config.json: not JSON'),
    (broken('config.json', '{"x": 1}'), "config has no field 'x'"),
    (broken('run.json', '[]'), 'run.json: list, expected a JSON object'),
    (broken('predictions.json', '{"x": 1}'), "'x' is 1, expected a string"),
    (broken('metrics.json', 'x'), 'metrics.json: not JSON')])
def test_mistake_is_one_line(tmp_path, make, message):
  workdirs = ','.join(map(str, make(tmp_path)))
  assert message in commands.refusal('report', f'--workdir={workdirs}')


OTHER = 'synthetic(seed=5, size=12, split="eval")'


def evaluated(path: pathlib.Path, wrong=(), spec=OTHER) -> pathlib.Path:
  """What experiments.evaluate --data=SPEC leaves in a run."""
  other = fake(path.with_name(f'{path.name}_other'), wrong, spec=spec)
  name = run_directory.evaluation_name(spec)
  shutil.copytree(other / 'eval' / name, path / 'eval' / name)
  return path


def test_runs_are_compared_on_data_they_were_evaluated_on_since(tmp_path):
  """Whatever they were evaluated on while they trained, if on anything."""
  evaluated(fake(tmp_path / 'a', range(30)), range(6))
  evaluated(fake(tmp_path / 'b', head='mlp', spec='synthetic(size=9)'))
  evaluated(fake(tmp_path / 'c', head='shared'), range(3))
  config = files.read_object(tmp_path / 'c' / 'config.json')
  config['data']['eval'] = ''
  files.write_json(tmp_path / 'c' / 'config.json', config)
  result = commands.command(
      'report', f'--workdir={tmp_path}/a,{tmp_path}/b,{tmp_path}/c',
      f'--data={OTHER}')
  assert result.code == 0, result.err
  assert f'questions of {OTHER}; ' in result.out
  text = (tmp_path / 'a' / 'report' / 'report.md').read_text()
  rows = [line.split(' | ') for line in text.splitlines()
          if line.startswith('| ') and 'Δ' not in line]
  assert [row[2] for row in rows[2:5]] == ['50.00', '100.00', '75.00']


@pytest.mark.parametrize(('spec', 'message'), [
    ('synthetic(size=7)', 'a: not evaluated: python -m experiments.evaluate '
     "--workdir={a} '--data=synthetic(size=7)'"),
    (OTHER.replace('12', '11'), 'not of the same questions: 1 are in one')])
def test_what_is_not_there_is_told_with_the_command_that_makes_it(
    tmp_path, spec, message):
  run = evaluated(fake(tmp_path / 'a'))
  if 'size=11' in spec:  # as of a file that has changed
    (run / 'eval' / run_directory.evaluation_name(OTHER)).rename(
        run / 'eval' / run_directory.evaluation_name(spec))
  assert message.format(a=run) in commands.refusal(
      'report', f'--workdir={run}', f'--data={spec}')


def test_a_run_without_data_eval_says_how_to_name_some(tmp_path):
  config = files.read_object(fake(tmp_path / 'a') / 'config.json')
  config['data']['eval'] = ''
  files.write_json(tmp_path / 'a' / 'config.json', config)
  assert '--data=SPEC' in commands.refusal('report', f'--workdir={tmp_path}/a')


def test_missing_predictions_are_named(tmp_path):
  path = fake(tmp_path / 'a')
  next(path.rglob('predictions.json')).unlink()
  with pytest.raises(errors.UserError, match=r'predictions\.json: No such'):
    compare.compare([path])


def test_a_torn_last_line_of_the_log_is_no_obstacle(tmp_path):
  path = fake(tmp_path / 'a', rates=(1, 2, 3))
  with (path / 'metrics.jsonl').open('a') as file:
    file.write(json.dumps({'step': 40})[:5])
  assert compare.compare([path]).variants[0].runs[0].examples_per_second == 2.5
