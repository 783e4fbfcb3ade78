"""A benchmark session: the sizes, data, configs and workers of all suites."""

from collections.abc import Iterator, Mapping, Sequence
import contextlib
import dataclasses
import pathlib
import sys
from typing import Any

from benchmarks import harness
from qa_jax import config as config_lib
from qa_jax.data import sources
from qa_jax.data.examples import Example
from qa_jax.io import files
from qa_jax.runtime import console

ROOT = pathlib.Path(__file__).resolve().parent.parent
PEER = ROOT / 'benchmarks' / 'peers' / 'peer_worker.py'
NAMES = {'minilm_l6': 'MiniLM-L6', 'base': 'BERT-base'}  # encoders
DTYPES = ('float32', 'bfloat16')  # compute dtypes of train and forward
BUCKETS = tuple(range(80, 384, 16))  # leaves 4 % of a batch as padding

# Asides of a generated passage whose windows then have the lengths of SQuAD
# 1.1 at 384 / 128: one entry for each 5 % of the windows, from the histogram of
# its 88,641 that Krell et al. (2021, arXiv 2107.02027) published with their
# code: mean 172 tokens, median 159, 1.2 % of them 384.
SENTENCES = (3, 7, 9, 10, 11, 11, 12, 13, 14, 15, 16, 16, 18, 19, 20, 22, 24,
             27, 31, 39)


@dataclasses.dataclass(frozen=True)
class Sizes:
  """Amounts of work of the suites."""

  questions: int  # of the generated corpus, without --data
  train_batch: dict[str, int]  # encoder → windows per update
  train_steps: dict[str, int]  # encoder → timed batches of an epoch
  forward_questions: int
  feature_questions: int
  search_windows: int
  search_repeats: int
  dense_windows: int
  input_batches: int
  evaluate_questions: int
  scaling_lengths: tuple[int, ...]
  scaling_batches: tuple[int, ...]
  scaling_devices: tuple[int, ...]
  scaling_caps: tuple[int, ...]
  population_members: int
  population_steps: int


# All suites take half an hour on two cores, peer and compilation included.
FULL = Sizes(
    questions=5000, train_batch={'minilm_l6': 16, 'base': 8},
    train_steps={'minilm_l6': 4, 'base': 2}, forward_questions=192,
    feature_questions=87_599,  # as SQuAD 1.1's training set has
    search_windows=512, search_repeats=20, dense_windows=64,
    input_batches=200, evaluate_questions=1000,
    scaling_lengths=(64, 128, 192, 256, 384, 512),
    scaling_batches=(1, 2, 4, 8, 16, 32), scaling_devices=(1, 2, 4, 8),
    scaling_caps=(1, 4, 16, 30, 64, 128),
    population_members=8, population_steps=40)
# These sizes show that everything runs; their times mean nothing.
TINY = Sizes(
    questions=80, train_batch={'minilm_l6': 4, 'base': 2},
    train_steps={'minilm_l6': 1, 'base': 1}, forward_questions=12,
    feature_questions=150,
    search_windows=32, search_repeats=2, dense_windows=4, input_batches=4,
    evaluate_questions=40, scaling_lengths=(64, 96), scaling_batches=(1, 2),
    scaling_devices=(1, 2), scaling_caps=(4, 8),
    population_members=2, population_steps=2)


@dataclasses.dataclass(frozen=True)
class Target:
  """A target: the least wanted ratio to the peer."""

  gate: float
  goal: float


TARGETS: dict[str, Target] = {
    'train classic': Target(3, 5), 'train best': Target(1.2, 1.5),
    'train float32': Target(1, 1.1), 'forward float32': Target(1, 1.1),
    'forward classic': Target(2.5, 4), 'forward best': Target(1, 1.5),
    'search loop': Target(12, 40), 'search dense': Target(60, 200),
    'features cold': Target(5, 8), 'evaluate': Target(10, 30)}


@dataclasses.dataclass
class Outcome:
  """The results of one suite."""

  rows: list[harness.Row] = dataclasses.field(default_factory=list)
  timings: list[harness.Timing] = dataclasses.field(default_factory=list)
  notes: list[str] = dataclasses.field(default_factory=list)
  curves: dict[str, Any] = dataclasses.field(default_factory=dict)
  failed: list[str] = dataclasses.field(default_factory=list)  # left out


