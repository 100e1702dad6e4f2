"""The configuration of a run: typed, frozen, read from TOML. It imports nothing heavy.

fields, corpus, models, openai,
student, vllm, weights,
sections                    what can be set: types and ranges, then the sections
reading, paths              how a file becomes a Config, and what a relative path is relative to
settings                    the same as a table and as a JSON Schema
"""

from stillhouse.config.corpus import CorpusSection
from stillhouse.config.fields import DIVERGENCES, NoticeSource, Section
from stillhouse.config.models import ModelSection, TeacherSection
from stillhouse.config.openai import OpenAISection
from stillhouse.config.paths import with_absolute_inputs
from stillhouse.config.reading import load_config, parse_config, resolved_json
from stillhouse.config.sections import (
    ClusterSection,
    Config,
    EvaluateSection,
    StoreSection,
    TargetSection,
    TrackingSection,
)
from stillhouse.config.student import StudentSection
from stillhouse.config.vllm import VllmSection
from stillhouse.config.weights import CutSection, LoraSection

__all__ = [
    "DIVERGENCES",
    "ClusterSection",
    "Config",
    "CorpusSection",
    "CutSection",
    "EvaluateSection",
    "LoraSection",
    "ModelSection",
    "NoticeSource",
    "OpenAISection",
    "Section",
    "StoreSection",
    "StudentSection",
    "TargetSection",
    "TeacherSection",
    "TrackingSection",
    "VllmSection",
    "load_config",
    "parse_config",
    "resolved_json",
    "with_absolute_inputs",
]
