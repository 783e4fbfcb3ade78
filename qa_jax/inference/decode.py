"""Answers for a data set: encoder, head and search as one compiled program."""

from collections.abc import Callable, Iterator, Mapping, Sequence
import functools
from typing import Any

import jax
import numpy as np

from qa_jax import config as config_lib
from qa_jax import errors
from qa_jax import input_pipeline
from qa_jax import span_scores
from qa_jax.data import batch_plans
from qa_jax.data import windows as windows_lib
from qa_jax.decoding import answers as answers_lib
from qa_jax.decoding import candidates
from qa_jax.decoding import null_rules
from qa_jax.decoding import search
from qa_jax.models import qa
from qa_jax.runtime import compilation
from qa_jax.runtime import console
from qa_jax.runtime import devices
from qa_jax.runtime import processes

P = jax.sharding.PartitionSpec

# Windows whose candidates are in memory at a time: 5 MB if n_best is 20.
BLOCK = 2**14
# The masks of a search in a batch; end_mask only if decode.whole_words.
MASKS = ('start_mask', 'end_mask')


def null_rule_needs(decode: config_lib.Decode) -> frozenset[str]:
  """Returns the `needs` of the null rule: see null_rules.NullRule."""
  return null_rules.find_rule(decode.null_rule).needs


def build_program(model: qa.QAModel, decode: config_lib.Decode,
                  mesh: jax.sharding.Mesh | None = None, *,
                  statistics: bool = False) -> Callable[..., dict[str, Any]]:
  """Returns the jitted function (params, batch, temperatures) → arrays.

  It is from the cache if possible; `_compiled` says what it returns.
  """
  return _compiled(model, decode.search, decode.max_answer_length,
                   decode.n_best, 'normaliser' in null_rule_needs(decode),
                   mesh, statistics)


# The cache holds compiled programs, not parameters.
@functools.lru_cache(maxsize=32)
def _compiled(model: qa.QAModel, spec: str, longest: int, n_best: int,
              normaliser: bool, mesh: jax.sharding.Mesh | None,
              statistics: bool) -> Callable[..., dict[str, Any]]:
  """Builds encoder, head and span search as one jitted function.

  It returns arrays of WindowSpans by field name, among them `log_partition` if
  there are temperatures, and `gold_scores` if the batch has gold spans.
  """
  find = search.find_search(spec)

  def run(params, batch, temperatures):
    starts = batch['start_mask']
    ends = batch.get('end_mask', batch['context_mask'])
    scores = model.apply({'params': params}, **qa.model_inputs(batch),
                         start_mask=starts if 'end_mask' in batch else None)
    scores = span_scores.mask_padding(scores, batch['attention_mask'])
    masks = starts, ends
    fields = candidates.window_candidates(
        find, scores, *masks, longest=longest, n_best=n_best,
        softmax_mask=batch['context_mask'] if normaliser else None)
    if not search.is_exact(spec):
      fields['exact'] = candidates.window_candidates(
          search.two_stage, scores, *masks, longest=longest,
          n_best=1)['score'][:, 0]
    if len(temperatures):
      fields['log_partition'] = candidates.log_partitions(
          scores, *masks, temperatures, longest=longest)
    if 'gold_spans' in batch:
      fields['gold_scores'] = candidates.legal_gold_scores(
          scores, *masks, batch['gold_spans'], longest=longest)
    if statistics:
      fields['statistics'] = candidates.score_statistics(
          scores, batch['context_mask'], longest=longest)
    return fields

  if mesh is not None:
    # Divided by the compiler, top_k would gather the scores of all rows on
    # every device.
    whole, rows = P(), P(mesh.axis_names)
    run = jax.shard_map(run, mesh=mesh, in_specs=(whole, rows, whole),
                        out_specs=rows, check_vma=False)
  return jax.jit(run)


