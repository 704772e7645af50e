"""What a device can do at most, for model FLOPs utilization.

Dense bfloat16 rates in 1e12 operations per second, without sparsity; training in FP8 is compared
with the same number. The first name that is part of the device's counts.

Source: NVIDIA's data sheets of the products (SXM unless the name says otherwise).
"""

from typing import Final

PEAK_TFLOPS: Final = {
    "GB300": 2500.0,
    "GB200": 2500.0,
    "B300": 2250.0,
    "B200": 2250.0,
    "H200": 989.0,
    "GH200": 989.0,
    "H100 PCIe": 756.0,
    "H100 NVL": 835.0,
    "H100": 989.0,
    "H800": 989.0,
    "H20": 148.0,
    "A100": 312.0,
    "A800": 312.0,
    "L40S": 362.0,
    "L4": 121.0,
    "A40": 149.7,
    "A30": 165.0,
    "A10": 125.0,
}


def peak_tflops(device_name: str) -> float | None:
    """Return the peak of a device by the name its driver gives; None when it is not in the table.

    Example:
        >>> peak_tflops("NVIDIA H100 80GB HBM3"), peak_tflops("AMD EPYC")
        (989.0, None)
    """
    words = device_name.replace("-", " ").split()
    padded = f" {' '.join(words)} "
    for name, peak in PEAK_TFLOPS.items():
        if f" {name} " in padded:
            return peak
    return None
