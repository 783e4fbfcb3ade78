"""An overloaded server: it gives right answers or 413, 422, 503."""

import asyncio
import json
import pathlib
import random
import signal
import socket
import time
from typing import Any

import httpx2

from qa_jax.serving import server
from qa_jax.serving import service as service_lib
from tests.chaos import processes
from tests.common import random_model

CONCURRENCY = 50
LIMITS = service_lib.Limits(
    body_bytes=4000, question_characters=100, context_characters=2000,
    windows=8, waiting=CONCURRENCY * 4 // 5, seconds=600, batch=4)
MOST_MEBIBYTES = 200  # the most growth of the process after warm-up
WRONG = (  # bodies and the expected statuses
    (b'x' * 4001, 413), (b'', 422), (b'{"question": "a"', 422),
    (b'[' * 3000, 422), (b'\xff', 422), (b'{"question": 1}', 422),
    (json.dumps({'question': 'a' * 101, 'context': 'b'}).encode(), 422),
    (json.dumps({'question': 'a', 'context': 'b ' * 900}).encode(), 422),
    (b'{"question": "a", "context": "\\ud800"}', 422))


def serve(port_file: pathlib.Path) -> None:
  """Serves on a free port of 127.0.0.1 and writes the port to a file."""
  house = service_lib.Service(random_model.random_qa('independent'), LIMITS)
  house.qa.warm_up()
  with server.bind_socket('127.0.0.1', 0) as sock:
    port_file.with_suffix('.part').write_text(str(sock.getsockname()[1]))
    port_file.with_suffix('.part').rename(port_file)
    server.serve(house, sock)


def load(directory: pathlib.Path, count: int, seed: int) -> str:
  """Sends `count` requests, CONCURRENCY at a time, a tenth of them invalid."""
  draw = random.Random(seed)
  rows = [{'question': f'Who {n}?', 'context': random_model.CONTEXT[n % 30:] * (
      1 + n % 3)} for n in range(count)]
  wrong = {n: draw.choice(WRONG) for n in range(count) if n % 10 == 9}
  port = directory / 'port'
  with processes.Child(directory / 'log', serve, port) as child:
    processes.wait_for(port.exists, child)
    url = f'http://127.0.0.1:{port.read_text()}'
    _wait_until_it_answers(url, child)
    asyncio.run(_all(url, rows[:CONCURRENCY], {}))  # warm
    before = _resident(child.pid)
    asked = asyncio.run(_all(url, rows, wrong))
    grown = _resident(child.pid) - before
    child.send(signal.SIGTERM)
    assert child.wait() == 0, child.said
    assert 'Traceback' not in child.said, child.said
  busy = sum(n for _, _, n in asked.values())
  for n, (status, _, _) in asked.items():
    assert status == (wrong[n][1] if n in wrong else 200), (n, status)
  right = [n for n in asked if n not in wrong]
  expected = random_model.random_qa('independent').answer_batch(
      [rows[n] for n in right])
  for n, answer in zip(right, expected, strict=True):
    reply = asked[n][1]
    assert (reply['text'], reply['start'], reply['end']) == (
        answer.text, answer.start, answer.end), (n, reply)
    assert abs(reply['score'] - answer.score) < 1e-4
  assert grown < MOST_MEBIBYTES, grown
  return (f'{count} requests at concurrency {CONCURRENCY}: {len(right)} answers'
          f" equal to predict's, {len(wrong)} oversize or malformed refused "
          f'with 413 or 422; {busy} times 503 beyond the {LIMITS.waiting} that '
          f'may wait, asked again; no other status; {grown:.0f} MiB more')


def _wait_until_it_answers(url: str, child: processes.Child) -> None:
  host, port = url.removeprefix('http://').split(':')
  def answers() -> bool:
    try:
      socket.create_connection((host, int(port)), timeout=5).close()
    except OSError:
      return False
    return True
  processes.wait_for(answers, child)


async def _all(url: str, rows: list[dict[str, str]],
               wrong: dict[int, tuple[bytes, int]]
               ) -> dict[int, tuple[int, Any, int]]:
  """number → (status, JSON, how often it was 503 before)."""
  out, places = {}, asyncio.Semaphore(CONCURRENCY)
  deadline = time.monotonic() + processes.SECONDS
  async with httpx2.AsyncClient(
      base_url=url, timeout=processes.SECONDS,
      limits=httpx2.Limits(max_connections=CONCURRENCY)) as client:
    async def ask(n: int, row: dict[str, str]) -> None:
      body = wrong[n][0] if n in wrong else json.dumps(row).encode()
      busy = 0
      while True:
        async with places:
          response = await client.post('/answer', content=body)
        if response.status_code != 503:
          break
        busy += 1
        assert time.monotonic() < deadline, f'{n}: 503 for ever'
        await asyncio.sleep(0.2)
      out[n] = response.status_code, response.json(), busy
    await asyncio.gather(*(ask(n, row) for n, row in enumerate(rows)))
  return out


def _resident(pid: int) -> float:
  text = pathlib.Path(f'/proc/{pid}/statm').read_text()
  return int(text.split()[1]) * 4096 / 2**20
