"""Inference by torch + transformers, and by ONNX Runtime on CPU."""

import importlib.util
import os
import pathlib
import tempfile
import time

import numpy as np
import peer_batches
import torch
import transformers

# As train.eval_batch_size of qa_jax. On a CPU, 4 windows a core stay in its
# caches: 1.3 times the windows/s of 32, in torch too.
BATCH = (128 if peer_batches.DEVICE == 'cuda' else
         4 * len(os.sched_getaffinity(0)))
NAMES = ('input_ids', 'attention_mask', 'token_type_ids')


class Forward:

  def build(self, folder):
    """Loads the initial weights of both sides and the windows."""
    self.folder = pathlib.Path(folder)
    self.windows = peer_batches.Windows(self.folder / 'windows.npz')
    self.models = {}
    for dtype in ('float32', 'bfloat16'):  # of weights: no casts, no autocast
      model = transformers.BertForQuestionAnswering.from_pretrained(
          folder, attn_implementation='sdpa', dtype=getattr(torch, dtype)).to(
              peer_batches.DEVICE).eval()
      self.models[dtype, ''] = model
      if peer_batches.DEVICE == 'cuda':
        self.models[dtype, ' compiled'] = torch.compile(model, dynamic=True)

  def variants(self):
    names = [f'{dtype} {layout}{how}' for dtype, how in self.models
             for layout in peer_batches.LAYOUTS]
    if peer_batches.DEVICE == 'cpu' and importlib.util.find_spec(
        'onnxruntime'):
      names += [f'float32 {layout} onnxruntime'
                for layout in peer_batches.LAYOUTS]
    return names

  def logits(self, name, target):
    """Writes start and end logits [N, L], NaN where there is no token."""
    shape = len(self.windows.length), self.windows.width
    out = {side: np.full(shape, np.nan, np.float32)
           for side in ('start', 'end')}
    for (rows, _), outputs in zip(self._plan(name), self._run(name),
                                strict=True):
      for k, row in enumerate(rows):
        n = self.windows.length[row]
        for side, values in zip(('start', 'end'), outputs, strict=True):
          out[side][row, :n] = values[k, :n]
    np.savez(target, **out)

  def run(self, name):
    """Returns the seconds until the logits of all windows are on the host."""
    began = time.perf_counter()
    self._run(name)
    return time.perf_counter() - began

  def _plan(self, name):
    layout = next(x for x in peer_batches.LAYOUTS if x in name)
    return self.windows.plan(layout, BATCH, shuffled=False)

  def _run(self, name):
    dtype, how = name.split()[0], f' {name.split()[-1]}'
    if how == ' onnxruntime' and (dtype, how) not in self.models:
      self.models[dtype, how] = _onnx(self.folder)
    model = self.models.get((dtype, how), self.models[dtype, ''])
    outputs = []
    with torch.inference_mode():
      for rows, length in self._plan(name):
        output = model(**self.windows.batch(rows, length, labels=False))
        outputs.append(output if how == ' onnxruntime' else [
            x.float().cpu().numpy() for x in _logits(output)])
    return outputs


def _logits(output):
  return output.start_logits, output.end_logits


def _onnx(folder):
  """Returns an ONNX Runtime session, fused by its own BERT optimizer."""
  import onnxruntime
  from onnxruntime.transformers import optimizer
  model = transformers.BertForQuestionAnswering.from_pretrained(
      folder, attn_implementation='eager').eval()

  class Exported(torch.nn.Module):

    def __init__(self):
      super().__init__()
      self.model = model

    def forward(self, *inputs):
      return _logits(self.model(**dict(zip(NAMES, inputs, strict=True))))

  example = tuple(torch.ones(2, 16, dtype=torch.int64) for _ in NAMES)
  with tempfile.TemporaryDirectory() as temporary:
    path = pathlib.Path(temporary) / 'model.onnx'
    torch.onnx.export(
        Exported(), example, str(path), input_names=list(NAMES),
        output_names=['start', 'end'], dynamo=False, opset_version=17,
        dynamic_axes={name: {0: 'batch', 1: 'length'}
                      for name in (*NAMES, 'start', 'end')})
    optimized = optimizer.optimize_model(
        str(path), model_type='bert',
        num_heads=model.config.num_attention_heads,
        hidden_size=model.config.hidden_size, opt_level=0)
    optimized.save_model_to_file(str(path))
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = len(os.sched_getaffinity(0))
    session = onnxruntime.InferenceSession(
        str(path), options, providers=['CPUExecutionProvider'])

  return lambda **batch: session.run(
      ['start', 'end'], {name: batch[name].numpy() for name in NAMES})


def calls():
  forward = Forward()
  return {'build': forward.build, 'variants': forward.variants,
          'logits': forward.logits, 'run': forward.run}
