"""Input and output: files, report documents and plots."""

# `documents` and `plots` need jinja2 and matplotlib and are not imported here.

from qa_jax.io.files import check_writable as check_writable
from qa_jax.io.files import parse_object as parse_object
from qa_jax.io.files import read_object as read_object
from qa_jax.io.files import read_rows as read_rows
from qa_jax.io.files import read_text as read_text
from qa_jax.io.files import write_json as write_json
from qa_jax.io.files import write_jsonl as write_jsonl
from qa_jax.io.files import write_text as write_text
