"""Records tiny_distilbert/, tiny_electra/ and others_golden.npz, once.

  pip install -r requirements-peers.txt
  python tests/golden/record_others.py

As record_bert.py, for the other architectures that load: random models for
question answering of transformers, and their logits.
"""

import pathlib

import numpy as np
import torch
import transformers

HERE = pathlib.Path(__file__).resolve().parent


def main() -> None:
  torch.manual_seed(1)
  common = dict(vocab_size=40, max_position_embeddings=24)
  models = {
      'distilbert': transformers.DistilBertForQuestionAnswering(
          transformers.DistilBertConfig(
              dim=16, n_layers=2, n_heads=2, hidden_dim=32, **common)),
      'electra': transformers.ElectraForQuestionAnswering(
          transformers.ElectraConfig(
              hidden_size=16, embedding_size=16, num_hidden_layers=2,
              num_attention_heads=2, intermediate_size=32, **common))}
  rng = np.random.default_rng(0)
  inside = np.arange(20)[None] < np.array([20, 11])[:, None]  # [B, L]
  batch = {'token_ids': np.where(inside, rng.integers(1, 40, inside.shape), 0),
           'attention_mask': inside.astype(np.int64),
           'token_type_ids': (inside & (np.arange(20) >= 6)[None]).astype(
               np.int64)}
  arrays = {k: v.astype(np.int32) for k, v in batch.items()}
  for name, model in models.items():
    with torch.no_grad():
      for path, parameter in model.eval().named_parameters():
        is_scale = path.endswith(('LayerNorm.weight', 'layer_norm.weight'))
        parameter.normal_(1.0 if is_scale else 0.0, 0.2)
      inputs = {'input_ids': torch.tensor(batch['token_ids']),
                'attention_mask': torch.tensor(batch['attention_mask'])}
      if name == 'electra':
        inputs['token_type_ids'] = torch.tensor(batch['token_type_ids'])
      out = model(**inputs)
    model.save_pretrained(HERE / f'tiny_{name}')
    (HERE / f'tiny_{name}' / 'model.safetensors').chmod(0o644)
    arrays[f'{name}_start'] = out.start_logits.numpy()
    arrays[f'{name}_end'] = out.end_logits.numpy()
  np.savez_compressed(HERE / 'others_golden.npz', **arrays)


if __name__ == '__main__':
  main()
