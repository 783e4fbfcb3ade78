"""Head, objective and decoding work together, or are refused by name."""

import jax
import jax.numpy as jnp
import pytest

from qa_jax import build
from qa_jax import config as config_lib
from qa_jax import errors
from qa_jax import registry
from qa_jax.checkpoints.run_directory import RunDirectory
from qa_jax.data import tokenizer
from qa_jax.decoding import null_rules
from qa_jax.heads import HEADS
from qa_jax.heads import nesting
from qa_jax.models.encoders import bert
from qa_jax.objectives import OBJECTIVES
from qa_jax.span_scores import HeadInput
from tests.common import tiny

BATCH = {
    'context_mask': ((2, 8), jnp.bool_), 'start_mask': ((2, 8), jnp.bool_),
    'start_positions': ((2,), jnp.int32), 'end_positions': ((2,), jnp.int32),
    'gold_spans': ((2, 3, 2), jnp.int32), 'group': ((2,), jnp.int32),
    'context_start': ((2,), jnp.int32),
    'step': ((2,), jnp.int32), 'draw': ((2,), jnp.float32),
    'weight': ((2,), jnp.float32)}


def loss_shape(head: str, objective: str) -> jax.ShapeDtypeStruct:
  """Traces the loss of an objective on the scores of a head."""
  module, loss = HEADS[head](), OBJECTIVES[objective]().loss

  def run(hidden, batch):
    inputs = HeadInput((hidden, hidden), batch['context_mask'],
                       batch['start_positions'])
    return loss(module.init_with_output(jax.random.key(0), inputs)[0], batch)
  return jax.eval_shape(
      run, jax.ShapeDtypeStruct((2, 8, 4), jnp.float32),
      {k: jax.ShapeDtypeStruct(*v) for k, v in BATCH.items()})


@pytest.mark.slow
@pytest.mark.parametrize('objective', sorted(OBJECTIVES))
@pytest.mark.parametrize('head', sorted(HEADS))
def test_pair_of_head_and_objective_is_traced_or_refused(head, objective):
  scores = nesting.score_shapes(HEADS[head](), training=True)
  if not build.incompatibility(OBJECTIVES[objective](), scores):
    build.check_objective(objective, head)
    loss = loss_shape(head, objective)
    assert loss.shape == (2,) and loss.dtype == jnp.float32
    return
  with pytest.raises(errors.UserError) as caught:
    build.check_objective(objective, head)
  message = str(caught.value)
  assert '\n' not in message and 'Heads that fit: ' in message
  suggested = message.split('Heads that fit: ')[1].split('; ')[0].split(', ')
  assert head not in suggested and suggested
  for name in suggested:
    build.check_objective(objective, name)


@pytest.mark.parametrize(('objective', 'head', 'message'), [
    ('joint', 'independent', 'needs a head with pair scores'),
    ('compound', 'biaffine', 'needs a head with boundary scores'),
    ('conditional', 'mlp', 'needs a head with conditional scores'),
    ('answerability', 'shared', 'needs a head with null scores'),
    ('span_softmax', 'conditional', 'for the gold start alone'),
    ('marginal(over="boundary")', 'conditional', 'for the gold start alone'),
    ('shared_norm', 'conditional', 'for the gold start alone'),
    ('cross_entropy', 'biaffine', "leaves the head's pair scores"),
    ('cross_entropy', 'answerability', "leaves the head's null scores"),
    ('joint', 'biaffine(width=20)', 'exceeds the 20 lengths'),
    ('answerability(base="joint")', 'answerability', 'pair scores')])
def test_the_missing_part_is_named(objective, head, message):
  with pytest.raises(errors.UserError, match=message):
    build.check_objective(objective, head)


@pytest.mark.parametrize(('objective', 'head'), [
    ('joint', 'length_prior(base="biaffine(rank=3)", width=30)'),
    ('answerability(base="joint")', 'answerability(base="biaffine")'),
    ('joint(max_answer_length=20)', 'biaffine(width=20)'),
    ('span_softmax', 'biaffine'),
    ('conditional', 'conditional(form="electra")')])
def test_compositions_fit(objective, head):
  build.check_objective(objective, head)


def check_decode(head='biaffine(width=5)', objective='span_softmax', **fields):
  build.check_decode(
      config_lib.Decode(**{'max_answer_length': 5, **fields}),
      registry.build(HEADS, head, what='head'),
      registry.build(OBJECTIVES, objective, what='objective'))


@pytest.mark.parametrize(('decode', 'message'), [
    ({'search': 'two_stge'}, "unknown search 'two_stge'.*'two_stage'"),
    ({'search': 'top_k(n=3)'}, "'top_k' has no argument 'n'"),
    ({'search': 'beam(width=0)'}, 'width=0 must be at least 1'),
    ({'null_rule': 'minnull'}, "null_rule 'minnull'.*'min_null'"),
    ({'merge': 'surface'}, "decode.merge 'surface'.*'surface_form'"),
    ({'null_rule': 'classifier'}, "'classifier' needs a null logit: a head "
     r'that has one \(.*answerability\) and an objective that trains it '
     r'\(answerability\); .* never, min_null, (?!.*(classifier|product))'),
    ({'null_rule': 'product'}, "'product' needs a null logit"),
    ({'max_answer_length': 6}, 'max_answer_length=6 exceeds the 5 lengths')])