def score_windows(
    model: qa.QAModel, params: Any, windows: windows_lib.WindowSet,
    config: config_lib.Config, *, mesh: jax.sharding.Mesh | None = None,
    progress: str = '', temperatures: Sequence[float] = (),
    golds: bool = False, statistics: bool = False) -> candidates.WindowSpans:
  """Computes the n-best spans of every window with encoder, head and search.

  Rows are sharded over all devices of `mesh`. Each process computes the rows of
  its devices, and at the end all processes exchange their spans. `progress`
  names the progress bar; with '' there is none. The result has the
  log-partitions at `temperatures`, the scores of the gold spans if `golds`, and
  candidates.STATISTICS if `statistics`.

  Raises:
    NotFiniteError: the null score or a candidate's score is not finite.
  """
  decode, count = config.decode, mesh.size if mesh else 1
  run = build_program(model, decode, mesh, statistics=statistics)
  packed = bool(input_pipeline.packing(config))
  plan = input_pipeline.plan_evaluation(config, windows.total_lengths, count)

  def array(*shape: int, dtype: Any = np.float32, wanted: bool = True):
    return np.zeros((len(windows), *shape), dtype) if wanted else None

  spans = candidates.WindowSpans(
      start=array(decode.n_best, dtype=np.int32),
      end=array(decode.n_best, dtype=np.int32),
      score=array(decode.n_best), valid=array(decode.n_best, dtype=bool),
      null=array(),
      normaliser=array(wanted='normaliser' in null_rule_needs(decode)),
      exact=array(wanted=not search.is_exact(decode.search)),
      temperatures=tuple(temperatures),
      log_partition=array(len(temperatures), wanted=len(temperatures) > 0),
      gold_scores=array(windows.gold_spans.shape[1], wanted=golds),
      statistics=array(len(candidates.STATISTICS), wanted=statistics))
  place = (functools.partial(devices.put_rows, mesh=mesh) if mesh
           else jax.device_put)
  bar = console.Progress(progress, len(plan)) if progress else None
  ahead, scales = devices.RunAhead(2), np.asarray(temperatures, np.float32)
  inputs = (*qa.INPUTS, *qa.PACKED, *MASKS, *['gold_spans'] * golds)
  own_rows = []  # of this process, batch by batch

  def store(finished):
    for (number, rows), fields in finished:
      if mesh:
        rows = devices.local_rows(rows, mesh)
      own_rows.append(rows)
      _write(spans, rows, {name: np.concatenate(shards)
                           for name, shards in fields.items()})
      if bar:
        bar.update(number)

  def arguments(length, rows, places) -> tuple[Any, ...]:
    batch = input_pipeline.evaluation_batch(
        windows, rows, length, mesh, packed=packed, places=places,
        whole_words=decode.whole_words)
    return params, place({k: batch[k] for k in inputs if k in batch}), scales

  first_of: dict[tuple[int, int], tuple[Any, ...]] = {}
  if not packed:  # whose batches have one length
    for length, rows, _ in plan:
      first_of.setdefault((len(rows), length), (length, rows, None))
  lower = {shape: lambda batch=batch: run.lower(*arguments(*batch))
           for shape, batch in first_of.items()} if len(first_of) > 1 else {}
  try:
    with compilation.Compilation(
        'the evaluation of a batch', lower) as programs:
      if not compilation.may_overlap():
        programs.wait_for_all()
      for number, (length, rows, places) in enumerate(plan, 1):
        programs.wait((len(rows), length))
        store(ahead.push((number, rows), devices.local_shards(
            run(*arguments(length, rows, places)))))
      store(ahead.drain())
  finally:
    if bar:
      bar.close()
  if mesh and own_rows and processes.is_multi_process():
    rows = np.concatenate(own_rows).astype(np.int32)
    _write(spans, *processes.gather_rows((rows, {
        name: value[rows] for name, value in vars(spans).items()
        if isinstance(value, np.ndarray)})))
  odd = ~np.isfinite(spans.null) | (
      spans.valid & ~np.isfinite(spans.score)).any(axis=1)
  if odd.any():
    raise errors.NotFiniteError(
        f'the scores of {int(odd.sum())} of {len(windows)} windows are not '
        'finite: the checkpoint is damaged, or its training diverged; lower '
        'config.optim.learning_rate')
  return spans


