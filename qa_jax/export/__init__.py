"""Export of trained models: StableHLO programs and Hugging Face directories."""

from qa_jax.export.hugging_face import ConversionSource as ConversionSource
from qa_jax.export.hugging_face import read_source as read_source
from qa_jax.export.hugging_face import write_hugging_face as write_hugging_face
from qa_jax.export.hugging_face import (
    write_run_directory as write_run_directory,
)
from qa_jax.export.stablehlo import export_run as export_run
from qa_jax.export.stablehlo import lower_program as lower_program
