r"""Compiles the train step for an H100, without a GPU, and lists its kernels.

  pip install -e '.[gpu-compile]'
  python -m benchmarks.gpu.compile --preset=base --batch=32 --length=384

Takes a quarter of a minute for --preset=tiny and some minutes for base on two
cores. The table has the kernels, the bytes to and from memory, the FLOPs and
the milliseconds that both allow at best (roofline); launches are not in it.
--kernels=REGEX also lists the kernels whose place in the program matches.
"""

import argparse
import pathlib
import re
import sys
import tempfile
import time

import jax

from benchmarks.gpu import cases
from benchmarks.gpu import h100
from benchmarks.gpu import hlo
from qa_jax import config
from qa_jax import errors
from qa_jax.io import files
from qa_jax.models import attention
from qa_jax.models.encoders import bert
from qa_jax.runtime import console


def pattern(text: str) -> re.Pattern[str]:
  try:
    return re.compile(text)
  except re.error as e:
    raise argparse.ArgumentTypeError(f'{text}: {e}') from None


def parse() -> argparse.Namespace:
  parser = argparse.ArgumentParser(
      description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
  add = parser.add_argument
  add('--preset', default='base', choices=bert.BertConfig.PRESETS)
  add('--batch', type=int, default=32, help='windows of an update')
  add('--length', type=int, default=384, help='tokens of a row')
  add('--dtype', default='bfloat16', help='precision.compute_dtype')
  add('--attention', default='auto', choices=attention.ATTENTION)
  add('--packing', default='False', choices=[*map(str, config.PACKINGS)])
  add('--updates', type=int, default=1,
      help='train.updates_per_dispatch; their loop counts as one update')
  add('--dropout', type=float, default=0.1)
  add('--attention_dropout', type=float, help='default: as --dropout')
  add('--option', action='append', default=[], metavar='FLAG=VALUE',
      help='flag of XLA, such as xla_gpu_deterministic_ops=true')
  add('--kernels', metavar='REGEX', type=pattern)
  add('--save', type=pathlib.Path, help='file for the compiled program')
  return parser.parse_args()


def main() -> None:
  args = parse()
  if args.save:
    files.check_writable(args.save)
  options = {'xla_gpu_enable_triton_gemm': False}  # as if tuned to cuBLAS
  for assignment in args.option:
    flag, _, value = assignment.partition('=')
    options[flag] = {'true': True, 'false': False}.get(value, value)
  began = time.perf_counter()
  with tempfile.TemporaryDirectory() as scratch:
    program, batch = h100.compile_step(cases.config(
        pathlib.Path(scratch), preset=args.preset, batch=args.batch,
        length=args.length, dtype=args.dtype, attention=args.attention,
        packing=args.packing, dropout=args.dropout,
        attention_dropout=args.attention_dropout,
        train__updates_per_dispatch=args.updates), options)
  text = program.as_text()
  if args.save:
    args.save.write_text(text, encoding='utf-8')
  kernels = hlo.read_kernels(text)
  memory = program.memory_analysis()
  console.say(f'jax {jax.__version__}, {h100.NAME}, compiled in '
              f'{time.perf_counter() - began:.0f} s, not run; batch '
              f'{"×".join(map(str, batch["token_ids"].shape))}, temporary '
              f'arrays {memory.temp_size_in_bytes / 2**20:.0f} MiB, arguments '
              f'{memory.argument_size_in_bytes / 2**20:.0f} MiB')
  print('\n'.join(hlo.table(kernels)))
  for kernel in kernels if args.kernels else ():
    if args.kernels.search(kernel.source):
      print(f'{1e6 * kernel.seconds:9.1f} µs {kernel.bytes / 1e6:9.2f} MB '
            f'{kernel.flops / 1e9:8.1f} GFLOP {kernel.kind:16} '
            f'{kernel.name[:40]:40} {kernel.source[-100:]}')


if __name__ == '__main__':
  try:
    main()
  except errors.UserError as e:
    sys.exit(f'error: {e}')
