"""One rank: a device, the model's share on it, its part of the KV cache, and the steps it runs.

Life: init_device -> load_model -> memory -> initialize_kv_cache -> execute_model ... Every public method may be called
by name through the executor; all ranks get the same calls in the same order.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from lockstep.config.model_spec import ModelSpec
from lockstep.config.tree import EngineConfig
from lockstep.distributed.groups import ParallelGroups
from lockstep.executor.contract import RankMemory
from lockstep.models.decoder import DecoderModel
from lockstep.models.registry import build_model
from lockstep.protocol import StepPlan, StepResult
from lockstep.worker import kv, memory
from lockstep.worker.activations import activation_bytes
from lockstep.worker.batch import BatchState
from lockstep.worker.model_runner import ModelRunner

if TYPE_CHECKING:
    from lockstep.distributed.progress import ProgressCell
