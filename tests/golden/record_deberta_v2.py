"""Records deberta_v2_golden.npz and deberta_v2_configs.json, once.

  pip install transformers==5.24.0 torch safetensors
  python -m tests.golden.record_deberta_v2

For each of VARIANTS there are the states of real tokens, the logits and the
loss of a DebertaV2ForQuestionAnswering of transformers with the weights that
`drawn.tensors` draws. For the first variant there are also its gradients and
its parameters after one update of AdamW: in full for a layer and the relative
positions, and as norms for all. The configs are those that transformers writes.
A checksum of ids and offsets of each text is there for each kind of tokenizer.

Glossary of shapes: B batch, L length.
"""

import json
import pathlib
import tempfile

import numpy as np
import torch
import transformers

from tests.common import drawn
from tests.common import scripts
from tests.golden import losses

HERE = pathlib.Path(__file__).resolve().parent
SIZES = dict(vocab_size=60, hidden_size=16, num_hidden_layers=2,
             num_attention_heads=2, intermediate_size=24,
             max_position_embeddings=40, relative_attention=True)
V3 = dict(position_buckets=8, norm_rel_ebd='layer_norm', share_att_key=True,
          pos_att_type='p2c|c2p', position_biased_input=False)
VARIANTS = {
    'v3': V3,
    # Long distances share the last vectors.
    'v2': dict(pos_att_type=['c2p', 'p2c'], max_relative_positions=7,
               type_vocab_size=2, conv_kernel_size=5),
    'c2p': V3 | dict(pos_att_type='c2p', share_att_key=False),
    'p2c': V3 | dict(pos_att_type='p2c', share_att_key=False,
                     norm_rel_ebd='none'),
    'conv': V3 | dict(conv_kernel_size=3, conv_act='gelu'),
    'one': dict(pos_att_type='p2c', share_att_key=True, type_vocab_size=1,
                position_buckets=6, max_relative_positions=20)}
IN_FULL = ('encoder.rel_embeddings', 'encoder.LayerNorm', 'encoder.layer.0.')


def inputs() -> dict[str, np.ndarray]:
  """Draws a batch of three rows [B, L]: all lengths, types and gold spans."""
  rng = np.random.default_rng(0)
  column = np.arange(22)[None]
  inside = column < np.array([22, 15, 8])[:, None]
  context = inside & (column >= np.array([9, 6, 3])[:, None])
  return {
      'token_ids': np.where(
          inside, rng.integers(4, 60, inside.shape), 0).astype(np.int32),
      'token_type_ids': context.astype(np.int32),
      'attention_mask': inside.astype(np.int32), 'context_mask': context,
      'start_positions': np.array([12, 0, 4], np.int32),
      'end_positions': np.array([17, 0, 4], np.int32)}


def is_decayed(name: str) -> bool:
  return not name.endswith(('.bias', 'LayerNorm.weight'))


def record(fields: dict, learns: bool) -> tuple[dict, dict]:
  """Returns the arrays of a variant and its config.json."""
  net = transformers.DebertaV2ForQuestionAnswering(
      transformers.DebertaV2Config(**SIZES, **fields)).eval()
  named = dict(net.named_parameters())
  with torch.no_grad():
    for name, value in drawn.tensors(
        {name: tuple(p.shape) for name, p in named.items()}).items():
      named[name].copy_(torch.tensor(value))
  batch = inputs()
  types = batch['token_type_ids'] * (fields.get('type_vocab_size', 0) > 1)
  result = net(input_ids=torch.tensor(batch['token_ids']),
               token_type_ids=torch.tensor(types),
               attention_mask=torch.tensor(batch['attention_mask']),
               output_hidden_states=True)
  loss = losses.loss_of(result, batch)
  real = torch.tensor(batch['attention_mask'] > 0)
  out = {'layers': torch.stack([x[real] for x in result.hidden_states]),
         'start': result.start_logits, 'end': result.end_logits, 'loss': loss}
  with tempfile.TemporaryDirectory() as root:
    net.save_pretrained(root)
    config = json.loads((pathlib.Path(root) / 'config.json').read_text())
  if learns:
    loss.backward()
    optimizer = torch.optim.AdamW(
        [{'params': [p for k, p in named.items() if is_decayed(k) == decayed],
          'weight_decay': 0.01 * decayed} for decayed in (True, False)],
        lr=1e-3, eps=1e-8)
    before = {name: p.detach().clone() for name, p in named.items()}
    optimizer.step()
    for name, p in named.items():
      out[f'norm {name}'] = torch.stack(
          [p.grad.norm(), (p - before[name]).norm()])
      if name.removeprefix('deberta.').startswith(IN_FULL):
        out |= {f'gradient {name}': p.grad, f'update {name}': p - before[name]}
  return {name: x.detach().numpy() for name, x in out.items()}, config


def main() -> None:
  arrays, configs, texts = inputs(), {}, scripts.texts()
  for variant, fields in VARIANTS.items():
    recorded, configs[variant] = record(fields, variant == 'v3')
    arrays |= {f'{variant} {name}': x for name, x in recorded.items()}
  for kind in scripts.DEBERTA:
    library = scripts.deberta_tokenizer(kind)
    if kind == 'deberta_5':  # the tokenizer of transformers 5 itself
      model = json.loads(library.to_str())['model']
      reader = transformers.DebertaV2Tokenizer(
          vocab=[tuple(row) for row in model['vocab']], unk_id=3)
    else:
      reader = transformers.PreTrainedTokenizerFast(tokenizer_object=library)
    rows = reader(texts, add_special_tokens=False, return_offsets_mapping=True)
    arrays[kind] = np.array([scripts.checksum(kind, *row) for row in zip(
        texts, rows['input_ids'], rows['offset_mapping'], strict=True)],
                            np.uint32)
    pair = reader('東京 ab?', texts[0][:20], return_token_type_ids=True)
    arrays |= {f'{kind} pair': np.array(pair['input_ids'], np.int32),
               f'{kind} types': np.array(pair['token_type_ids'], np.int32)}
    ids = np.concatenate(rows['input_ids'])
    print(kind, len(ids), 'tokens,', (ids == 3).sum(), 'unknown', len(reader))
  with tempfile.TemporaryDirectory() as root:
    reader.save_pretrained(root)
    configs['tokenizer_config'] = json.loads(
        (pathlib.Path(root) / 'tokenizer_config.json').read_text())
  np.savez_compressed(HERE / 'deberta_v2_golden.npz', **arrays)
  (HERE / 'deberta_v2_configs.json').write_text(
      json.dumps(configs, indent=1) + '\n')


if __name__ == '__main__':
  main()
