"""Train a GPT under megatron.training, the loop inside the megatron-core wheel, to compare with it.

The wheel carries the loop but no entry script. This one does what a run of it needs and no more:
megatron.training's own model config and builder, our mock tokens, and a forward step whose loss is
the sum over unmasked tokens with their count. It takes megatron.training's own command line; lines
that start with ``rival `` are for `vs_megatron.py`.
"""

import time

PROCESS_START = time.time()  # before the imports, which are a good part of the start-up

import json  # noqa: E402
import os  # noqa: E402
from collections.abc import Callable, Iterator  # noqa: E402
from functools import partial  # noqa: E402
from typing import Any  # noqa: E402

import torch  # noqa: E402
from megatron.core import mpu  # noqa: E402
from megatron.core.datasets import utils as dataset_utils  # noqa: E402
from megatron.core.enums import ModelType  # noqa: E402
from megatron.core.rerun_state_machine import get_rerun_state_machine  # noqa: E402
from megatron.core.utils import (  # noqa: E402
    get_batch_on_this_cp_rank,
    get_batch_on_this_tp_rank,
)
from megatron.training import (  # noqa: E402
    get_args,
    pretrain,
    set_startup_timestamps,
)
from megatron.training.argument_utils import (  # noqa: E402
    gpt_config_from_args,
    pretrain_cfg_container_from_args,
)
from megatron.training.arguments import parse_and_validate_args  # noqa: E402

from mock_tokens import RandomTokens  # noqa: E402

type LossFunction = Callable[
    [torch.Tensor], tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]
]

BATCH_KEYS = ("tokens", "labels", "loss_mask", "attention_mask", "position_ids")


def report(event: str, **facts: Any) -> None:
    """Print one line for `vs_megatron.py`."""
    print("rival " + json.dumps({"event": event, **facts}), flush=True)


def mock_datasets(sizes: list[int]) -> tuple[RandomTokens, None, None]:
    """Build the training data for the training, validation and test sizes in samples."""
    args = get_args()
    train = RandomTokens(
        samples=sizes[0],
        seq_length=args.seq_length,
        vocab_size=args.padded_vocab_size,
        seed=args.seed,
    )
    return train, None, None


# It may be called on every rank.
mock_datasets.is_distributed = True  # type: ignore[attr-defined]


def next_batch(data_iterator: Iterator[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Take a microbatch, [batch, sequence], to this rank's device; keep its shard of it."""
    args = get_args()
    tp_rank = mpu.get_tensor_model_parallel_rank()
    batch: dict[str, Any] = {}  # None where the sample has no such tensor
    if tp_rank == 0:
        sample = next(data_iterator)
        for key in BATCH_KEYS:
            tensor = sample.get(key)
            batch[key] = None if tensor is None else tensor.cuda(non_blocking=True)
    batch = get_batch_on_this_tp_rank(
        batch,
        has_cu_seqlens=False,
        is_hybrid_cp=False,
        create_attention_mask_in_dataloader=args.create_attention_mask_in_dataloader,
        broadcast_src_rank=mpu.get_tensor_model_parallel_src_rank(),
        broadcast_group=mpu.get_tensor_model_parallel_group(),
        cp_size=args.context_parallel_size,
        tp_rank=tp_rank,
        micro_batch_size=args.micro_batch_size,
        seq_length=args.seq_length,
        mtp_on_this_rank=False,
        pipeline_model_parallel_size=args.pipeline_model_parallel_size,
        is_pipeline_first_stage=mpu.is_pipeline_first_stage(),
        is_pipeline_last_stage=mpu.is_pipeline_last_stage(),
    )
    sliced: dict[str, torch.Tensor] = get_batch_on_this_cp_rank(
        batch, is_hybrid_cp=False, cp_group=mpu.get_context_parallel_group()
    )
    return sliced


def masked_loss(
    loss_mask: torch.Tensor, output: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """Sum the token losses where the mask is one; with it their count, and both for the log."""
    mask = loss_mask.view(-1).float()
    loss = torch.sum(output.view(-1).float() * mask)
    count = mask.sum().detach().to(torch.int)
    if get_args().check_for_nan_in_loss_and_grad:
        # As a run of megatron.training has it: the host waits for each microbatch's loss.
        checks: tuple[tuple[Any, str], ...] = ((torch.isnan, "NaN"), (torch.isinf, "infinite"))
        for is_bad, name in checks:
            get_rerun_state_machine().validate_result(
                result=loss,
                rejection_func=is_bad,
                message=f"{name} loss",
                tolerance=0.0,
                fatal=True,
            )
    return loss, count, {"lm loss": torch.cat([loss.detach().view(1), count.view(1)])}


def forward_step(
    data_iterator: Iterator[dict[str, torch.Tensor]], model: torch.nn.Module
) -> tuple[torch.Tensor, LossFunction]:
    """Run the model on the next microbatch."""
    batch = next_batch(data_iterator)
    output = model(
        batch["tokens"],
        batch["position_ids"],
        batch["attention_mask"],
        labels=batch["labels"],
        loss_mask=batch["loss_mask"],
    )
    return output, partial(masked_loss, batch["loss_mask"])


def main() -> None:
    """Train with the flags of the command line and report what the log does not say."""
    imported = time.time()
    for name, value in {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "29531",
    }.items():
        os.environ.setdefault(name, value)
    # megatron.training runs make in megatron-core's folder; the wheel holds the built extension
    # and no Makefile, and a failing make ends the process.
    dataset_utils.compile_helpers = lambda: None
    set_startup_timestamps(program_start=PROCESS_START, main_entry=imported)
    args = parse_and_validate_args()
    pretrain(
        pretrain_cfg_container_from_args(args, gpt_config_from_args(args)),
        mock_datasets,
        ModelType.encoder_or_decoder,
        forward_step,
    )
    report(
        "end",
        peak_memory_gib=torch.cuda.max_memory_allocated() / 2**30,
        reserved_memory_gib=torch.cuda.max_memory_reserved() / 2**30,
        import_s=imported - PROCESS_START,
    )
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
