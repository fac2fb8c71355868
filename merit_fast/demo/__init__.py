"""A real small model and real tasks for ``merit-fast demo``; offline with the demo extra."""

from merit_fast.demo.config import write_demo
from merit_fast.demo.model import default_cache, prepare_model
from merit_fast.demo.tasks import prepare_mixture

__all__ = ["default_cache", "prepare_mixture", "prepare_model", "write_demo"]
