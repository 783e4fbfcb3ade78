"""The table of mutations: a changed line, and the tests that must notice it."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Mutation:
  """A change of one line, as text, and the tests that are run with it."""

  file: str
  old: str  # part of exactly one line of the file
  new: str
  tests: str  # arguments of pytest
  # The reason why no test can notice the change, if it changes no result.
  equivalent: str = ''


SEARCH = 'qa_jax/decoding/search.py'
TWO_STAGE = 'tests/decoding -k two_stage'
FORMULAS = 'tests/heads/test_head_formulas.py'
BOUNDARIES = 'qa_jax/objectives/boundaries.py'
OBJECTIVES = 'tests/objectives/test_objectives.py -k '
OPTIMIZER = 'qa_jax/training/optimizer.py'
ADAMW = 'tests/training/test_optimizer.py'
TRAINER = 'qa_jax/training/trainer.py'
FROZEN = 'tests/project/test_config_fields.py -k freeze'
STEP = 'qa_jax/training/step.py'
WRAPPERS = 'tests/training/test_step.py -k wrapper'
SKIP = 'tests/training/test_skip.py -k "not kill"'
WINDOWS = 'tests/data/test_windows.py'
ALIGNMENT = 'qa_jax/data/alignment.py'
PLANS = 'qa_jax/data/batch_plans.py'
BATCHES = 'tests/data/test_batches.py'
PACKING = 'qa_jax/data/packing.py'
ROWS = 'tests/data/test_packing.py -k "fit or dealt or shards_hold"'
ROW_PLANS = 'qa_jax/data/row_plans.py'
PERMUTED = 'tests/data/test_row_plans.py -k permute_all'
ANSWERS = 'qa_jax/decoding/answers.py'
EVALUATOR = 'tests/evaluation/test_evaluator.py -k '
SQUAD = 'tests/metrics/test_squad.py'
SIGNIFICANCE = 'qa_jax/metrics/significance.py'
SIGNS = 'tests/metrics/test_significance.py'
COMPARE = 'tests/sweeps/test_report.py -k "counts or floor or hand or holm"'
WHOLE_WORDS = 'tests/inference/test_whole_words.py'
MANAGER = 'qa_jax/checkpoints/manager.py'
STORE = 'tests/checkpoints/test_manager.py'
CALIBRATE = 'qa_jax/evaluation/calibrate.py'
CALIBRATION = 'qa_jax/metrics/calibration.py'
LOOPS = 'tests/evaluation/test_calibration.py -k loops_over_windows'
THRESHOLDS = ('tests/evaluation/test_calibration.py -k '
              '"best_of_all or lies_between or bins or enumerated or all_have"')

MUTATIONS: dict[str, Mutation] = {
    # --- search
    'search-longest': Mutation(
        SEARCH, '(j < i + max_answer_length)', '(j <= i + max_answer_length)',
        'tests/decoding -k dense'),
    'search-order': Mutation(
        SEARCH, 'starts = jnp.sort(starts, axis=-1)  #', 'starts = starts  #',
        TWO_STAGE),
    'search-zero': Mutation(
        SEARCH, 'return jnp.where(x == 0, 0.0, jnp.maximum(x, LOWEST))',
        'return jnp.maximum(x, LOWEST)',
        'tests/decoding -k "zero or ties or eager"'),
    'search-end-mask': Mutation(
        SEARCH, 'padded = jnp.pad(jnp.where(end_mask, end, ILLEGAL),',
        'padded = jnp.pad(end,', TWO_STAGE),
    'search-reach': Mutation(
        SEARCH, 'reach = right.max(axis=-1)', 'reach = right[..., 0]',
        TWO_STAGE),
    'search-beam': Mutation(
        SEARCH, '_among_best(scores.start, width, start_mask), end_mask',
        '_among_best(scores.start, width), end_mask',
        'tests/decoding -k "beam or crowd"'),
    'search-temperature': Mutation(
        SEARCH, 'jnp.maximum(table / temperature, LOWEST)',
        'jnp.maximum(table, LOWEST)', LOOPS),
    'search-imported-length': Mutation(
        SEARCH, '& (end - start < max_answer_length)', '',
        'tests/project/test_importable.py -k legal'),
    'search-beyond-beam': Mutation(
        'qa_jax/decoding/candidates.py',
        'valid = ~(spans.score <= NO_SPAN / 2)', 'valid = spans.valid',
        'tests/decoding -k outside_of_a_beam'),
    'search-nan': Mutation(
        'qa_jax/decoding/candidates.py',
        'valid = ~(spans.score <= NO_SPAN / 2)',
        'valid = spans.score > NO_SPAN / 2', EVALUATOR + 'not_finite'),
    'search-padding': Mutation(
        'qa_jax/span_scores.py', 'end=mask(scores.end))', 'end=scores.end)',
        'tests/decoding -k padding_crowds'),
    'search-doubling': Mutation(
        SEARCH, 'while 2 * span <= width:', 'while 2 * span < width:',
        TWO_STAGE, equivalent='the last line of _sliding_max covers what is '
        'left of the width, and so makes the step that is left out'),
    # --- heads
    'heads-initial': Mutation(
        'qa_jax/heads/layers.py', 'truncated_normal(0.02)',
        'truncated_normal(0.2)', 'tests/models/test_bert.py -k initial_values'),
    'heads-norm-eps': Mutation(
        'qa_jax/heads/layers.py', 'keepdims=True) + 1e-12)',
        'keepdims=True) + 1e-5)', FORMULAS),
    'heads-dead-units': Mutation(
        'qa_jax/heads/layers.py', 'keepdims=True) + 1e-12)',
        'keepdims=True))', FORMULAS + ' -k equal_units'),
    'heads-beam-mask': Mutation(
        'qa_jax/heads/conditional.py',
        'masked = jnp.where(start_mask, log_start, span_scores.MASKED)',
        'masked = log_start', FORMULAS),
    'heads-beam-legal': Mutation(
        'qa_jax/heads/conditional.py',
        'legal = mask if inputs.start_mask is None else inputs.start_mask',
        'legal = mask', WHOLE_WORDS),
    'heads-conditional-null': Mutation(
        'qa_jax/heads/conditional.py',
        'null=log_start[:, 0] + log_end[:, 0, 0])', 'null=log_start[:, 0])',
        FORMULAS),
    'heads-biaffine-scale': Mutation(
        'qa_jax/heads/biaffine.py', 'left / math.sqrt(self.rank)',
        'left / self.rank', FORMULAS),
    'heads-trilinear-end': Mutation(
        'qa_jax/heads/trilinear.py', "end=layers.project('end', hidden)",
        "end=layers.project('end', query)", FORMULAS),
    'heads-prior': Mutation(
        'qa_jax/heads/length_prior.py', '[:, :, :self.width] + prior',
        '[:, :, -self.width:] + prior', FORMULAS),
    'heads-prior-initial': Mutation(
        'qa_jax/heads/length_prior.py', "'bias', nn.initializers.zeros",
        "'bias', nn.initializers.normal(1.0)",
        'tests/heads/test_heads.py -k fresh'),
    'heads-hidden-size': Mutation(
        'qa_jax/heads/mlp.py', 'self.hidden_size or inputs.hidden.shape[-1]',
        'inputs.hidden.shape[-1]',
        'tests/project/test_readme.py -k number_of_parameters'),
    # --- encoders
    'encoders-cudnn': Mutation(
        'qa_jax/models/attention/cudnn.py', 'key_value_seq_lengths=lengths, ',
        '', 'tests/models/test_attention.py -k cudnn_is_asked'),
    'encoders-auto-length': Mutation(
        'qa_jax/models/attention/__init__.py', 'length=q.shape[2],',
        'length=q.shape[3],', 'tests/models/test_attention.py -k auto_chooses'),
    'encoders-long-bias': Mutation(
        'qa_jax/models/attention/xla.py', 'or bias is not None or q.ndim > 4',
        'or q.ndim > 4', 'tests/models/test_attention.py -k long_rows'),
    'encoders-tiles': Mutation(
        'qa_jax/models/attention/pallas.py',
        'y = y * shrink[:, None] + product(dropped, v, 1, 0)',
        'y = y + product(dropped, v, 1, 0)',
        'tests/models/test_attention.py -k pallas'),
    'encoders-tpu-heads': Mutation(
        'qa_jax/models/attention/pallas_tpu.py',
        'return [(n, pl.program_id(1) * count + n, seeds)',
        'return [(n, n, seeds)', 'tests/models/test_attention.py -k groups'),
    'encoders-tpu-gradients': Mutation(
        'qa_jax/models/attention/pallas_tpu.py',
        'b, 0, jnp.maximum(n - count + 1, 0) * groups + g)),',
        'b, 0, jnp.maximum(n - count, 0) * groups + g)),',
        'tests/models/test_attention.py -k gradients_are'),
    'encoders-devices': Mutation(
        'qa_jax/models/attention/base.py',
        'if mesh.empty or mesh.manual_axes or mesh.size == 1:', 'if True:',
        'tests/models/test_attention.py -k each_device'),
    'encoders-rate': Mutation(
        'qa_jax/models/encoders/bert.py',
        'attention_lib.Drop(keys, c.attention_dropout)',
        'attention_lib.Drop(keys, c.dropout)',
        'tests/models/test_encoders.py -k layers_and_places'),
    'encoders-dropout-hash': Mutation(
        'qa_jax/models/dropout.py', 'x = (x ^ (x >> 16)) *',
        'x = (x ^ (x >> 15)) *',
        'tests/models/test_dropout.py -k published'),
    'encoders-norm-elsewhere': Mutation(
        'qa_jax/models/encoders/base.py', 'default=lambda a, b: (a * b).sum',
        'default=lambda a, b: a.sum', 'tests/models/test_layer_norm.py'),
    'encoders-dense-elsewhere': Mutation(
        'qa_jax/models/matmul.py', 'default=lambda: add(times(out=dtype)))',
        'default=lambda: times(out=dtype))', 'tests/models/test_matmul.py'),
    'encoders-packed-dropout': Mutation(
        'qa_jax/models/qa.py', 'packed.packed_row.reshape(-1) if packed else',
        '0 * packed.packed_row.reshape(-1) if packed else',
        'tests/data/test_packing.py -k of_its_number'),
    # --- objectives
    'objectives-answerability': Mutation(
        'qa_jax/objectives/__init__.py',
        'return inner.loss(scores, batch) + weight * extra',
        'return inner.loss(scores, batch) + extra',
        OBJECTIVES + 'answerability'),
    'objectives-domain': Mutation(
        BOUNDARIES, 'domain = (owned & ~mask_of(same_question)) | gold | null',
        'domain = owned | gold | null', OBJECTIVES + 'shared'),
    'objectives-unowned': Mutation(
        BOUNDARIES, 'counted = present & (owns_start | ~elsewhere)',
        'counted = owns_start', OBJECTIVES + 'shared'),
    'objectives-spans-apart': Mutation(
        BOUNDARIES, 'place = golds + context_start[:, None, None]',
        'place = golds', OBJECTIVES + 'shared'),
    'objectives-kernel': Mutation(
        BOUNDARIES, 'return jnp.where(gold > 0, kernel, column == 0)',
        'return kernel', OBJECTIVES + 'kernel'),
    'objectives-smoothing': Mutation(
        BOUNDARIES, 'even = valid / valid.sum(axis=1, keepdims=True)',
        'even = valid / valid.shape[1]', OBJECTIVES + 'smoothing'),
    'objectives-hard-em': Mutation(
        'qa_jax/objectives/spans.py',
        "jnp.minimum(batch['step'][0] / tau, cap)",
        "cap * jnp.minimum(batch['step'][0] / tau, 1.0)", OBJECTIVES + 'hard'),
    'objectives-f1': Mutation(
        'qa_jax/objectives/spans.py', 'gold.astype(f1.dtype)', 'f1',
        OBJECTIVES + 'f1'),
    'objectives-beyond': Mutation(
        'qa_jax/span_scores.py', 'golds[..., 1] - golds[..., 0] >= longest',
        'golds[..., 1] - golds[..., 0] > longest',
        OBJECTIVES + '"brute or marginal or f1"'),
    # --- optimizer and step
    'optimizer-cosine': Mutation(
        OPTIMIZER, 'optax.cosine_decay_schedule(peak, max(num_steps - warmup_',
        'optax.cosine_decay_schedule(peak, max(num_steps - 0 * warmup_', ADAMW),
    'optimizer-warm-up': Mutation(
        OPTIMIZER, 'int(warmup_fraction * num_steps)',
        '-int(-warmup_fraction * num_steps // 1)', ADAMW),
    'optimizer-decay-mask': Mutation(
        OPTIMIZER,
        'weight_decay, lambda params: decay_mask(params, bias_table)',
        'weight_decay', ADAMW),
    'optimizer-clip': Mutation(
        OPTIMIZER,
        '_clip(clip_norm) if clip_norm else optax.identity', 'optax.identity',
        ADAMW),
    'optimizer-layers': Mutation(
        OPTIMIZER, 'jax.tree.map(lambda u, s: u * s, updates, scales)',
        'jax.tree.map(lambda u, s: u, updates, scales)', ADAMW),
    'optimizer-eps': Mutation(
        OPTIMIZER, '(jnp.sqrt(v * v_factor) + eps)',
        '(jnp.sqrt(v * v_factor) + 1e-8)', ADAMW),
    'trainer-warm-up': Mutation(
        TRAINER, 'warmup_fraction=config.warmup_fraction)',
        'warmup_fraction=0.1)', ADAMW),
    'trainer-clip': Mutation(
        TRAINER, 'clip_norm=config.clip_norm,', '', ADAMW),
    'trainer-bias': Mutation(
        TRAINER, ' bias_correction=config.bias_correction,', '', ADAMW),
    'trainer-eps': Mutation(TRAINER, 'eps=config.eps, ', '', ADAMW),
    'trainer-frozen': Mutation(
        TRAINER, 'if freeze_encoder:', 'if False:', FROZEN),
    'optimizer-frozen': Mutation(
        OPTIMIZER, 'if not freeze_encoder:', 'if True:', FROZEN),
    'trainer-logged-rate': Mutation(
        TRAINER, 'rate = schedule(state.step)',
        'rate = schedule(state.step + 1)', SKIP),
    'trainer-applied-rate': Mutation(
        TRAINER, 'applied = schedule if step is None else',
        'applied = schedule if True else', SKIP),
    'trainer-speeds': Mutation(
        'qa_jax/training/metrics_log.py', '(now - self._read) / len(done), now',
        '(now - self._read), now',
        'tests/training/test_metrics_log.py -k read_together'),
    'trainer-complete': Mutation(
        'qa_jax/training/checkpointing.py',
        "row.get('split') == 'train' and row['step'] == step",
        "row.get('split') == 'train'",
        'tests/training/test_resume.py -k complete_at_its'),
    'step-dropout-key': Mutation(
        STEP, 'jax.random.wrap_key_data(state.key_data), state.step)',
        'jax.random.wrap_key_data(state.key_data), 0)',
        'tests/training/test_step.py -k masks'),
    'step-devices': Mutation(
        STEP, 'totals = jax.lax.psum(totals, axis_name)', 'pass', WRAPPERS),
    'step-mean': Mutation(
        STEP, 'lambda g: g * share, grads', "lambda g: g / len(batch['row']), "
        'grads', WRAPPERS),
    'step-one-row': Mutation(
        STEP, 'jnp.maximum(weight, 1e-8)', 'jnp.maximum(weight, 2.0)',
        'tests/training/test_step.py -k one_real_row'),
    'step-accumulation': Mutation(
        STEP, 'if accumulation == 1:', 'if True:',
        'tests/training/test_step.py -k accumulation_changes'),
    'step-micro-rows': Mutation(
        STEP, '-1, accumulation, *x.shape[1:]).swapaxes(0, 1), batch)',
        'accumulation, -1, *x.shape[1:]), batch)',
        OBJECTIVES + 'grouped_batches'),
    'step-clip-norm': Mutation(
        STEP, "norm=values['grad_norm'])", "norm=2 * values['grad_norm'])",
        SKIP),
    'step-skip-norm': Mutation(
        STEP, "good &= values['grad_norm'] <= skip_norm",
        "good &= values['grad_norm'] < skip_norm", SKIP),
    'step-finite': Mutation(
        STEP, 'jnp.all(jnp.isfinite(jnp.stack([*values.values()])))',
        "jnp.isfinite(values['loss'])", SKIP),
    'parallel-batch': Mutation(
        'qa_jax/training/parallel.py',
        'if batch_size % (num_devices * accumulation):',
        'if batch_size % num_devices:',
        'tests/training/test_parallel.py -k divides'),
    'parallel-fsdp': Mutation(
        'qa_jax/training/parallel.py', 'if size > 1 and axes:', 'if False:',
        'tests/project/test_config_fields.py -k parallel.mesh'),
    # --- windows and batches
    'windows-bonus': Mutation(
        'qa_jax/data/windows.py', 'bonus = length[a] - length[b]',
        'bonus = 0 * length[b]', WINDOWS),
    'windows-tie': Mutation(
        'qa_jax/data/windows.py', '(score_a >= score_b)', '(score_a > score_b)',
        WINDOWS),
    'windows-weight': Mutation(
        'qa_jax/data/windows.py', "'weight': real_row[:, 0].astype(np.float32)",
        "'weight': np.ones(len(indices), np.float32)", WINDOWS),
    'windows-questions': Mutation(
        'qa_jax/data/windows.py', 'keep = ordinal < longest',
        'keep = ordinal <= longest', WINDOWS),
    'alignment-nearest': Mutation(
        ALIGNMENT, 'min(hits, key=lambda h: abs(h - near), default=-1)',
        'max(hits, default=-1)', WINDOWS),
    'alignment-before': Mutation(
        ALIGNMENT, 'context.rfind(text, 0, near + len(text))',
        'context.rfind(text, 0, near)', WINDOWS),
    'alignment-unlocated': Mutation(
        ALIGNMENT, 'if answer.start >= 0 and context.startswith(text, a):',
        'if context.startswith(text, a):', WINDOWS),
    'alignment-widened': Mutation(
        ALIGNMENT, "fate = 'widened'", 'pass', WINDOWS),
    'windows-word-starts': Mutation(
        'qa_jax/data/windows.py',
        'owned[in_context] &= ~inside[(context + local)[in_context]]', 'pass',
        WHOLE_WORDS),
    'windows-word-ends': Mutation(
        'qa_jax/data/windows.py',
        'last[in_context] |= ~inside[after[in_context]]',
        'last[in_context] = True', WHOLE_WORDS),
    'windows-cut-words': Mutation(
        'qa_jax/data/windows.py',
        'after = np.minimum(context + local + 1, row_end)',
        'after = np.minimum(context + np.minimum(local + 1, '
        'self.length[row] - 1), row_end)', WHOLE_WORDS),
    'tokenizer-marks': Mutation(
        'qa_jax/data/tokenizer.py',
        'end = np.maximum(end, np.minimum(after[end], limit))',
        'end = np.maximum(end, after[end])',
        'tests/data/test_tokenizer.py -k mark'),
    'batches-shuffled': Mutation(
        PLANS, 'plan = _fill(rng.permutation(indices), lengths,',
        'plan = _fill(np.asarray(indices), lengths,', BATCHES),
    'batches-epochs': Mutation(
        'qa_jax/data/batches.py', "if position['epoch'] != self.epoch:",
        'if False:', BATCHES),
    'batches-one-order': Mutation(
        'qa_jax/data/batches.py', 'seed=self.seed, epoch=self.epoch,',
        'seed=self.seed, epoch=0,', BATCHES),
    'batches-group-weight': Mutation(
        'qa_jax/data/batches.py',
        "batch['weight'] *= batch['group'] == batch['row']",
        "batch['weight'] *= 1", BATCHES),
    'batches-devices': Mutation(
        PLANS, 'most = -(-_enough_rows(len(lengths)) // multiple) * multiple',
        'most = _enough_rows(len(lengths))', BATCHES),
    'batches-packed': Mutation(
        PLANS, 'size = -(-min(batch_size, _enough_rows(count)) // multiple)',
        'size = -(-max(batch_size, _enough_rows(count)) // multiple)', BATCHES),
    'packing-best-fit': Mutation(
        PACKING, 'room = length + (fits & -fits).bit_length() - 1',
        'room = length + fits.bit_length() - 1', ROWS),
    'packing-extra-rows': Mutation(
        PACKING, 'if fits and needed[r] + extras[i] <= most_extra:',
        'if fits and needed[r] <= most_extra:',
        'tests/data/test_row_plans.py -k epoch_holds'),
    'packing-shared-rows': Mutation(
        'qa_jax/data/row_plans.py', 'extra=more, most_extra=self.rows - 1)',
        'extra=more)', 'tests/data/test_row_plans.py -k emptiest'),
    'packing-fixed-rows-even': Mutation(
        'qa_jax/data/row_plans.py', "np.argsort(load[open_], kind='stable')",
        "np.argsort(-load[open_], kind='stable')",
        'tests/data/test_row_plans.py -k evenly'),
    'packing-fixed-rows-drawn': Mutation(
        'qa_jax/data/row_plans.py', 'default_rng([seed, epoch])',
        'default_rng([seed, 0])',
        'tests/data/test_row_plans.py -k epoch'),
    'packing-dealing': Mutation(
        PACKING, 'table[1::2] = table[1::2, ::-1]', 'pass', ROWS),
    # --- candidates and answers
    'answers-probability': Mutation(
        ANSWERS, 'np.minimum(score / temperature - total[question], 0.0)',
        'score / temperature - total[question]', EVALUATOR + 'above_1'),
    'answers-n-best': Mutation(
        ANSWERS, 'np.arange(len(row)) - ptr[question] < n_best',
        'np.arange(len(row)) - ptr[question] <= n_best', EVALUATOR + 'loops'),
    'candidates-longest': Mutation(
        'qa_jax/decoding/candidates.py', '(last - first < longest)',
        '(last - first <= longest)', EVALUATOR + 'gold_span'),
    'candidates-regret': Mutation(
        'qa_jax/inference/decode.py',
        'search.two_stage, scores, *masks, longest=longest,',
        'search.two_stage, scores, masks[1], masks[1], longest=longest,',
        EVALUATOR + 'regret'),
    'candidates-gold-end': Mutation(
        'qa_jax/decoding/candidates.py',
        '& jnp.take_along_axis(end_mask, last, axis=1))', ')', WHOLE_WORDS),
    # --- checkpoints, export and populations
    'dispatch-count': Mutation(
        STEP, '0, batches[COUNT].max(), body', '0, most, body',
        'tests/training/test_dispatch.py -k any_number'),
    'checkpoints-best': Mutation(
        MANAGER, 'key=lambda step: (scores[step], step), default=None)',
        'key=lambda step: (scores[step], -step), default=None)', STORE),
    'checkpoints-aside': Mutation(
        MANAGER, 'shutil.rmtree(aside, ignore_errors=True)', 'pass', STORE),
    'checkpoints-finite': Mutation(
        MANAGER, 'for k, v in metrics.items() if math.isfinite(v)}',
        'for k, v in metrics.items()}', STORE),
    'export-epsilon': Mutation(
        'qa_jax/export/hugging_face.py',
        'kind.eps: sizes.layer_norm_eps,', 'kind.eps: 1e-12,',
        'tests/export/test_hugging_face_export.py -k sizes'),
    'export-bonus': Mutation(
        'qa_jax/export/run.py',
        'np.minimum(token - begin, end - 1 - token) + end - begin',
        'np.minimum(token - begin, end - 1 - token)',
        'tests/export/test_stablehlo.py -k long_windows'),
    'population-start': Mutation(
        'qa_jax/training/population.py',
        'key=lambda step: (counts[step], step))', 'key=lambda step: step)',
        'tests/training/test_population.py -k common_step'),
    'population-failure': Mutation(
        'qa_jax/training/population.py',
        'if self.meter.skipped[1] > self.trainer.config.train.max_skipped:',
        'if False:', 'tests/training/test_population.py -k hold_back'),
    'ensemble-threshold': Mutation(
        'qa_jax/evaluation/ensemble.py',
        'selective.declines(self.na_score, threshold), empty, answered)',
        'self.na_score >= threshold, empty, answered)',
        'tests/evaluation/test_ensemble.py -k at_the_threshold'),
    # --- metrics
    'metrics-tie': Mutation(
        'qa_jax/metrics/selective.py', 'return na_score > threshold',
        'return na_score >= threshold', 'tests/metrics/test_predictions.py'),
    'metrics-coverage': Mutation(
        'qa_jax/metrics/selective.py', '-(-percent * len(score) // 100) - 1',
        'percent * len(score) // 100 - 1',
        'tests/metrics/test_error_analysis.py -k coverage'),
    'metrics-unanswered': Mutation(
        'qa_jax/metrics/squad.py',
        'unanswered = sum(not e.gold_texts and e.id in answers for',
        'unanswered = sum(not e.gold_texts for', SQUAD),
    'metrics-sum': Mutation(
        'qa_jax/metrics/squad.py', 'float(np.cumsum(values)[-1]) / len(values)',
        'float(np.mean(values))', SQUAD),
    # --- significance
    'significance-holm': Mutation(
        SIGNIFICANCE, 'p[order] * np.arange(len(p), 0, -1)',
        'p[order] * len(p)', SIGNS),
    'significance-seeds': Mutation(
        SIGNIFICANCE, 'rng.integers(len(x), size=(len(x), count))',
        'np.repeat(np.arange(len(x))[:, None], count, 1)', SIGNS),
    'significance-one': Mutation(
        SIGNIFICANCE, 'if len(changed) < 2:', 'if len(changed) < 1:', SIGNS),
    'significance-level': Mutation(
        SIGNIFICANCE, '[ALPHA / 2, 1 - ALPHA / 2]',
        '[ALPHA, 1 - ALPHA]', SIGNS),
    'significance-sd': Mutation(
        SIGNIFICANCE, 'np.std(values, ddof=1) / n**0.5)',
        'np.std(values, ddof=0) / n**0.5)', 'tests/sweeps/test_report.py -k '
        'interval_over_seeds'),
    'significance-floor': Mutation(
        'qa_jax/sweeps/compare.py', 'and abs(self.mean) > self.floor',
        'and abs(self.mean) > 0 * self.floor', COMPARE),
    'significance-corrected': Mutation(
        'qa_jax/sweeps/compare.py', 'self.p_holm < 0.05', 'self.p < 0.05',
        COMPARE),
    # --- calibration
    'calibration-unanswerable': Mutation(
        CALIBRATE, '[with_null and e.impossible for e in examples]',
        '[False for e in examples]', LOOPS),
    'calibration-blocks': Mutation(
        CALIBRATION, 'part.gold_of + size', 'part.gold_of',
        'tests/evaluation/test_calibration.py -k joined'),
    'calibration-windows': Mutation(
        CALIBRATE, 'log_partition=np.logaddexp.reduceat(',
        'log_partition=np.maximum.reduceat(', LOOPS),
    'calibration-best': Mutation(
        CALIBRATE, 'best=best[fits],', 'best=best[fits] + 1,', LOOPS),
    'calibration-beam': Mutation(
        CALIBRATE, 'spans.gold_scores > candidates.NO_SPAN / 2',
        'spans.gold_scores > -1e38', LOOPS),
    'calibration-no-span': Mutation(
        CALIBRATE, 'fits &= best > candidates.NO_SPAN', 'pass', LOOPS),
    'calibration-merge': Mutation(
        CALIBRATE, ', merge=decode.merge))', '))',
        'tests/evaluation/test_calibration.py -k merged_answers'),
    'calibration-lowest': Mutation(
        CALIBRATION, 'int((total > total.max() - 1e-9).argmax())',
        'len(total) - 1 - int((total > total.max() - 1e-9)[::-1].argmax())',
        THRESHOLDS),
    'calibration-edge': Mutation(
        CALIBRATION, 'bin_of = np.searchsorted(edges[1:-1], confidence)',
        "bin_of = np.searchsorted(edges[1:-1], confidence, 'right')",
        THRESHOLDS),
    'calibration-half-way': Mutation(
        CALIBRATION, '(scores[1:] + scores[:-1]) / 2,', 'scores[:-1],',
        THRESHOLDS),
    'calibration-spline': Mutation(
        CALIBRATION, 'data.log_partition - data.best[:, None] / TEMPERATURES',
        'data.log_partition - data.best[:, None]', THRESHOLDS),
    # --- found by changes drawn at random
    'rows-shards': Mutation(
        ROW_PLANS, 'shard = rng.permutation(to.shards)[to.shard[place]]',
        'shard = to.shard[place]', PERMUTED),
    'rows-questions': Mutation(
        ROW_PLANS, 'questions = _shuffle_equal(rng, self._kind)',
        "questions = np.argsort(self._kind, kind='stable')", PERMUTED),
    'head-starts': Mutation(
        'qa_jax/inference/decode.py',
        "start_mask=starts if 'end_mask' in batch else None)",
        'start_mask=starts)', f'{WHOLE_WORDS} -k legal_starts_for'),
    'cache-others': Mutation(
        'qa_jax/data/cache.py',
        "elif re.fullmatch('[0-9a-f]{64}', path.name) and path != newest:",
        'elif path != newest:', 'tests/data/test_cache.py -k kept_alone'),
    'ensemble-members': Mutation(
        'qa_jax/evaluation/ensemble.py',
        'threshold = held_out_pool.combine(selected).best_threshold()',
        'threshold = held_out_pool.combine(everyone).best_threshold()',
        'tests/evaluation/test_ensemble.py -k their_scores'),
    'export-checkpoint': Mutation(
        'qa_jax/export/hugging_face.py',
        'qa = predict.load(directory, checkpoint=checkpoint_name,',
        'qa = predict.load(directory,',
        'tests/export/test_hugging_face_export.py -k that_is_named'),
    'report-headline': Mutation(
        'qa_jax/sweeps/report.py',
        "best = max(others, key=lambda v: (v.deltas['f1'].verdict == 'better',",
        'best = max(others, key=lambda v: (',
        'tests/sweeps/test_report.py -k best_difference'),
    'serving-left': Mutation(
        'qa_jax/serving/batching.py',
        'batch = [(row, result) for row, result in batch if not result.done()]',
        'pass', 'tests/serving/test_server.py -k has_left'),
}
