"""Parameter-efficient fine-tuning of megatron-core models: LoRA, DoRA, canonical LoRA."""

from bridge.peft.adapters.wrapper import AdaptedLinear
from bridge.peft.canonical_lora import CanonicalLoRA
from bridge.peft.dora import DoRA
from bridge.peft.lora import LoRA

__all__ = ["AdaptedLinear", "CanonicalLoRA", "DoRA", "LoRA"]
