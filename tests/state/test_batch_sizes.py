from bridge.training.config import TrainConfig


def test_a_steps_samples_are_divided_over_replicas_and_their_microbatches() -> None:
    train = TrainConfig(train_iters=1, global_batch_size=24, micro_batch_size=2)
    sizes = train.batch_sizes(replicas=3)
    assert (sizes.global_microbatch, sizes.microbatches) == (6, 4)
    assert sizes.is_divisible
    assert not train.batch_sizes(replicas=5).is_divisible
