"""Export of trained models: StableHLO programs and Hugging Face directories."""

from qa_jax.export.hugging_face import ConversionSource
from qa_jax.export.hugging_face import read_source
from qa_jax.export.hugging_face import write_hugging_face
from qa_jax.export.hugging_face import write_run_directory
from qa_jax.export.stablehlo import export_run
from qa_jax.export.stablehlo import lower_program

__all__ = [
    'ConversionSource', 'export_run', 'lower_program', 'read_source',
    'write_hugging_face', 'write_run_directory']
