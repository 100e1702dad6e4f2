"""The configuration of a run: typed, frozen, read from TOML. It imports nothing heavy.

fields, corpus, models, servers,
student, vllm, weights,
sections                    what can be set: types and ranges, then the sections
reading, paths              how a file becomes a Config, and what a relative path is relative to
settings                    the same as a table and as a JSON Schema
"""

from stillhouse.config.corpus import CorpusSection
from stillhouse.config.fields import DIVERGENCES, NoticeSource, Section
from stillhouse.config.models import ModelSection, PoolSection, TeacherSection
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
from stillhouse.config.servers import ChatSection, ScoringSection, ServerSection
from stillhouse.config.student import StudentSection
from stillhouse.config.vllm import VllmSection
from stillhouse.config.weights import CutSection, LoraSection

__all__ = [
    "DIVERGENCES",
    "ChatSection",
    "ClusterSection",
    "Config",
    "CorpusSection",
    "CutSection",
    "EvaluateSection",
    "LoraSection",
    "ModelSection",
    "NoticeSource",
    "PoolSection",
    "ScoringSection",
    "Section",
    "ServerSection",
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
