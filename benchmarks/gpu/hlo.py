"""The kernels of a compiled GPU program: bytes, FLOPs and roofline seconds."""

import collections
from collections.abc import Iterable
import dataclasses
import math
import re

SIZES = {'pred': 1, 's8': 1, 'u8': 1, 'bf16': 2, 'f16': 2, 's16': 2, 'u16': 2,
         'f32': 4, 's32': 4, 'u32': 4, 's64': 8, 'u64': 8, 'f64': 8}
# Rates that an H100 reached when they were measured alone: a copy of 4 GiB, and
# bfloat16 products of the shapes of BERT-base. Data sheet: 3.35 TB/s and 989.
BYTES_PER_SECOND = 3.0e12
FLOPS_PER_SECOND = 650e12
# Instructions that run no kernel of their own.
FREE = ('parameter', 'constant', 'get-tuple-element', 'tuple', 'bitcast',
        'after-all', 'copy-start', 'copy-done')
# Mark in the path of names → part of the train step; the first mark counts.
PARTS = {'bhqk': 'attention core', 'bhsk': 'attention core', 'mlp/': 'mlp',
         'attention': 'attention', 'embeddings': 'embeddings', 'head/': 'head'}
SHAPE = re.compile(rf'\b({"|".join(SIZES)})\[([\d,]*)\]')
INSTRUCTION = re.compile(
    r'^(?:ROOT )?%([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)$')


@dataclasses.dataclass(frozen=True)
class Kernel:
  """One launch of a program."""

  name: str
  kind: str  # 'product', 'scatter', 'gather', 'fusion', or the target of a call
  bytes: int  # of operands and results, to and from memory
  flops: float  # of matrix products
  source: str  # path of names in the Python program

  @property
  def seconds(self) -> float:
    """Returns the shortest time that memory and arithmetic allow."""
    return max(self.bytes / BYTES_PER_SECOND, self.flops / FLOPS_PER_SECOND)

  @property
  def part(self) -> str:
    """Returns the part of the train step, such as 'mlp backward'."""
    name = next((part for mark, part in PARTS.items() if mark in self.source),
                '')
    if 'jvp' not in self.source:
      return name or 'optimizer and others'
    way = 'backward' if 'transpose(jvp' in self.source else 'forward'
    return f'{name or "others"} {way}'


def read_kernels(text: str) -> list[Kernel]:
  """Returns the kernels of the text of a compiled program.

  The body of a loop counts once.
  """
  return list(_walk(*read_bodies(text)))


def read_bodies(text: str) -> tuple[dict[str, list[str]], str]:
  """Returns the lines of each computation by its name, and the entry's name."""
  bodies: dict[str, list[str]] = {}
  entry = current = ''
  for line in text.splitlines():
    if begin := re.match(r'^(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$', line):
      current = begin[2]
      bodies[current] = []
      entry = current if begin[1] else entry
    elif line.startswith('}'):
      current = ''
    elif current:
      bodies[current].append(line.strip())
  return bodies, entry


def _walk(bodies: dict[str, list[str]], name: str) -> Iterable[Kernel]:
  shapes: dict[str, list[tuple[str, list[int]]]] = {}
  for line, result, operation, rest in _instructions(bodies[name], shapes):
    if operation in FREE:
      continue
    called = re.search(r'(?:calls|to_apply|body)=%([\w.\-]+)', line)
    if operation in ('call', 'while'):  # a CUDA graph is a call
      yield from _walk(bodies, called[1])
      continue
    operands = re.findall(r'%([\w.\-]+)', rest.split('), ')[0])
    moved = _bytes(shapes[result])
    kind, flops = operation, 0.0
    if operation == 'fusion':
      flops, inside = _inside(bodies, called[1])
      kind = ('product' if flops else 'scatter' if 'scatter' in inside
              else 'gather' if 'gather' in inside else 'fusion')
    elif operation == 'custom-call':
      kind = re.search(r'custom_call_target="([^"]*)"', line)[1]
      if summed := re.search(r'"lhs_contracting_dimensions":\["(\d+)"', line):
        left = shapes[operands[0]][0][1]
        flops = 2.0 * math.prod(shapes[result][0][1]) * left[int(summed[1])]
        kind = 'product'
    # A gather reads as much of its table as it writes. An array that an
    # instruction takes twice, as q, k and v in one, is read once.
    moved += moved if kind == 'gather' else sum(
        _bytes(shapes.get(o, [])) for o in {*operands})
    source = re.search(r'op_name="([^"]*)"', line)
    yield Kernel(result, kind, moved, flops, source[1] if source else '')


def _instructions(lines: Iterable[str], shapes: dict[
    str, list[tuple[str, list[int]]]]) -> Iterable[tuple[str, str, str, str]]:
  """Yields line, result, operation and operands, and adds to `shapes`."""
  for line in lines:
    if match := INSTRUCTION.match(line):
      result, shape, operation, rest = match.groups()
      shapes[result] = _shapes(shape)
      yield line, result, operation, rest


def _inside(bodies, name) -> tuple[float, set[str]]:
  """Returns the FLOPs of the products of a fusion, and its operations."""
  shapes, flops, operations = {}, 0.0, set()
  for line, result, operation, rest in _instructions(bodies[name], shapes):
    operations.add(operation)
    if operation == 'dot':
      left = shapes[re.match(r'%([\w.\-]+)', rest)[1]][0][1]
      summed = re.search(r'lhs_contracting_dims=\{([\d,]*)\}', line)[1]
      flops += 2.0 * math.prod(shapes[result][0][1]) * math.prod(
          left[int(i)] for i in summed.split(','))
    elif operation == 'fusion':
      more, others = _inside(
          bodies, re.search(r'calls=%([\w.\-]+)', line)[1])
      flops, operations = flops + more, operations | others
  return flops, operations


def _shapes(text: str) -> list[tuple[str, list[int]]]:
  return [(dtype, [int(n) for n in sizes.split(',') if n])
          for dtype, sizes in SHAPE.findall(text)]


def _bytes(shapes: list[tuple[str, list[int]]]) -> int:
  return sum(SIZES[dtype] * math.prod(sizes) for dtype, sizes in shapes)


def table(kernels: list[Kernel]) -> list[str]:
  """Returns the lines of a table by parts of the step, longest first."""
  groups: dict[str, list[Kernel]] = collections.defaultdict(list)
  for kernel in kernels:
    groups[kernel.part].append(kernel)
  rows = sorted(groups.items(), key=lambda g: -sum(k.seconds for k in g[1]))
  return [f'{"part":24} {"kernels":>7} {"GB":>8} {"TFLOP":>7} {"ms":>8}'] + [
      f'{part:24} {len(group):7} {sum(k.bytes for k in group) / 1e9:8.2f} '
      f'{sum(k.flops for k in group) / 1e12:7.3f} '
      f'{1e3 * sum(k.seconds for k in group):8.3f}'
      for part, group in [*rows, ('all', kernels)]]
