"""A writer of TensorFlow checkpoints, after LevelDB's table_format.md.

It shares no code with the reader in qa_jax.checkpoints.tensorflow.
"""

from collections.abc import Mapping
import functools
import struct

import cramjam


@functools.cache
def crc_table() -> tuple[int, ...]:
  """Returns the table of crc32c: polynomial 0x1EDC6F41, bits reversed."""
  table = list(range(256))
  for _ in range(8):
    table = [c >> 1 ^ 0x82F63B78 * (c & 1) for c in table]
  return tuple(table)


def masked_crc(data: bytes) -> bytes:
  crc = 2**32 - 1
  for byte in data:
    crc = crc_table()[(crc ^ byte) & 255] ^ crc >> 8
  crc ^= 2**32 - 1
  return struct.pack(
      '<I', ((crc >> 15 | crc << 17 & 0xFFFFFFFF) + 0xA282EAD8) & 0xFFFFFFFF)


def varint(value: int) -> bytes:
  out = b''
  while value > 127:
    out, value = out + bytes([value & 127 | 128]), value >> 7
  return out + bytes([value])


def field(number: int, value: int | bytes) -> bytes:
  if isinstance(value, int):
    return varint(number << 3) + varint(value)
  return varint(number << 3 | 2) + varint(len(value)) + value


def block(rows: Mapping[bytes, bytes], every: int) -> bytes:
  out, restarts, last = b'', [], b''
  for n, (key, value) in enumerate(rows.items()):
    shared = 0
    if n % every == 0:
      restarts.append(len(out))
    else:
      while key[:shared + 1] == last[:shared + 1] and shared < len(key):
        shared += 1
    out += (varint(shared) + varint(len(key) - shared) + varint(len(value))
            + key[shared:] + value)
    last = key
  return out + struct.pack(f'<{len(restarts) + 1}I', *restarts, len(restarts))


def table(rows: Mapping[bytes, bytes], *, per_block: int = 3, every: int = 2,
          compression: int = 0) -> bytes:
  out, index = b'', {}

  def add(contents: bytes, kind: int = 0) -> bytes:
    nonlocal out
    if kind == 1:
      contents = bytes(cramjam.snappy.compress_raw(contents))
    handle = varint(len(out)) + varint(len(contents))
    contents += bytes([kind])
    out += contents + masked_crc(contents)
    return handle

  keys = sorted(rows)
  for at in range(0, len(keys), per_block):
    part = keys[at:at + per_block]
    index[part[-1] + b'~'] = add(
        block({k: rows[k] for k in part}, every), compression)
  footer = add(block({}, 1)) + add(block(index, 1))
  return out + footer.ljust(40, b'\0') + struct.pack('<Q', 0xDB4775248B80FB57)
