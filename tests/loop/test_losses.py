import pytest
import torch

from bridge.training.losses import masked_next_token_loss, masked_token_loss

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.uint8, torch.float32])
def test_sums_the_losses_at_valid_positions_and_counts_them(dtype: torch.dtype) -> None:
    losses = torch.tensor([[1.0, 2.0, 4.0], [8.0, 16.0, 32.0]])
    mask = torch.tensor([[1, 0, 1], [0, 1, 0]]).to(dtype)

    loss_sum, num_tokens, report = masked_token_loss(mask, losses)

    assert loss_sum.item() == 21.0
    assert loss_sum.dtype == torch.float32
    assert num_tokens.item() == 3
    assert num_tokens.dtype == torch.int32
    assert report["lm loss"].tolist() == [21.0, 3.0]


def test_megatron_lms_name_is_the_same_function() -> None:
    assert masked_next_token_loss is masked_token_loss


def test_a_float_mask_weighs_the_losses_and_counts_positions() -> None:
    losses = torch.tensor([1.0, 2.0, 4.0], requires_grad=True)
    loss_sum, num_tokens, _ = masked_token_loss(torch.tensor([0.5, 0.0, 2.0]), losses)
    loss_sum.backward()

    assert loss_sum.item() == 8.5
    assert num_tokens.item() == 2
    assert losses.grad is not None
    assert losses.grad.tolist() == [0.5, 0.0, 2.0]


def test_adds_low_precision_losses_in_float32() -> None:
    losses = torch.full((4096,), 1.0, dtype=torch.bfloat16)
    loss_sum, _, _ = masked_token_loss(torch.ones(4096), losses)
    assert loss_sum.item() == 4096.0


def test_counts_exactly_beyond_the_integers_of_float32() -> None:
    size = 2**24 + 3
    _, num_tokens, report = masked_token_loss(
        torch.ones(1, dtype=torch.bool).expand(size), torch.zeros(1).expand(size)
    )
    assert num_tokens.item() == size
    assert report["lm loss"].tolist() == [0.0, size]


@pytest.mark.parametrize("poison", [NAN, INF, -INF])
@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_values_at_masked_positions_reach_neither_loss_nor_gradient(
    poison: float, dtype: torch.dtype
) -> None:
    losses = torch.tensor([1.0, poison, 3.0], requires_grad=True)
    loss_sum, num_tokens, _ = masked_token_loss(torch.tensor([1, 0, 1]).to(dtype), losses)
    loss_sum.backward()

    assert loss_sum.item() == 4.0
    assert num_tokens.item() == 2
    assert losses.grad is not None
    assert losses.grad.tolist() == [1.0, 0.0, 1.0]


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_without_a_valid_token_loss_and_gradient_are_exactly_zero(dtype: torch.dtype) -> None:
    losses = torch.tensor([1.0, NAN, INF], requires_grad=True)
    loss_sum, num_tokens, report = masked_token_loss(torch.zeros(3).to(dtype), losses)
    loss_sum.backward()

    assert loss_sum.item() == 0.0
    assert num_tokens.item() == 0
    assert report["lm loss"].tolist() == [0.0, 0.0]
    assert losses.grad is not None
    assert losses.grad.tolist() == [0.0, 0.0, 0.0]


def test_a_nan_prediction_is_not_hidden() -> None:
    loss_sum, _, _ = masked_token_loss(torch.ones(2), torch.tensor([1.0, NAN]))
    assert loss_sum.isnan()


@pytest.mark.parametrize("poison", [NAN, INF])
def test_raises_at_once_only_where_that_is_asked_for(poison: float) -> None:
    with pytest.raises(FloatingPointError, match=str(poison)):
        masked_token_loss(torch.ones(2), torch.tensor([1.0, poison]), check_for_nan_in_loss=True)
    masked_token_loss(torch.tensor([1, 0]), torch.tensor([1.0, NAN]), check_for_nan_in_loss=True)


def test_the_mask_that_the_model_returns_takes_the_place_of_the_batchs() -> None:
    losses = torch.tensor([1.0, 2.0, 4.0])
    for mask in (torch.ones(3), None):
        loss_sum, num_tokens, _ = masked_token_loss(mask, (losses, torch.tensor([0, 0, 1])))
        assert loss_sum.item() == 4.0
        assert num_tokens.item() == 1


def test_the_report_shares_no_memory_with_the_loss() -> None:
    loss_sum, num_tokens, report = masked_token_loss(torch.ones(2), torch.tensor([1.0, 3.0]))
    loss_sum /= 8
    num_tokens += 5
    assert report["lm loss"].tolist() == [4.0, 2.0]
    assert not report["lm loss"].requires_grad


@pytest.mark.parametrize(
    ("mask", "losses"),
    [((6,), (2, 3)), ((2, 3), (6,)), ((1, 6), (6,)), ((2, 3), (2, 3, 1)), ((2, 1, 3), (2, 3))],
)
def test_accepts_shapes_that_list_the_same_positions(
    mask: tuple[int, ...], losses: tuple[int, ...]
) -> None:
    _, num_tokens, _ = masked_token_loss(torch.ones(mask), torch.zeros(losses))
    assert num_tokens.item() == 6


@pytest.mark.parametrize(
    ("mask", "losses"), [((3, 2), (2, 3)), ((2,), (3,)), ((1,), (3,)), ((2, 1), (2, 3))]
)
def test_rejects_shapes_that_would_pair_the_wrong_positions(
    mask: tuple[int, ...], losses: tuple[int, ...]
) -> None:
    with pytest.raises(ValueError, match="loss_mask has shape"):
        masked_token_loss(torch.ones(mask), torch.zeros(losses))


def test_a_missing_mask_is_an_error_not_all_ones() -> None:
    with pytest.raises(ValueError, match="no loss_mask"):
        masked_token_loss(None, torch.zeros(3))
