"""Records tiny_bert/ and bert_golden.npz from transformers, by hand, once.

  pip install -r requirements-peers.txt
  python tests/golden/record_bert.py

Re-record only if the reference itself changes; our code never writes these.
A random BertForQuestionAnswering: hidden 32, 3 layers, 4 heads. Weights are
drawn wider than BERT's 0.02 and biases and LayerNorms are not trivial, so that
every parameter shows in the output, and GELU is used where erf and tanh differ.

Glossary of shapes: B batch, L length, D hidden size, N layers.
"""

import pathlib

import numpy as np
import torch
import transformers

HERE = pathlib.Path(__file__).resolve().parent


def main() -> None:
  torch.manual_seed(0)
  config = transformers.BertConfig(
      vocab_size=100, hidden_size=32, num_hidden_layers=3,
      num_attention_heads=4, intermediate_size=64, max_position_embeddings=40,
      attn_implementation='eager')
  model = transformers.BertForQuestionAnswering(config).eval()
  with torch.no_grad():
    for name, parameter in model.named_parameters():
      is_scale = 'LayerNorm.weight' in name
      parameter.normal_(1.0 if is_scale else 0.0, 0.2)
  model.save_pretrained(HERE / 'tiny_bert')
  (HERE / 'tiny_bert' / 'model.safetensors').chmod(0o644)

  rng = np.random.default_rng(0)
  lengths = np.array([24, 17, 9, 5])
  inside = np.arange(24)[None] < lengths[:, None]  # [B, L]
  token_ids = np.where(inside, rng.integers(1, 100, inside.shape), 0)
  first_context = np.array([8, 6, 4, 2])
  token_type_ids = np.where(
      inside & (np.arange(24)[None] >= first_context[:, None]), 1, 0)
  start = np.array([9, 0, 5, 3])
  end = np.array([12, 0, 5, 4])
  out = model(
      input_ids=torch.tensor(token_ids),
      token_type_ids=torch.tensor(token_type_ids),
      attention_mask=torch.tensor(inside.astype(np.int64)),
      start_positions=torch.tensor(start), end_positions=torch.tensor(end),
      output_hidden_states=True)
  out.loss.backward()
  # torch keeps the gradient of the padding token's vector at 0 (padding_idx);
  # that of the head's bias, which qa_jax lacks, is 0 up to rounding.
  norms = {k.removeprefix('bert.'): float(v.grad.double().norm())
           for k, v in model.named_parameters() if k != 'qa_outputs.bias'}
  np.savez_compressed(
      HERE / 'bert_golden.npz',
      token_ids=token_ids.astype(np.int32),
      token_type_ids=token_type_ids.astype(np.int32),
      attention_mask=inside.astype(np.int32),
      start_positions=start.astype(np.int32),
      end_positions=end.astype(np.int32),
      hidden=np.stack([h.detach().numpy() for h in out.hidden_states]),
      start_logits=out.start_logits.detach().numpy(),
      end_logits=out.end_logits.detach().numpy(),
      bias=model.qa_outputs.bias.detach().numpy(),
      loss=np.float32(out.loss.item()),
      gradient_names=np.array(sorted(norms)),
      gradient_norms=np.array([norms[k] for k in sorted(norms)], np.float32))


if __name__ == '__main__':
  main()
