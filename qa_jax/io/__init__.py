"""Input and output: files, report documents and plots.

The files `documents` and `plots` are loaded only when they are imported, since
they need jinja2 and matplotlib.
"""

from qa_jax.io.files import check_writable
from qa_jax.io.files import parse_object
from qa_jax.io.files import read_object
from qa_jax.io.files import read_rows
from qa_jax.io.files import read_text
from qa_jax.io.files import write_json
from qa_jax.io.files import write_jsonl
from qa_jax.io.files import write_text

__all__ = [
    'check_writable', 'parse_object', 'read_object', 'read_rows', 'read_text',
    'write_json', 'write_jsonl', 'write_text']
