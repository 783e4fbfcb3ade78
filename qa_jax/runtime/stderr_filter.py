"""A filter between the native code of a process and its stderr.

  python -I -S stderr_filter.py MESSAGE < pipe

When another process of a run is lost, XLA aborts this process and prints a long
stack trace. Only another process can replace that trace by one line for the
user. `processes.join_processes` starts this file by its path, without the
package, so that it starts in milliseconds. It copies its stdin to stderr and
drops the notices of Gloo. Lines from the first one about the coordination
service on are held back until stdin ends. MESSAGE is then printed in their
place if XLA said that it ends the process, and else the lines themselves.
"""

import re
import signal
import sys

# Gloo's notice of its connections. Each device has a thread that writes one,
# piece by piece, so that the pieces of several notices and other lines mix.
NOTICE = re.compile(
    r'\[Gloo\] Rank | is connected to | peer ranks\. |'
    r'Expected number of connected peer ranks is : ')
FIRST_SIGN = 'coordination_service'
ENDS_PROCESS = 'distributed service detected'


def main() -> None:
  """Filters stdin until it ends, which is when the process has ended."""
  # The signals that end the run reach this process too, which must outlive it.
  for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR2):
    signal.signal(number, signal.SIG_IGN)
  held, notice = [], False
  sys.stdin.reconfigure(errors='replace')
  for line in sys.stdin:
    if held or FIRST_SIGN in line or ENDS_PROCESS in line:
      held.append(line)
      continue
    rest = NOTICE.sub('', line)
    # A line of numbers alone, or none, is the end of the notice before it.
    notice = (notice or rest != line) and not rest.strip('0123456789 \n')
    if not notice:
      sys.stderr.write(rest)
      sys.stderr.flush()
  if any(ENDS_PROCESS in line for line in held):
    held = [sys.argv[1] + '\n']
  sys.stderr.writelines(held)


if __name__ == '__main__':
  main()
