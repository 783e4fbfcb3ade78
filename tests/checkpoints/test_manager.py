"""Checkpoints: none that is damaged is used, none that is whole is lost."""

import errno
import math
import pathlib
import shutil
import subprocess
import threading

import jax
import numpy as np
import pytest

from qa_jax import errors
from qa_jax.checkpoints import manager
from qa_jax.checkpoints import manifest
from qa_jax.training import train
from tests.common import runs
from tests.common import tiny

SHAPES = {'w': jax.ShapeDtypeStruct(
    (3, 4), np.float32,
    sharding=jax.sharding.SingleDeviceSharding(jax.devices('cpu')[0]))}


def save(store: manager.Checkpoints, step: int, **metrics: float) -> None:
  store.save(step, params={'w': np.full((3, 4), step, np.float32)},
             optimizer={'step': np.asarray(step, np.int32)},
             meta={'position': step}, metrics=metrics)


def save_until_manifest(directory: pathlib.Path, step: int, patch,
                        **metrics: float) -> None:
  """Saves a step as a process does that is killed before the manifest."""
  def dying(_):
    raise runs.Killed
  store = manager.Checkpoints(directory)
  with patch.context() as inside:
    inside.setattr(manifest, 'write_manifest', dying)
    with pytest.raises(runs.Killed):
      save(store, step, **metrics)
  store.close()


def value_of(store: manager.Checkpoints, step: int) -> float:
  values = np.unique(store.restore_params(step, SHAPES)['w'])
  assert values.shape == (1,)
  return float(values[0])


def test_a_file_in_place_of_the_directory_is_refused(tmp_path):
  (tmp_path / 'checkpoints').write_text('mine')
  with pytest.raises(errors.UserError, match=(
      'checkpoints: cannot be used for checkpoints: File exists; move it')):
    manager.Checkpoints(tmp_path / 'checkpoints')


@pytest.fixture(scope='module')
def pristine(tmp_path_factory) -> pathlib.Path:
  """Steps 1 (the best), 4 and 6."""
  directory = tmp_path_factory.mktemp('run') / 'checkpoints'
  store = manager.Checkpoints(directory)
  for step, f1 in ((1, 90.0), (2, 50.0), (4, 60.0), (6, 70.0)):
    save(store, step, f1=f1)
  store.close()
  return directory


@pytest.fixture
def directory(pristine, tmp_path) -> pathlib.Path:
  return shutil.copytree(pristine, tmp_path / 'checkpoints')


def flip(path: pathlib.Path, where: float) -> None:
  """Changes one bit of the byte at a fraction of the file."""
  data = bytearray(path.read_bytes())
  data[round(where * (len(data) - 1))] ^= 4
  path.write_bytes(data)


