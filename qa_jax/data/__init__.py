"""Data: from text files to windows and numpy batches of static shape.

This wing does not import jax.
"""

from qa_jax.data.batches import TrainBatches
from qa_jax.data.examples import Example
from qa_jax.data.examples import GoldAnswer
from qa_jax.data.examples import normalize_answer
from qa_jax.data.sources import SOURCES
from qa_jax.data.sources import load_examples
from qa_jax.data.tokenizer import Tokenizer
from qa_jax.data.tokenizer import read_tokenizer
from qa_jax.data.tokenizer import train_tokenizer
from qa_jax.data.windows import WindowSet
from qa_jax.data.windows import make_windows

__all__ = ['SOURCES', 'Example', 'GoldAnswer', 'Tokenizer', 'TrainBatches',
           'WindowSet', 'load_examples', 'make_windows', 'normalize_answer',
           'read_tokenizer', 'train_tokenizer']