@dataclasses.dataclass
class Session:
  """One invocation of the benchmark."""

  sizes: Sizes
  scratch: pathlib.Path  # an absolute directory
  data: str = ''  # SPEC; '': a generated corpus with SQuAD's lengths
  encoder: str = ''  # a checkpoint directory; '': random weights
  encoders: Sequence[str] = ('minilm_l6', 'base')
  dtypes: Sequence[str] = DTYPES
  overrides: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  rounds: int = 3
  threads: int = 2
  seed: int = 0
  peer_python: str = sys.executable
  # What the workers of each side report: versions, devices, commit.
  about: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)

  def worker(self, side: str, suite: str,
             extra: Mapping[str, str] | None = None) -> harness.Worker:
    """Starts the worker of one side of a suite.

    Raises:
      PeerMissing: the peer's packages are not installed.
    """
    command = {
        'ours': [sys.executable, '-m', 'benchmarks.worker'],
        'peer': [self.peer_python, str(PEER)]}[side]
    if side == 'peer' and not PEER.is_file():
      raise harness.PeerMissing(f'{PEER} is not there')
    worker = harness.Worker([*command, suite, str(self.threads)],
                            threads=self.threads, extra=extra)
    self.about[side] = worker.about
    return worker

  @contextlib.contextmanager
  def sides(self, suite: str, *, devices: int = 1) -> Iterator[
      tuple[harness.Worker, harness.Worker | None]]:
    """Starts both workers of a suite; the peer is None if not installed.

    On a CPU, `devices` are those of JAX on our side, with the same cores.
    """
    with contextlib.ExitStack() as stack:
      ours = stack.enter_context(self.worker(
          'ours', suite, extra={'JAX_NUM_CPU_DEVICES': str(devices)}))
      try:
        peer = stack.enter_context(self.worker('peer', suite))
      except harness.PeerMissing as e:
        console.say(f'{suite}: peer: not installed ({e})')
        peer = None
      yield ours, peer

  @property
  def fewer_rounds(self) -> int:
    """Returns the number of rounds for runs of a minute or more."""
    return max(self.rounds // 2, 1)

  def source(self) -> str:
    """Returns the data SPEC of all suites."""
    return self.data or generated(self.sizes.questions)

  def examples(self, count: int = 0) -> list[Example]:
    """Returns all examples, or `count` of them evenly spread over the data."""
    examples = sources.load_examples(self.source())
    if not 0 < count < len(examples):
      return examples
    return [examples[i * len(examples) // count] for i in range(count)]

  def write_examples(self, name: str, count: int = 0, *,
                     at_least: int = 0) -> str:
    """Writes a SQuAD file for both sides and returns its path.

    Questions are repeated until there are `at_least` many. A number at the end
    makes a repeated context differ, so that it is tokenised again.
    """
    path = self.scratch / f'{name}.json'
    examples = self.examples(count)
    paragraphs = [{'context': e.context + (f' {copy}' if copy else ''), 'qas': [
        {'id': f'{e.id}/{copy}', 'question': e.question,
         'is_impossible': e.impossible,
         'answers': [{'text': a.text, 'answer_start': a.start}
                     for a in e.answers]}]}
        for copy in range(max(1, -(-at_least // len(examples))))
        for e in examples][:at_least or None]
    files.write_json(path, {'version': 'v2.0', 'data': [
        {'title': name, 'paragraphs': paragraphs}]})
    return str(path)

  def config(self, **fields: Any) -> dict[str, Any]:
    """Returns config fields: defaults, then `fields`, then the user's --set.

    The field a.b is given as the keyword a__b.
    """
    common = {'seed': self.seed, 'data.buckets': list(BUCKETS),
              'data.packing': False, 'train.updates_per_dispatch': 1,
              'data.train': self.source(), 'data.cache': 'none',
              'train.num_steps': 1000, 'parallel.num_devices': 1}
    named = {key.replace('__', '.'): value for key, value in fields.items()}
    config = config_lib.override(
        config_lib.Config().to_dict(), {**common, **named, **self.overrides})
    config_lib.check_config(config)
    return config


def generated(questions: int) -> str:
  """Returns the data SPEC of generated questions with SQuAD's lengths."""
  each = -(-questions // len(SENTENCES))
  return '+'.join(
      f'synthetic(seed={seed}, size={each}, sentences={sentences})'
      for seed, sentences in enumerate(SENTENCES))
