import pytest

from bridge.training.reporting.throughput import Throughput, model_flops_per_token, peak_bf16_flops


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H200", 989e12),
        ("NVIDIA H200 NVL", 835.5e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A100 80GB PCIe", 312e12),
        ("NVIDIA B200", 2.25e15),
        ("NVIDIA GB200", 2.5e15),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA GeForce RTX 4090", None),
        ("Some H100X card", None),
        ("", None),
    ],
)
def test_the_peak_of_known_devices_is_their_data_sheets(name: str, peak: float | None) -> None:
    assert peak_bf16_flops(name) == peak


def test_mfu_is_the_achieved_share_of_the_peak_of_all_devices() -> None:
    throughput = Throughput(flops_per_token=6e9, peak_flops=1e15, world_size=2)
    rates = throughput.rates(samples=100, seconds=4.0, counts={"tokens": 400_000})
    assert rates == pytest.approx({"tokens_per_s": 1e5, "samples_per_s": 25.0, "mfu": 0.3})


def test_what_the_data_counts_has_a_rate_too() -> None:
    rates = Throughput().rates(samples=2, seconds=2.0, counts={"tokens": 8, "images": 3})
    assert rates == {"tokens_per_s": 4.0, "samples_per_s": 1.0, "images_per_s": 1.5}


@pytest.mark.parametrize(
    "throughput", [Throughput(flops_per_token=6e9), Throughput(peak_flops=1e15)]
)
def test_there_is_no_mfu_where_the_peak_or_the_arithmetic_is_unknown(
    throughput: Throughput,
) -> None:
    assert throughput.rates(samples=2, seconds=2.0, counts={"tokens": 8}).keys() == {
        "tokens_per_s",
        "samples_per_s",
    }


def test_frozen_weights_get_no_gradients_and_adapters_are_counted_in_full() -> None:
    class Counting:
        def training_flops_per_token(self) -> float:
            return 600.0

    class Freezable(Counting):
        def weight_gradient_flops_per_token(self) -> float:
            return 180.0

    assert model_flops_per_token(Freezable(), adapter_weights=5.0) == 600 - 180 + 6 * 5
    # Without the FLOPs of a frozen model there is no MFU.
    assert model_flops_per_token(Counting(), adapter_weights=5.0) is None


def test_the_model_counts_its_own_arithmetic() -> None:
    class Counting:
        def training_flops_per_token(self) -> float:
            return 12.0

    assert model_flops_per_token(Counting()) == 12.0
    assert model_flops_per_token(object()) is None