def _write(spans: candidates.WindowSpans, rows: np.ndarray,
           fields: Mapping[str, np.ndarray]) -> None:
  """Writes fields of the windows `rows`; -1 is a padding row."""
  real = rows >= 0
  for name, value in fields.items():
    getattr(spans, name)[rows[real]] = value[real]


def calls_of_bucket(
    model: qa.QAModel, params: Any, config: config_lib.Config,
    windows: windows_lib.WindowSet, length: int
    ) -> list[tuple[Callable[..., Any], tuple[Any, ...]]]:
  """Returns a (jitted function, arguments) for each program of a bucket.

  They are the programs that `answer_questions` may run for windows of `length`
  tokens on one device, unpacked: one for each power of two of windows, up to
  the rows of a full batch. `windows` are any windows; they are not read.
  """
  run = build_program(model, config.decode)
  most = batch_plans.eval_rows(
      input_pipeline.eval_batch_size(config, 1), length,
      input_pipeline.batch_buckets(config)[-1], multiple=1)
  sizes = {min(1 << n, most) for n in range(most.bit_length() + 1)}
  batches = [windows.gather(np.full(size, -1), length,
                            whole_words=config.decode.whole_words)
             for size in sorted(sizes)]
  return [(run, (params, jax.device_put(
      {k: batch[k] for k in (*qa.INPUTS, *MASKS) if k in batch}),
                 np.ones(1, np.float32))) for batch in batches]


def answer_questions(
    model: qa.QAModel, params: Any, windows: windows_lib.WindowSet,
    config: config_lib.Config, *, temperature: float = 1.0,
    mesh: jax.sharding.Mesh | None = None,
    progress: str = '') -> answers_lib.Answers:
  """Computes the n-best list of every question, by `config.decode`."""
  return answer_at_temperatures(model, params, windows, config, (temperature,),
                                mesh=mesh, progress=progress)[0]


def answer_at_temperatures(
    model: qa.QAModel, params: Any, windows: windows_lib.WindowSet,
    config: config_lib.Config, temperatures: Sequence[float], *,
    mesh: jax.sharding.Mesh | None = None, progress: str = '',
    statistics: Callable[[np.ndarray], None] | None = None,
) -> list[answers_lib.Answers]:
  """Computes the n-best lists with posteriors at each of several temperatures.

  Windows are processed in blocks, so that only one block's candidates are in
  memory. `statistics` is called with candidates.STATISTICS of each block.
  """
  decode, answers, first_windows = config.decode, [], []
  for first, block, label in numbered_blocks(windows, progress):
    first_windows.append(first)
    spans = score_windows(
        model, params, block, config, mesh=mesh, temperatures=temperatures,
        progress=label, statistics=statistics is not None)
    if statistics:
      statistics(spans.statistics)
    answers.append([answers_lib.merge_windows(
        block, spans, n_best=decode.n_best, null_rule=decode.null_rule,
        merge=decode.merge, temperature=t) for t in temperatures])
  return [answers_lib.join_answers(parts, first_windows)
          for parts in zip(*answers, strict=True)]


def numbered_blocks(
    windows: windows_lib.WindowSet, progress: str
    ) -> Iterator[tuple[int, windows_lib.WindowSet, str]]:
  """Yields each block's first window index, windows and progress label."""
  blocks = windows.blocks(BLOCK)
  for number, (first, block) in enumerate(blocks, 1):
    yield first, block, (f'{progress} {number}/{len(blocks)}'
                         if progress and len(blocks) > 1 else progress)
