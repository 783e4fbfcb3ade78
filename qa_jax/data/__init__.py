"""Data: from text files to windows and numpy batches of static shape.

This wing does not import jax.
"""

from qa_jax.data.batches import TrainBatches as TrainBatches
from qa_jax.data.examples import Example as Example
from qa_jax.data.examples import GoldAnswer as GoldAnswer
from qa_jax.data.examples import normalize_answer as normalize_answer
from qa_jax.data.sources import SOURCES as SOURCES
from qa_jax.data.sources import load_examples as load_examples
from qa_jax.data.tokenizer import Tokenizer as Tokenizer
from qa_jax.data.tokenizer import train_tokenizer as train_tokenizer
from qa_jax.data.tokenizer_files import read_tokenizer as read_tokenizer
from qa_jax.data.windows import WindowSet as WindowSet
from qa_jax.data.windows import make_windows as make_windows
