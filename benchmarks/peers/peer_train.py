"""Fine-tuning by torch + transformers, as in torch_squad.py."""

import time

import numpy as np
import peer_batches
import torch
import torch.nn.functional as F
import transformers


class Train:

  def build(self, folder):
    """Loads the initial weights of both sides."""
    self.model = transformers.BertForQuestionAnswering.from_pretrained(
        folder, attn_implementation='sdpa').to(peer_batches.DEVICE)
    # torch leaves out the gradient of [PAD]'s embedding, though padding has a
    # share in a softmax over all positions.
    self.model.bert.embeddings.word_embeddings.padding_idx = None
    no_decay = ('bias', 'LayerNorm.weight')
    groups = [
        {'params': [p for n, p in self.model.named_parameters()
                    if n.endswith(no_decay) == flat], 'weight_decay': decay}
        for flat, decay in ((False, 0.01), (True, 0.0))]
    self.optimizer = torch.optim.AdamW(groups, lr=5e-5, eps=1e-8, fused=True)
    self.schedule = transformers.get_linear_schedule_with_warmup(
        self.optimizer, 100, 1000)
    self.steps = {'': self.model}
    self.ways = {}
    if peer_batches.DEVICE == 'cuda':
      self.steps[' compiled'] = torch.compile(self.model, dynamic=True)

  def compare(self, batch):
    """Returns loss and gradient norm of transformers' loss, without dropout."""
    return self._compare(dict(np.load(batch)), context=False)

  def compare_context(self, batch):
    """Returns loss and gradient norm, softmax over context and [CLS] alone."""
    return self._compare(dict(np.load(batch)), context=True)

  def _compare(self, arrays, context):
    real = arrays['weight'] > 0
    inputs = peer_batches.tensors({
        ours: arrays[theirs][real] for ours, theirs in (
            ('input_ids', 'token_ids'), ('token_type_ids', 'token_type_ids'),
            ('attention_mask', 'attention_mask'))})
    labels = peer_batches.tensors({
        key: arrays[key][real] for key in ('start_positions', 'end_positions')})
    self.model.eval()
    if context:
      domain = torch.from_numpy(arrays['context_mask'][real])
      domain[:, 0] = True
      output = self.model(**inputs)
      loss = sum(F.cross_entropy(logits.masked_fill(
          ~domain.to(logits.device), -1e9), labels[key]) for logits, key in (
              (output.start_logits, 'start_positions'),
              (output.end_logits, 'end_positions'))) / 2
    else:
      loss = self.model(**inputs, **labels).loss
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1e9)
    self.optimizer.zero_grad()
    return {'loss': float(loss.detach()), 'grad_norm': float(norm)}

  def variants(self):
    return [f'{dtype} {layout}{how}' for dtype in ('float32', 'bfloat16')
            for layout in peer_batches.LAYOUTS for how in self.steps]

  def plan(self, name, windows, batch_size, steps):
    """Picks the batches of an epoch to time and runs each once."""
    how = ' compiled' if name.endswith(' compiled') else ''
    dtype, layout = name.removesuffix(' compiled').split(' ', 1)
    windows = peer_batches.Windows(windows)
    epoch = windows.plan(layout, batch_size, shuffled=True)
    chosen = peer_batches.spread(epoch, steps)
    self.ways[name] = windows, chosen, dtype, self.steps[how]
    self._update(*self.ways[name][:1], chosen[:1], *self.ways[name][2:])
    share = len(chosen) / len(epoch)
    return {'windows': len(windows.length) * share,
            'tokens': float(windows.length.sum()) * share}

  def run(self, name):
    """Returns the seconds of the chosen batches, collation included."""
    return self._update(*self.ways[name])

  def _update(self, windows, chosen, dtype, model):
    self.model.train()
    began = time.perf_counter()
    for rows, length in chosen:
      batch = windows.batch(rows, length, labels=True)
      with peer_batches.autocast(dtype):
        loss = model(**batch).loss
      loss.backward()
      torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
      self.optimizer.step()
      self.schedule.step()
      self.optimizer.zero_grad()
    peer_batches.wait()
    return time.perf_counter() - began


def calls():
  train = Train()
  return {'build': train.build, 'compare': train.compare,
          'compare_context': train.compare_context,
          'variants': train.variants, 'plan': train.plan, 'run': train.run}
