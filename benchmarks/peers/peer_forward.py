"""Inference by torch + transformers, and by ONNX Runtime on CPU.

On a CPU each of them also runs in streams: Python threads, one a core, which
compute different batches without other threads.
"""

import concurrent.futures
import importlib.util
import os
import pathlib
import tempfile
import time

import numpy as np
import peer_batches
import torch
import transformers

CORES = len(os.sched_getaffinity(0))
# As train.eval_batch_size of qa_jax. On a CPU, 4 windows a core stay in its
# caches: 1.3 times the windows/s of 32, in torch too.
STREAM_BATCH = 4
BATCH = 128 if peer_batches.DEVICE == 'cuda' else STREAM_BATCH * CORES
STREAMS = ' streams'
NAMES = ('input_ids', 'attention_mask', 'token_type_ids')


class Forward:

  def build(self, folder):
    """Loads the initial weights of both sides and the windows."""
    self.folder = pathlib.Path(folder)
    self.windows = peer_batches.Windows(self.folder / 'windows.npz')
    self.models, self.sessions = {}, {}
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
    if peer_batches.DEVICE == 'cpu' and CORES > 1:
      names += [name + STREAMS for name in names
                if peer_batches.LAYOUTS[-1] in name]
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
    return self.windows.plan(
        layout, STREAM_BATCH if STREAMS in name else BATCH, shuffled=False)

  def _run(self, name):
    """Returns the start and end logits of each batch of the plan."""
    streams = CORES if STREAMS in name else 1
    model, plan = self._model(name, CORES // streams), self._plan(name)

    def compute(batches):
      torch.set_num_threads(CORES // streams)  # those of this Python thread
      with torch.inference_mode():
        return [model(self.windows.batch(*batch, labels=False))
                for batch in batches]

    if streams == 1:
      return compute(plan)
    outputs = [None] * len(plan)
    with concurrent.futures.ThreadPoolExecutor(streams) as pool:
      for i, part in enumerate(pool.map(
          compute, [plan[i::streams] for i in range(streams)])):
        outputs[i::streams] = part
    return outputs

  def _model(self, name, threads):
    """Returns the function of a batch to start and end logits on the host."""
    name = name.removesuffix(STREAMS)
    if name.endswith('onnxruntime'):
      if threads not in self.sessions:
        self.sessions[threads] = _onnx(self.folder, threads)
      return self.sessions[threads]
    model = self.models[name.split()[0],
                        ' compiled' * name.endswith(' compiled')]
    return lambda batch: [
        x.float().cpu().numpy() for x in _logits(model(**batch))]


def _logits(output):
  return output.start_logits, output.end_logits


def _onnx(folder, threads):
  """Returns a session of ONNX Runtime, fused by its own BERT optimizer."""
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
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(
        str(path), options, providers=['CPUExecutionProvider'])

  return lambda batch: session.run(
      ['start', 'end'], {name: batch[name].numpy() for name in NAMES})


def calls():
  forward = Forward()
  return {'build': forward.build, 'variants': forward.variants,
          'logits': forward.logits, 'run': forward.run}
