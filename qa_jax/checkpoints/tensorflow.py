"""A reader of TensorFlow checkpoints ("tensor bundles") without TensorFlow.

This file needs the extra [tensorflow]; import it where a checkpoint is opened.

PREFIX.index is a LevelDB table from the name of a tensor to a BundleEntryProto.
The files PREFIX.data-S-of-N hold the bytes of all tensors. Every block of the
table and every tensor has a crc32c checksum, so a damaged file is an error.
The formats are described in LevelDB's table_format.md and TensorFlow's
tensor_bundle.proto.
"""

import collections
from collections.abc import Iterable, Iterator, Mapping
import dataclasses
import math
import pathlib
import struct

import cramjam
import google_crc32c
import ml_dtypes
import numpy as np

from qa_jax import errors

MAGIC = 0xDB4775248B80FB57
FOOTER = 48  # bytes of two block handles, padding and the magic number
NO_COMPRESSION, SNAPPY = 0, 1
LARGEST = 2**28  # bytes of an index or a block; BERT-large's index has 40 kB
# Number in tensorflow.DataType → type, for the types that weights have.
DTYPES = {1: np.float32, 2: np.float64, 14: ml_dtypes.bfloat16, 19: np.float16}


@dataclasses.dataclass(frozen=True)
class Entry:
  """The place and type of a tensor, from the index."""

  dtype: int  # a number of tensorflow.DataType
  shape: tuple[int, ...]
  shard: int
  offset: int
  size: int  # bytes
  crc32c: int  # masked, as `_masked_crc` returns it
  sliced: bool  # True if the tensor is stored in slices under other names


@dataclasses.dataclass(frozen=True)
class Index:
  """The index of a checkpoint: its tensors by name, and its data files."""

  prefix: pathlib.Path
  num_shards: int
  entries: Mapping[str, Entry]


def read_index(prefix: pathlib.Path) -> Index:
  """Reads the index of a checkpoint; `prefix` is such as DIR/bert_model.ckpt.

  Raises:
    UserError: the index is missing, damaged, or not the index of a checkpoint.
  """
  path = prefix.with_name(prefix.name + '.index')
  try:
    if path.stat().st_size > LARGEST:
      raise ValueError(f'{path.stat().st_size} bytes')
    rows = dict(_table(path.read_bytes()))
    header = _fields(rows.pop(b''))
    if header.get(2, [0]) != [0]:
      raise ValueError('big-endian numbers')
    entries = {name.decode(): _entry(value) for name, value in rows.items()}
    if strange := [name for name in entries if not name.isprintable()]:
      raise ValueError(f'the name {strange[0]!r}')
    return Index(path.with_name(prefix.name), _int(header, 1), entries)
  except OSError as e:
    raise errors.UserError(f'{path}: {e.strerror}') from None
  except (ValueError, TypeError, IndexError, KeyError, struct.error,
          cramjam.DecompressionError) as e:
    raise errors.UserError(
        f'{path}: not a whole index of a TensorFlow checkpoint ({e}); fetch '
        'it again') from None


def read_tensors(index: Index, names: Iterable[str]) -> dict[str, np.ndarray]:
  """Reads the tensors of these names, and checks their sizes and checksums.

  Raises:
    UserError: a tensor has a type that weights do not have, or a data file is
      missing or damaged.
  """
  out, bytes_read = {}, collections.Counter()
  for name in names:
    entry = index.entries[name]
    path = index.prefix.with_name(
        f'{index.prefix.name}.data-{entry.shard:05}-of-{index.num_shards:05}')
    if entry.sliced or entry.dtype not in DTYPES:
      kind = 'cut into slices' if entry.sliced else f'of type {entry.dtype}'
      raise errors.UserError(
          f'{path}: {name} is {kind}; whole tensors of a float type are read')
    dtype = np.dtype(DTYPES[entry.dtype])
    try:
      if entry.size != math.prod(entry.shape) * dtype.itemsize:
        raise ValueError(f'{entry.size} bytes for shape {entry.shape}')
      if entry.offset + entry.size > path.stat().st_size:
        raise ValueError('the file ends before it')
      bytes_read[path] += entry.size
      if bytes_read[path] > path.stat().st_size:
        raise ValueError('it overlaps others')
      with path.open('rb') as file:
        file.seek(entry.offset)
        data = file.read(entry.size)
      if _masked_crc(data) != entry.crc32c:
        raise ValueError('its checksum differs')
    except OSError as e:
      raise errors.UserError(f'{path}: {e.strerror}') from None
    except ValueError as e:
      raise errors.UserError(
          f'{path}: {name} is damaged ({e}); fetch the file again') from None
    out[name] = np.frombuffer(data, dtype).reshape(entry.shape)
  return out