FAULTS = {
    'first byte': lambda path: flip(path, 0),
    'middle byte': lambda path: flip(path, 0.5),
    'last byte': lambda path: flip(path, 1),
    'truncated': lambda path: path.write_bytes(
        path.read_bytes()[:path.stat().st_size // 2]),
    'one byte less': lambda path: path.write_bytes(path.read_bytes()[:-1]),
    'one byte more': lambda path: path.write_bytes(path.read_bytes() + b'\0'),
    'deleted': pathlib.Path.unlink,
}


@pytest.mark.parametrize('kind', FAULTS)
def test_damage_to_any_file_is_detected_and_named(directory, kind):
  store = manager.Checkpoints(directory, read_only=True)
  paths = [p for p in sorted((directory / '6').rglob('*')) if p.is_file()]
  assert len(paths) > 15 and not store.damage(6)
  for path in paths:
    content = path.read_bytes()
    FAULTS[kind](path)
    fault = store.damage(6)
    assert fault.startswith(f'{path.relative_to(directory / "6")}: '), path
    path.write_bytes(content)
  assert not store.damage(6)
  store.close()


def test_any_bit_of_a_manifest_counts(directory):
  path = directory / '6' / manifest.NAME
  content = path.read_bytes()
  for i in range(0, len(content), 13):
    flipped = content[i] ^ 1 << i % 8
    path.write_bytes(content[:i] + bytes([flipped]) + content[i + 1:])
    # Few files are looked at; what it says of others must fit too.
    assert manifest.find_damage(directory / '6', within='meta/').startswith(
        manifest.NAME), i


def test_a_file_that_came_later_is_named(directory):
  (directory / '6' / 'params' / 'more').write_text('')
  assert manifest.find_damage(directory / '6') == (
      f'params/more: not in {manifest.NAME}')


def test_sha256sum_agrees(directory):
  subprocess.run(['sha256sum', '--check', '--strict', manifest.NAME],
                 cwd=directory / '6', check=True, stdout=subprocess.DEVNULL)


@pytest.mark.parametrize('name', [
    'metrics/metrics', 'meta/metadata', manifest.NAME, '_CHECKPOINT_METADATA'])
@pytest.mark.parametrize('fault', ['first byte', 'truncated', 'deleted'])
def test_training_goes_on_from_the_step_before(directory, capsys, name, fault):
  FAULTS[fault](directory / '6' / name)
  store = manager.Checkpoints(directory)
  lines = capsys.readouterr().err.splitlines()
  assert len(lines) == 1 and f'6.damaged: {name}: ' in lines[0]
  assert store.steps == [1, 4] and store.latest == 4 and store.best == 1
  assert store.restore(4, params=SHAPES, optimizer={
      'step': jax.ShapeDtypeStruct((), np.int32, sharding=SHAPES['w'].sharding)
      })[2] == {'position': 4}
  save(store, 6, f1=95.0)  # again, and the manager has not kept the old one
  assert store.best == store.latest == 6 and value_of(store, 6) == 6
  store.close()


def test_a_damaged_step_is_not_read_but_the_others_are(directory):
  flip(next((directory / '6' / 'params' / 'd').iterdir()), 0.5)
  before = sorted(directory.rglob('*'))
  store = manager.Checkpoints(directory, read_only=True)
  with pytest.raises(errors.UserError) as caught:
    store.restore_params(store.resolve('last'), SHAPES)
  message = str(caught.value)
  assert '\n' not in message and '/6/params/d/' in message
  assert message.endswith('that are whole: 1, 4')
  assert value_of(store, 4) == 4 and value_of(store, store.resolve('best')) == 1
  store.close()
  assert sorted(directory.rglob('*')) == before


def test_damaged_metrics_do_not_make_another_step_the_best(directory):
  path = directory / '1' / 'metrics' / 'metrics'
  path.write_text(path.read_text().replace('9', '1'))
  store = manager.Checkpoints(directory, read_only=True)
  with pytest.raises(errors.UserError, match='/1/metrics/metrics: not the byt'):
    store.resolve('best')
  store.close()


def test_steps_of_before_manifests_are_trusted(directory):
  for path in directory.rglob(manifest.NAME):
    path.unlink()
  store = manager.Checkpoints(directory, read_only=True)
  assert value_of(store, store.resolve('best')) == 1
  store.close()


@pytest.mark.parametrize('odd', [math.nan, math.inf, -math.inf])
def test_a_metric_that_is_no_number_leaves_the_best(tmp_path, odd):
  store = manager.Checkpoints(tmp_path / 'c')
  for step, f1 in enumerate((80.0, odd, odd, 70.0, odd), 1):
    save(store, step, f1=f1)
  assert store.best == 1 and store.steps == [1, 4, 5]
  store.close()


def test_the_files_of_a_killed_save_are_removed(directory):
  left = directory / '8.orbax-checkpoint-tmp' / 'params.orbax-checkpoint-tmp'
  left.mkdir(parents=True)
  (left / 'd').write_text('half')
  reader = manager.Checkpoints(directory, read_only=True)
  reader.close()
  assert left.exists()  # the save may be in progress
  store = manager.Checkpoints(directory)
  assert not left.parent.exists() and store.steps == [1, 4, 6]
  save(store, 8)
  assert store.latest == 8
  store.close()


def test_a_save_killed_before_its_manifest_is_set_aside(
    directory, monkeypatch, capsys):
  save_until_manifest(directory, 8, monkeypatch, f1=99.0)
  store = manager.Checkpoints(directory)
  assert 'missing, as if never finished' in capsys.readouterr().err
  assert store.latest == 6
  store.close()


FULL = ('RESOURCE_EXHAUSTED: Failed to write 571714 bytes to file 7: No space '
        "left on device [os_error_code='28']")


@pytest.mark.parametrize('error', [
    ValueError(FULL), OSError(errno.ENOSPC, 'No space left on device')])
@pytest.mark.parametrize('where', ['orbax', 'manifest'])
def test_a_full_disk_is_one_line_and_leaves_what_is_whole(
    directory, monkeypatch, error, where):
  store = manager.Checkpoints(directory)
  def full(*_, **__):
    (directory / '8.orbax-checkpoint-tmp').mkdir()
    raise error
  with monkeypatch.context() as patch:
    if where == 'orbax':
      patch.setattr(store._writer, 'save', full)
    else:
      patch.setattr(manifest, 'write_manifest', full)
    with pytest.raises(errors.UserError) as caught:
      save(store, 8)
  assert '\n' not in str(caught.value)
  assert 'checkpoint 8 cannot be written: No space left' in str(caught.value)
  assert not (directory / '8.orbax-checkpoint-tmp').exists()
  store.close()
  store = manager.Checkpoints(directory)
  assert store.latest == 6
  store.close()


def test_a_value_that_orbax_cannot_save_is_not_a_full_disk(tmp_path):
  store = manager.Checkpoints(tmp_path / 'c')
  with pytest.raises(ValueError) as caught:
    store.save(1, params={'w': 'text'}, optimizer={}, meta={}, metrics={})
  assert not isinstance(caught.value, errors.UserError)
  store.close()


def test_a_step_below_the_latest_is_saved(directory):
  store = manager.Checkpoints(directory)
  save(store, 5, f1=95.0)
  assert store.steps == [5, 6] and store.best == 5
  assert value_of(store, 5) == 5 and not store.damage(5)
  store.close()


@pytest.mark.parametrize('existing', [False, True])
def test_a_save_that_orbax_declines_is_an_error(
    directory, monkeypatch, existing):
  """Neither an absent checkpoint nor one of other values gets a manifest."""
  store = manager.Checkpoints(directory)

  def declining(path, args):
    if existing:  # an older checkpoint under the name of step 8
      shutil.copytree(directory / '6', path)
      (path / manifest.NAME).unlink()
  monkeypatch.setattr(store._writer, 'save', declining)
  with pytest.raises(errors.UserError, match='did not save what it was given'):
    save(store, 8, f1=70.0)
  assert store.steps == [1, 4, 6] and store.latest == 6
  assert not (directory / '8' / manifest.NAME).exists()
  store.close()


def test_a_directory_with_only_a_manifest_is_no_checkpoint(directory, capsys):
  """An early version wrote such directories."""
  (directory / '5').mkdir()
  manifest.write_manifest(directory / '5')
  reader = manager.Checkpoints(directory, read_only=True)
  assert reader.damage(5) == 'params: missing' and reader.best == 1
  with pytest.raises(errors.UserError, match='/5/params: missing; checkp'):
    reader.restore_params(5, SHAPES)
  reader.close()
  store = manager.Checkpoints(directory)
  assert store.steps == [1, 4, 6] and not store.damage(6)
  assert '5.damaged: params: missing' in capsys.readouterr().err
  save(store, 5)
  assert value_of(store, 5) == 5
  store.close()


def test_a_first_save_killed_before_its_manifest_leaves_best_usable(
    tmp_path, monkeypatch):
  save_until_manifest(tmp_path / 'c', 2, monkeypatch, f1=1.0)
  store = manager.Checkpoints(tmp_path / 'c')
  assert store.steps == [2] and not store.damage(2)
  assert (tmp_path / 'c' / '2' / manifest.NAME).is_file()
  save(store, 4, f1=50.0)
  store.close()
  reader = manager.Checkpoints(tmp_path / 'c', read_only=True)
  assert reader.resolve('best') == reader.resolve('last') == 4
  assert value_of(reader, 2) == 2
  reader.close()


def test_an_unfinished_step_leaves_best_and_last_to_a_reader(
    directory, capsys):
  (directory / '6' / manifest.NAME).unlink()
  reader = manager.Checkpoints(directory, read_only=True)
  assert reader.resolve('last') == 4 and reader.resolve('best') == 1
  assert '/6 is no whole checkpoint' in capsys.readouterr().err
  with pytest.raises(errors.UserError, match='as if never finished'):
    reader.restore_params(reader.resolve('6'), SHAPES)
  reader.close()


def test_a_writer_seals_a_run_of_before_manifests(directory):
  for path in directory.rglob(manifest.NAME):
    path.unlink()
  store = manager.Checkpoints(directory)
  assert store.steps == [1, 4, 6] and store.best == 1
  store.close()
  for step in (1, 4, 6):
    assert not manifest.find_damage(directory / str(step))


def test_a_damaged_step_replaces_the_one_set_aside_before(directory, capsys):
  for _ in range(2):
    store = manager.Checkpoints(directory)
    if 6 not in store.steps:
      save(store, 6, f1=70.0)
    store.close()
    (directory / '6' / 'meta' / 'metadata').write_text('{}')
  manager.Checkpoints(directory).close()
  assert capsys.readouterr().err.count('6.damaged: meta/metadata') == 2
  assert (directory / '6.damaged' / 'meta' / 'metadata').read_text() == '{}'


def test_of_equal_best_steps_the_latest_is_the_best(tmp_path):
  store = manager.Checkpoints(tmp_path / 'c')
  for step, f1 in enumerate((70.0, 80.0, 80.0, 60.0, 50.0), 1):
    save(store, step, f1=f1)
  assert store.best == 3 and store.steps == [3, 4, 5]
  store.close()


def test_metrics_that_are_not_finite_are_not_written(tmp_path):
  store = manager.Checkpoints(tmp_path / 'c')
  save(store, 1, f1=60.0, loss=math.nan, norm=math.inf)
  save(store, 2, loss=math.nan)
  assert store.metrics(1) == {'f1': 60.0} and store.metrics(2) == {}
  store.close()
  assert not list((tmp_path / 'c' / '2').glob('metrics*'))


def test_the_best_is_removed_only_after_a_better_one_is_sealed(
    directory, monkeypatch):
  store = manager.Checkpoints(directory)
  write, before = manifest.write_manifest, []

  def writing(path):
    before.append(store.steps)
    write(path)
  monkeypatch.setattr(manifest, 'write_manifest', writing)
  save(store, 8, f1=99.0)
  assert before == [[1, 4, 6]] and store.steps == [6, 8]
  store.close()


@pytest.fixture
def overlapping(monkeypatch) -> threading.Event:
  """Lets saves overlap, as on accelerators, and seals none before the event."""
  event, write = threading.Event(), manifest.write_manifest

  def waiting(path):
    assert event.wait(60)
    write(path)
  monkeypatch.setattr(jax, 'default_backend', lambda: 'gpu')
  monkeypatch.setattr(manifest, 'write_manifest', waiting)
  return event


def test_an_overlapping_save_is_listed_only_after_it_is_sealed(
    directory, overlapping):
  store = manager.Checkpoints(directory)
  save(store, 8, f1=99.0)
  assert store.steps == [1, 4, 6] and store.best == 1
  overlapping.set()
  store.finish()
  assert store.steps == [6, 8] and store.best == 8
  store.close()


def test_an_overlapping_save_that_fails_ends_the_next_one(
    directory, overlapping, monkeypatch):
  def full(_):
    raise OSError(errno.ENOSPC, 'No space left on device')
  monkeypatch.setattr(manifest, 'write_manifest', full)
  store = manager.Checkpoints(directory)
  save(store, 8, f1=99.0)
  with pytest.raises(errors.UserError, match='checkpoint 8 cannot be written'):
    save(store, 10)
  assert store.steps == [1, 4, 6]
  store.close()


def test_nothing_is_removed_while_metrics_are_damaged(directory, capsys):
  store = manager.Checkpoints(directory)
  path = directory / '1' / 'metrics' / 'metrics'
  path.write_text(path.read_text().replace('9', '1'))
  save(store, 8, f1=75.0)
  assert store.steps == [1, 4, 6, 8]
  assert 'no checkpoint is removed: ' in capsys.readouterr().err
  store.close()


def test_metrics_that_come_later_are_added(directory):
  store = manager.Checkpoints(directory)
  save(store, 8)
  save(store, 8, f1=99.0)
  save(store, 8, f1=11.0)
  assert store.metrics(8) == {'f1': 99.0} and store.best == 8
  assert store.steps == [6, 8] and value_of(store, 8) == 8
  store.close()
  assert not manifest.find_damage(directory / '8')


def test_a_full_disk_while_metrics_are_added_keeps_the_step(
    tmp_path, monkeypatch):
  store = manager.Checkpoints(tmp_path / 'c')
  save(store, 8)  # the only checkpoint

  def full(*_, **__):
    raise OSError(errno.ENOSPC, 'No space left on device')
  with monkeypatch.context() as patch:
    patch.setattr(pathlib.Path, 'write_bytes', full)
    with pytest.raises(errors.UserError, match='No space left on device'):
      save(store, 8, f1=60.0)
  assert store.steps == [8] and not store.damage(8)
  assert value_of(store, 8) == 8 and store.metrics(8) == {}
  save(store, 8, f1=60.0)
  assert store.metrics(8) == {'f1': 60.0} and not store.damage(8)
  store.close()


@pytest.mark.slow
def test_a_run_whose_newest_checkpoint_rots_repeats_it(tmp_path, capsys):
  config = tiny.config(data={'eval': ''}, train={'num_steps': 3})
  train.train(config, tmp_path / 'run')
  whole = runs.state_of(tmp_path / 'run', 3)
  flip(next((tmp_path / 'run/checkpoints/3/params/d').iterdir()), 0.5)
  capsys.readouterr()
  train.train(config, tmp_path / 'run')
  lines = capsys.readouterr().err
  assert 'checkpoint 3 is damaged' in lines
  assert 'resuming from step 2 of 3' in lines
  for name, value in runs.state_of(tmp_path / 'run', 3).items():
    np.testing.assert_array_equal(value, whole[name], err_msg=name)
