"""Everything that crosses a process border, as msgspec structs. No torch, no behaviour."""

from lockstep.protocol.live import RankLive
from lockstep.protocol.memory import RankMemory
from lockstep.protocol.request import EngineOutput, EngineRequest, FinishReason
from lockstep.protocol.sampling import RequestOutputKind, SamplingParams, StructuredOutputs
from lockstep.protocol.step import NewRequest, Pooling, StepPlan, StepResult, TokenLogprobs

__all__ = [
    "EngineOutput",
    "EngineRequest",
    "FinishReason",
    "NewRequest",
    "Pooling",
    "RankLive",
    "RankMemory",
    "RequestOutputKind",
    "SamplingParams",
    "StepPlan",
    "StepResult",
    "StructuredOutputs",
    "TokenLogprobs",
]