def _entry(data: bytes) -> Entry:
  """Parses a BundleEntryProto; a field that is 0 is absent from the bytes."""
  fields = _fields(data)
  shape = [_int(_fields(dim), 1) for message in fields.get(2, [])
           for dim in _fields(message).get(2, [])]
  crc = struct.unpack('<I', fields.get(6, [bytes(4)])[-1])[0]
  return Entry(dtype=_int(fields, 1), shape=tuple(shape),
               shard=_int(fields, 3), offset=_int(fields, 4),
               size=_int(fields, 5), crc32c=crc, sliced=7 in fields)


def _int(fields: dict[int, list], number: int) -> int:
  value = fields.get(number, [0])[-1]
  if not isinstance(value, int):
    raise ValueError(f'field {number} is no number')
  return value


def _fields(data: bytes) -> dict[int, list[int | bytes]]:
  """Returns {field number: values} of a protobuf message, bytes unparsed."""
  out, at = collections.defaultdict(list), 0
  while at < len(data):
    key, at = _varint(data, at)
    wire = key & 7
    if wire == 0:
      value, at = _varint(data, at)
    elif wire in (1, 2, 5):
      size, at = _varint(data, at) if wire == 2 else ({1: 8, 5: 4}[wire], at)
      value, at = _take(data, at, size), at + size
    else:
      raise ValueError(f'wire type {wire}')
    out[key >> 3].append(value)
  return dict(out)


def _varint(data: bytes, at: int) -> tuple[int, int]:
  """Returns (number, position after it) of a varint, 7 bits a byte."""
  value = 0
  for shift in range(0, 64, 7):
    byte = data[at + shift // 7]
    value |= (byte & 127) << shift
    if byte < 128:
      return value, at + shift // 7 + 1
  raise ValueError('a number without end')


def _take(data: bytes, at: int, size: int) -> bytes:
  if not 0 <= size <= len(data) - at:
    raise ValueError(f'it ends within {size} bytes at {at}')
  return data[at:at + size]


def _table(data: bytes) -> Iterator[tuple[bytes, bytes]]:
  """Yields all keys and values of a table, in order."""
  footer = _take(data, max(len(data) - FOOTER, 0), FOOTER)
  if struct.unpack('<Q', footer[-8:])[0] != MAGIC:
    raise ValueError('it does not end in the magic number')
  _, at = _handle(footer, 0)  # skips the metaindex, which is empty
  handle, _ = _handle(footer, at)
  for _, value in _items(_block(data, *handle)):
    yield from _items(_block(data, *_handle(value, 0)[0]))


def _handle(data: bytes, at: int) -> tuple[tuple[int, int], int]:
  """Returns ((offset, size) of a block, position after its handle)."""
  offset, at = _varint(data, at)
  size, at = _varint(data, at)
  return (offset, size), at


def _block(data: bytes, offset: int, size: int) -> bytes:
  """Returns a block's contents, uncompressed, after checking its crc32c."""
  # One byte for the compression and four for the checksum follow a block.
  contents = _take(data, offset, size + 5)
  if struct.unpack('<I', contents[-4:])[0] != _masked_crc(contents[:-4]):
    raise ValueError(f'the checksum of the block at {offset} differs')
  kind, contents = contents[size], contents[:size]
  if kind == SNAPPY:
    if (whole := _varint(contents, 0)[0]) > LARGEST:
      raise ValueError(f'a block of {whole} bytes')
    return bytes(cramjam.snappy.decompress_raw(contents))
  if kind != NO_COMPRESSION:
    raise ValueError(f'compression {kind}')
  return contents


def _items(block: bytes) -> Iterator[tuple[bytes, bytes]]:
  """Yields keys and values of a block; a key omits its shared prefix."""
  # The block ends with the positions of whole keys, for a binary search.
  restarts = struct.unpack('<I', block[-4:])[0]
  entries = _take(block, 0, len(block) - 4 * (restarts + 1))
  at, key = 0, b''
  while at < len(entries):
    shared, at = _varint(entries, at)
    fresh, at = _varint(entries, at)
    size, at = _varint(entries, at)
    if shared > len(key):
      raise ValueError('a key shares more than the last one has')
    key = key[:shared] + _take(entries, at, fresh)
    yield key, _take(entries, at + fresh, size)
    at += fresh + size


def _masked_crc(data: bytes) -> int:
  """Returns LevelDB's masked crc32c, rotated since data may hold checksums."""
  crc = google_crc32c.value(data)
  return ((crc >> 15 | crc << 17) + 0xA282EAD8) % 2**32