def test_decoding_that_does_not_fit_is_refused_in_one_line(decode, message):
  with pytest.raises(errors.UserError, match=message) as caught:
    check_decode(**decode)
  assert '\n' not in str(caught.value)


@pytest.mark.parametrize(('objective', 'longest', 'trained'), [
    ('joint(max_answer_length=10)', 11, 10),
    ('joint(max_answer_length=10)', 10, None),
    ('joint(constrained=False)', 60, None),
    ('span_softmax', 60, 30), ('compound', 60, 30), ('hard_em', 60, 30),
    ('f1_weighted', 60, 30), ('marginal', 60, 30),
    ('marginal(over="boundary")', 60, None), ('cross_entropy', 60, None),
    ('answerability(base="span_softmax(max_answer_length=4)")', 5, 4)])
def test_a_line_says_which_decoded_lengths_are_not_trained(
    objective, longest, trained):
  line = build.untrained_lengths(
      config_lib.check_config({
          'train': {'num_steps': 1}, 'decode': {'max_answer_length': longest}}),
      registry.build(OBJECTIVES, objective, what='objective'))
  assert bool(line) == bool(trained)
  if trained:
    assert f'decode.max_answer_length={longest} exceeds ' in line
    assert f'max_answer_length={trained} of the objective' in line


@pytest.mark.parametrize('rule', null_rules.NULL_RULES)
def test_every_rule_fits_a_null_that_is_trained_as_a_logit(rule):
  check_decode('answerability', 'answerability', null_rule=rule)


@pytest.mark.parametrize('rule', null_rules.NULL_RULES)
def test_null_of_a_head_is_no_logit_unless_trained_as_one(rule):
  # The null score of a conditional head is a log probability, not a logit.
  check = lambda: check_decode('conditional', 'conditional', null_rule=rule)
  if rule in ('classifier', 'product'):
    with pytest.raises(errors.UserError, match='an objective that trains it'):
      check()
  else:
    check()


def test_the_longest_answer_may_be_all_that_the_head_scores():
  check_decode(max_answer_length=5)


# --- sizes of encoders


NO_SIZES = {'hidden_size': 0, 'num_layers': 0, 'num_heads': 0, 'mlp_size': 0}


@pytest.fixture(scope='module')
def source(tmp_path_factory):
  """The directory of a run of a small encoder, without parameters."""
  path = tmp_path_factory.mktemp('source')
  RunDirectory(path).write(tiny.config(), bert.BertConfig(
      vocab_size=50, hidden_size=16, num_layers=2, num_heads=2, mlp_size=32,
      max_position=64), tokenizer.train_tokenizer(['a b'], vocab_size=100), {})
  RunDirectory(path).checkpoints.mkdir()
  return path


def encoder_config(source=None, vocab_size=50, length=64, **model):
  return build.encoder_config(tiny.config(
      model=model, data={'max_length': length}), vocab_size, source)


@pytest.mark.parametrize(('fields', 'message'), [
    ({'vocab_size': 51}, 'has 51 entries, but the embeddings of .* only 50'),
    ({'length': 65}, "max_length=65 exceeds the encoder's 64 positions"),
    ({'hidden_size': 32}, 'hidden_size=32, but .* has 16; 0 takes'),
    ({'num_layers': 3}, 'num_layers=3, but .* has 2; 0 takes'),
    ({'preset': 'mini'}, "preset 'mini' has num_layers 4, but .* has 2"),
    ({'encoder': 'modernbert'}, "modernbert', but .* has the encoder 'bert'"),
    ({'encoder': 'bert(max_position=128)'}, 'but .* has max_position 64;'),
    ({'position_base': 9.0}, 'position_base=9, but .* has its positions'),
    ({'equal_query_key': True}, 'equal_query_key=True, but .* has its weights')
])
def test_a_size_that_a_checkpoint_lacks_is_refused(source, fields, message):
  with pytest.raises(errors.UserError, match=message) as caught:
    encoder_config(source, **{**NO_SIZES, **fields})
  assert '\n' not in str(caught.value)


def test_a_checkpoint_gives_its_sizes_and_first_layers(source):
  sizes = encoder_config(source, **NO_SIZES, dropout=0.25)
  assert (sizes.vocab_size, sizes.num_layers, sizes.dropout) == (50, 2, 0.25)
  sizes = encoder_config(source, encoder='bert(max_position=64)', **{
      **NO_SIZES, 'num_layers': 1, 'hidden_size': 16}, vocab_size=9)
  assert (sizes.vocab_size, sizes.num_layers) == (50, 1)


def test_sizes_without_a_checkpoint_override_the_preset():
  sizes = encoder_config(preset='mini', **{**NO_SIZES, 'hidden_size': 64})
  assert sizes.hidden_size == 64 and sizes.mlp_size == 1024
  with pytest.raises(errors.UserError, match=r'18 is not .* num_heads 4'):
    encoder_config(hidden_size=18, num_heads=4)
